# This file has two targets, `cpu` (the default) and `cuda`. The base image must be Debian 12, Ubuntu 24.04 or later.
#
#   docker build -t jamba-server .
#   docker build --target cuda -t jamba-server:cuda .
#
# hadolint global ignore=DL3008
# The rule DL3008 demands pinned versions of apt packages. They cannot be pinned, because BASE_IMAGE can be changed.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
# pip reads these three variables from the environment. They name other package indices or a mounted folder of wheels.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/jamba
WORKDIR /src
COPY pyproject.toml ./
RUN python3 -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt

FROM build AS wheel
COPY README.md LICENSE setup.py ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY src src
RUN /opt/jamba/bin/pip wheel --no-deps --wheel-dir /wheels .

# The dependencies are installed before the wheel because they change less often, so that their layer stays cached.
FROM build AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/jamba/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --requirement requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/jamba/bin/pip install --no-deps /wheels/*.whl

# The CUDA libraries come with torch. The host needs NVIDIA's driver and its container toolkit.
FROM build AS cuda-packages
RUN /opt/jamba/bin/pip install --requirement requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/jamba/bin/pip install --no-deps /wheels/*.whl

# The container may run as any user. OpenShift chooses a random user id with group 0, which /etc/passwd does not list.
FROM base AS runtime
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /home/jamba jamba \
    && install --directory --owner jamba --group root --mode 1777 /home/jamba /home/jamba/triton /hub /models
ENV PATH=/opt/jamba/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/home/jamba \
    USER=jamba \
    HF_HOME=/hub \
    TRITON_CACHE_DIR=/home/jamba/triton \
    JAMBA_HOST=0.0.0.0 \
    JAMBA_PORT=8000 \
    JAMBA_ADDRESS_FILE=/tmp/jamba-address
# `docker buildx build --sbom=true --provenance=mode=max` attaches the list of packages and the build's inputs to the image.
ARG VERSION=
ARG REVISION=
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="jamba-server" \
    org.opencontainers.image.description="Inference server for Jamba models with an OpenAI-compatible API" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE_IMAGE}"
WORKDIR /home/jamba
VOLUME ["/models", "/hub"]
EXPOSE 8000
# /health answers 503 until the model has loaded, which takes minutes for a large model. During the start period such
# failures do not make the container unhealthy. A liveness probe should use /live instead.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-m", "jamba_server.server.cli.health"]
ENTRYPOINT ["jamba"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles the C code that launches its kernels when they first run. It needs a C compiler and Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-packages /opt/jamba /opt/jamba
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:0

FROM runtime AS cpu
COPY --from=cpu-packages /opt/jamba /opt/jamba
USER 10001:0
