# syntax=docker/dockerfile:1
# Training and acting on a CPU:  docker build -f docker/cpu.Dockerfile -t llmdpd .
# Development, in an editor:     --target dev, as .devcontainer/devcontainer.json has it.
FROM python:3.11-slim-bookworm AS dev
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The compiler is for the C++ module, and stays out of the image that runs.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 10001 llmdpd
USER 10001
WORKDIR /home/llmdpd/source
ENV PATH=/home/llmdpd/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# By itself, as it changes most seldom; PyPI's build of torch would bring gigabytes of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /home/llmdpd/venv && pip install --index-url "$TORCH_INDEX" torch==2.13.0

FROM dev AS build
# What the package needs, known before its source: a change of that installs nothing anew.
COPY --chown=10001 constraints.txt pyproject.toml docker/requirements.py ./
RUN python requirements.py train build > requirements.txt && pip install -c constraints.txt -r requirements.txt
COPY --chown=10001 CMakeLists.txt LICENSE README.md ./
COPY --chown=10001 csrc csrc
COPY --chown=10001 kernels kernels
COPY --chown=10001 llmdpd llmdpd
RUN pip install --no-deps --no-build-isolation . && pip uninstall -y cmake ninja pybind11 scikit-build-core

FROM python:3.11-slim-bookworm
# For videos without a GPU: --build-arg PACKAGES=libosmesa6, which is 100 MB.
ARG PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates $PACKAGES && \
    rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 llmdpd
COPY --from=build /home/llmdpd/venv /home/llmdpd/venv
USER 10001
WORKDIR /home/llmdpd
# A volume that is mounted on a folder which is there belongs to who owns the folder.
RUN mkdir runs data
ENV PATH=/home/llmdpd/venv/bin:$PATH
ENTRYPOINT ["llmdpd"]
CMD ["--help"]
