# docker build -t gpt2-speedrun .
# docker run --rm -it --gpus all --shm-size 8g -v "$PWD/data:/speedrun/data" \
#     -v "$PWD/logs:/speedrun/logs" gpt2-speedrun ./run.sh
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton, behind torch.compile, compiles with gcc against Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /speedrun
COPY requirements.txt .
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -r requirements.txt
ENV PATH=/speedrun/.venv/bin:$PATH

COPY . .
CMD ["./run.sh"]
