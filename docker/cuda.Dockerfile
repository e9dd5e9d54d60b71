# syntax=docker/dockerfile:1
# Training and acting on a GPU:  docker build -f docker/cuda.Dockerfile -t llmdpd:cuda .
#                                docker run --gpus all llmdpd:cuda train --gpu
# The base has the driver's interface; PyPI's torch brings the CUDA libraries of the same version.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 llmdpd
USER 10001
WORKDIR /home/llmdpd/source
ENV PATH=/home/llmdpd/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --chown=10001 constraints.txt ./
RUN python3 -m venv /home/llmdpd/venv && pip install -c constraints.txt torch==2.13.0
# What the package needs, known before its source: a change of that installs nothing anew.
COPY --chown=10001 pyproject.toml docker/requirements.py ./
RUN python requirements.py train build > requirements.txt && pip install -c constraints.txt -r requirements.txt
COPY --chown=10001 CMakeLists.txt LICENSE README.md ./
COPY --chown=10001 csrc csrc
COPY --chown=10001 kernels kernels
COPY --chown=10001 llmdpd llmdpd
RUN pip install --no-deps --no-build-isolation . && pip uninstall -y cmake ninja pybind11 scikit-build-core

FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# Triton compiles a launcher of each kernel with C.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev libegl1 python3-dev && \
    rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 llmdpd
COPY --from=build /home/llmdpd/venv /home/llmdpd/venv
USER 10001
WORKDIR /home/llmdpd
# A volume that is mounted on a folder which is there belongs to who owns the folder.
RUN mkdir runs data
ENV PATH=/home/llmdpd/venv/bin:$PATH NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
ENTRYPOINT ["llmdpd"]
CMD ["--help"]
