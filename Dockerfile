# The server in an image: `docker compose up`, or `docker build -t semblance:local .` and
#   docker run --rm -p 127.0.0.1:8000:8000 -v semblance:/data -e SEMBLANCE_INSECURE=1 semblance:local
#
# Build arguments: EXTRA=cpu or gpu (which FAISS); TORCH_FROM, options of pip that say where torch comes from. PyPI's is a CUDA
# build, so docker-compose.yml names PyTorch's own index of CPU builds, which makes the image a quarter as large.
# Targets: app (the default) serves and holds nothing of training; train adds it.

FROM docker.io/library/python:3.11-slim-bookworm AS builder
ARG EXTRA=cpu
ARG TORCH_FROM=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# What it depends on first, which seldom changes, around empty packages.
RUN mkdir app models training && touch app/__init__.py models/__init__.py training/__init__.py && \
    pip install --constraint constraints.txt $TORCH_FROM torch torchvision && \
    pip install --constraint constraints.txt ".[$EXTRA,postgres,tracing]"
COPY app app
COPY models models
RUN rm -rf training build *.egg-info && pip install --no-deps --force-reinstall . && rm /opt/venv/bin/semblance-train

# What only compilers and torch's own tests read is a tenth of it.
FROM builder AS server
RUN rm -rf /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test

FROM builder AS trainer
COPY training training
RUN rm -rf build && pip install --no-deps --force-reinstall . && pip install --constraint constraints.txt ".[train]"

FROM docker.io/library/python:3.11-slim-bookworm AS runtime
# torch and FAISS share OpenMP; slim images lack it.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* && \
    useradd --system --uid 10001 --home-dir /data semblance && install -d -o semblance /data
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SEMBLANCE_HOST=0.0.0.0 SEMBLANCE_PORT=8000 SEMBLANCE_STORE=/data SEMBLANCE_CHECKPOINTS=/checkpoints/demo
USER semblance
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM

FROM runtime AS train
COPY --from=trainer /opt/venv /opt/venv
COPY checkpoints/demo /checkpoints/demo
ENTRYPOINT ["semblance-train"]
CMD ["--help"]

FROM runtime AS app
COPY --from=server /opt/venv /opt/venv
COPY checkpoints/demo /checkpoints/demo
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["semblance"]
CMD ["serve", "--demo"]
