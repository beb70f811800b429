# Both programs, for CPUs (default) or NVIDIA GPUs: docker build --build-arg LIBTORCH=cuda .
ARG LIBTORCH=cpu

FROM rust:1.95-bookworm AS build
ARG LIBTORCH
RUN apt-get update && apt-get install -y --no-install-recommends g++ make postgresql python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN if [ "$LIBTORCH" = cuda ]; then cargo xtask setup --cuda; else cargo xtask setup; fi
RUN cargo build --release -p holdfast -p holdfast-trainer
# -L: a GPU's libtorch is reached through links.
RUN mkdir -p /out/bin /out/lib \
    && cp target/release/holdfast target/release/holdfast-trainer /out/bin/ \
    && cp -aL .libtorch/lib/. /out/lib/ \
    && if [ -d .libtorch/site/nvidia ]; then find .libtorch/site/nvidia -name '*.so*' -exec cp -a {} /out/lib/ \; ; fi

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 postgresql && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/holdfast holdfast
COPY --from=build /out /opt/holdfast
ENV PATH=/opt/holdfast/bin:$PATH HOLDFAST_DATA_DIR=/var/lib/holdfast/data HOLDFAST_LISTEN=0.0.0.0:8080
USER 10001
VOLUME /var/lib/holdfast
EXPOSE 8080
ENTRYPOINT ["holdfast"]
CMD ["up"]
