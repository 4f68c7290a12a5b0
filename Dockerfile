# Builds the server with its virtual environment, then copies both into a slim image without a compiler.
FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc=4:* libc6-dev=2.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY adapters adapters
COPY benchmarks benchmarks
COPY loadtest loadtest
COPY server server
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[otel]'

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 loraplex \
    && mkdir -p /data/cache /data/adapters \
    && chown -R loraplex /data
COPY --from=build /venv /venv
USER 10001
ENV PATH=/venv/bin:$PATH \
    HF_HOME=/data/huggingface \
    LORAPLEX_CACHE=/data/cache \
    LORAPLEX_ADAPTERS_DIR=/data/adapters \
    LORAPLEX_LISTEN=0.0.0.0:50051 \
    LORAPLEX_METRICS_LISTEN=0.0.0.0:9090
# What is built, for `loraplex env` and load tests: the image has no checkout to ask.
ARG COMMIT=""
ENV LORAPLEX_COMMIT=$COMMIT
VOLUME /data
EXPOSE 50051 9090
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["loraplex", "health"]
ENTRYPOINT ["loraplex"]
CMD ["serve"]
