# dmd_ds on CUDA, with flash-attention.
#
#     docker build -t dmd_ds .
#     docker run --gpus all --ipc host -v $PWD/outputs:/dmd_ds/outputs dmd_ds dmd_ds/train.py tiny
#
# CUDA has to be the version that the pinned torch was built with, for flash-attention is compiled against both; what that is says
# python -c "import torch; print(torch.version.cuda)". Compiling takes a while, and memory by MAX_JOBS.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

ARG MAX_JOBS=8
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/venv/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
# ninja and a compiler: DeepSpeed builds its kernels at first use. libaio: an optimiser on NVMe. pdsh, ssh: more than one machine
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12-venv python3.12-dev g++ ninja-build libaio-dev pdsh openssh-client git \
 && rm -rf /var/lib/apt/lists/* \
 && python3.12 -m venv /opt/venv

WORKDIR /dmd_ds
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt wheel packaging psutil
RUN MAX_JOBS=$MAX_JOBS pip install --no-cache-dir --no-build-isolation flash-attn
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

ENTRYPOINT ["deepspeed"]
