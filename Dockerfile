# docker build -t doremi-train .                      CUDA 13
# docker build -t doremi-train --build-arg BASE=ubuntu:24.04 .
# docker run --gpus all --ipc=host -v "$PWD:/work" doremi-train data.root=/work/my_corpus run_dir=/work/runs/mine
# The image runs as user 1000: mount folders that it may write, or say --user "$(id -u):$(id -g)".

# The development image, because DeepSpeed and torch.compile build kernels when they are first used.
ARG BASE=nvidia/cuda:13.0.0-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/work

RUN python3 -m venv /opt/venv

# Dependencies before the code: a change of the code installs nothing else again.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY doremi_train/__init__.py doremi_train/__init__.py
COPY conf conf
RUN pip install -c constraints.txt .

COPY doremi_train doremi_train
RUN pip install --no-deps --force-reinstall .

# Ubuntu's image has a user 1000 already (ubuntu), other bases do not: a number serves both.
RUN mkdir -p /work && chown 1000:1000 /work
WORKDIR /work
USER 1000:1000

ENTRYPOINT ["doremi-train"]
