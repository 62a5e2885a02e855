# syntax=docker/dockerfile:1
FROM rust:1-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin portolan

FROM debian:bookworm-slim
# ca-certificates: https upstreams are always verified.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 65532 --no-create-home portolan
COPY --from=build /src/target/release/portolan /usr/local/bin/portolan
COPY config /etc/portolan/config
COPY geoip /etc/portolan/geoip
WORKDIR /etc/portolan
USER 65532
EXPOSE 8080
STOPSIGNAL SIGTERM
# Asks the admin address from inside the container; nothing else needs to reach it.
HEALTHCHECK --interval=10s --timeout=3s CMD ["sh", "-c", "portolan status --alive || exit 1"]
ENTRYPOINT ["portolan"]
CMD ["run", "--config", "config/portolan.yaml"]
