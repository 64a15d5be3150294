# The gateway with the CPU engine and the demo model.
#
#   docker build -f docker/cpu.Dockerfile -t tgi-gateway:cpu .
#   docker run --rm -p 8080:80 -v $PWD/data:/data tgi-gateway:cpu --model-id ORG/MODEL
#
# On Linux the torch of the public index is the CUDA build; name an index of CPU builds to have a small image:
#   --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
# Another target, for SageMaker: --target sagemaker.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY docker/constraints/cpu.txt docker/constraints/
COPY gateway gateway
COPY model-server model-server
COPY backends/cpu backends/cpu
COPY demo-model demo-model
RUN python -m venv /opt/tgi && \
    /opt/tgi/bin/pip install --no-cache-dir --constraint docker/constraints/cpu.txt \
        ./gateway './model-server[torch]' ./backends/cpu ./demo-model

FROM ${BASE} AS serve
RUN useradd --uid 1000 --create-home tgi && mkdir /data && chown tgi:tgi /data
COPY --from=build /opt/tgi /opt/tgi
COPY docker/health.py /opt/tgi/health.py
ENV PATH=/opt/tgi/bin:$PATH HUGGINGFACE_HUB_CACHE=/data PORT=80 HOSTNAME=0.0.0.0
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
