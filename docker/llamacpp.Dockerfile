# The gateway with the llama.cpp engine, for GGUF models.
#
#   docker build -f docker/llamacpp.Dockerfile -t tgi-gateway:llamacpp .
#   docker run --rm -p 8080:80 -v $PWD/data:/data tgi-gateway:llamacpp --model-id ORG/MODEL-GGUF:Q4_K_M
#
# For which hardware llama.cpp is compiled is the build argument CMAKE_ARGS, such as "-DGGML_CUDA=on" on a BASE that has CUDA.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
WORKDIR /src
RUN apt-get update && apt-get install --no-install-recommends --yes g++ make && rm -rf /var/lib/apt/lists/*
COPY docker/constraints docker/constraints
COPY docker/llamacpp.cmake docker/
COPY gateway gateway
COPY model-server model-server
COPY backends/llamacpp backends/llamacpp
RUN python -m venv /opt/tgi && \
    CMAKE_ARGS="-DCMAKE_PROJECT_llama.cpp_INCLUDE=/src/docker/llamacpp.cmake $CMAKE_ARGS" \
    /opt/tgi/bin/pip install --no-cache-dir \
        --constraint docker/constraints/cpu.txt --constraint docker/constraints/llamacpp.txt \
        ./gateway ./model-server ./backends/llamacpp

FROM ${BASE}
RUN apt-get update && apt-get install --no-install-recommends --yes libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home tgi && mkdir /data && chown tgi:tgi /data
COPY --from=build /opt/tgi /opt/tgi
COPY docker/health.py /opt/tgi/health.py
ENV PATH=/opt/tgi/bin:$PATH HUGGINGFACE_HUB_CACHE=/data PORT=80 HOSTNAME=0.0.0.0 BACKEND=llamacpp
USER 1000:1000
EXPOSE 80
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=2s CMD ["python", "/opt/tgi/health.py"]
ENTRYPOINT ["tgi-gateway"]
