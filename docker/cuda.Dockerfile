# The gateway with the CUDA engine, for NVIDIA GPUs.
#
#   docker build -f docker/cuda.Dockerfile -t tgi-gateway:cuda .
#   docker run --rm --gpus all --shm-size 1g -p 8080:80 -v $PWD/data:/data tgi-gateway:cuda --model-id ORG/MODEL
#
# Another target, for SageMaker: --target sagemaker. FlashInfer compiles its kernels beside the server's work at the first
# start, if the image has nvcc (--build-arg BASE=...); without it Triton's kernels stay.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY docker/constraints/cuda.txt docker/constraints/
COPY gateway gateway
COPY model-server model-server
COPY backends/cuda backends/cuda
RUN python -m venv /opt/tgi && \
    /opt/tgi/bin/pip install --no-cache-dir --constraint docker/constraints/cuda.txt \
        ./gateway './model-server[torch]' "./backends/cuda[flashinfer]"

FROM ${BASE} AS serve
# Triton compiles the little program that starts each of its kernels.
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home tgi && mkdir /data && chown tgi:tgi /data
COPY --from=build /opt/tgi /opt/tgi
COPY docker/health.py /opt/tgi/health.py
ENV PATH=/opt/tgi/bin:$PATH HUGGINGFACE_HUB_CACHE=/data PORT=80 HOSTNAME=0.0.0.0 BACKEND=cuda \
    TRITON_CACHE_DIR=/data/.cache/triton FLASHINFER_WORKSPACE_BASE=/data XDG_CACHE_HOME=/data/.cache
USER 1000:1000
EXPOSE 80
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=2s CMD ["python", "/opt/tgi/health.py"]
ENTRYPOINT ["tgi-gateway"]

FROM serve AS sagemaker
COPY --chmod=755 docker/sagemaker-entrypoint.sh /opt/tgi/sagemaker-entrypoint.sh
ENV PORT=8080
EXPOSE 8080
ENTRYPOINT ["/opt/tgi/sagemaker-entrypoint.sh"]

FROM serve
