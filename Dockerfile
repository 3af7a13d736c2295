# Two targets: `cpu` (the default) and `cuda`. Both want Debian 12, Ubuntu 24.04 or a later one as base.
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<address of PyTorch's CPU index> -t jamba-server .
#   docker build --target cuda -t jamba-server:cuda .
#
# hadolint global ignore=DL3008
# (no versions of apt packages: they are the base image's, whichever that is)
#
# torch brings its own CUDA libraries; the host needs NVIDIA's driver and container toolkit.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
# pip reads these three from the environment: other package indices, or a folder of wheels mounted into the build
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/jamba
WORKDIR /src
# the dependencies first: they change less often than the sources
COPY pyproject.toml ./
RUN python3 -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && /opt/jamba/bin/pip install --requirement requirements.txt
COPY README.md LICENSE setup.py ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY src src
RUN /opt/jamba/bin/pip install --no-deps .

FROM base AS runtime
RUN useradd --uid 10001 --create-home --home-dir /home/jamba jamba \
    && install --directory --owner jamba /models /hub
COPY --from=build /opt/jamba /opt/jamba
ENV PATH=/opt/jamba/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/hub \
    JAMBA_HOST=0.0.0.0 \
    JAMBA_PORT=8000
WORKDIR /home/jamba
USER 10001:10001
VOLUME ["/models", "/hub"]
EXPOSE 8000
# /health answers 503 until the model has loaded, which takes minutes for a large one: that does not count against the
# container in the start period. For liveness, ask /live
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"JAMBA_PORT\"]}/health')"]
ENTRYPOINT ["jamba"]
CMD ["serve"]

FROM runtime AS cuda
USER 0:0
# Triton builds its launchers with the C compiler and Python's headers
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime AS cpu
