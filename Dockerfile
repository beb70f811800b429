# Both programs, for CPUs (default) or NVIDIA GPUs: docker build --build-arg LIBTORCH=cuda -t holdfast:0.1.0-cuda .
# The image runs as user 10001 and writes under /var/lib/holdfast and /tmp only, so its root may be read-only.
ARG LIBTORCH=cpu

FROM rust:1.95-bookworm AS build
ARG LIBTORCH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make postgresql python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# What is downloaded and compiled stays in the builder's cache: an image of changed sources does not fetch libtorch again.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked,id=holdfast-target-${LIBTORCH} \
    if [ "$LIBTORCH" = cuda ]; then cargo xtask setup --cuda; else cargo xtask setup; fi \
    && cargo build --release -p holdfast -p holdfast-trainer \
    && mkdir -p /out/bin /out/lib \
    && cp target/release/holdfast target/release/holdfast-trainer /out/bin/ \
    # -L: a GPU's libtorch is reached through links.
    && cp -aL .libtorch/lib/. /out/lib/ \
    && if [ -d .libtorch/site/nvidia ]; then find .libtorch/site/nvidia -name '*.so*' -exec cp -a {} /out/lib/ \; ; fi

FROM debian:bookworm-slim
# Postgres is there for `holdfast up`, which makes a cluster of its own; Debian's would only take room.
# hadolint ignore=DL3008
RUN mkdir -p /etc/postgresql-common \
    && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libstdc++6 postgresql \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 holdfast \
    && useradd --system --uid 10001 --gid 10001 --create-home --home-dir /var/lib/holdfast holdfast
COPY --from=build /out /opt/holdfast
ENV PATH=/opt/holdfast/bin:$PATH \
    HOME=/var/lib/holdfast \
    HOLDFAST_DATA_DIR=/var/lib/holdfast/data \
    HOLDFAST_LISTEN=0.0.0.0:8080
# By number, so that an orchestrator can tell that it is not root.
USER 10001:10001
VOLUME /var/lib/holdfast
EXPOSE 8080
# For `up` and `serve`. A worker has no port: switch this off where the image runs as one.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["holdfast", "health"]
ENTRYPOINT ["holdfast"]
CMD ["up"]
