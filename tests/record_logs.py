"""What the tests of records/ share: its modules, and logs made from parameters."""

import hashlib
import json
import sys
from pathlib import Path

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))

SEPARATOR = "=" * 100 + "\n"

# A script as it stands at the top of a log: with text that looks like the lines of a log.
SOURCE = '''"""A script. torch._inductor.config and mode="max-autotune" are not for records."""

import os

import torch

val_tokens: int = 999  # not what the log says; hyper-parameters come first


def report(step, steps, val_loss, seconds):
    print(f"step:{step}/{steps} val_loss:{val_loss:.5f} train_time:{1000 * seconds:.0f}ms")


# TORCHINDUCTOR_MAX_AUTOTUNE=1 would not be allowed either
torch._dynamo.config.cache_size_limit = 64
model = torch.compile(torch.nn.Linear(1, 1), dynamic=False, fullgraph=True)
'''

SMI = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|=========================================+========================+======================|
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |
| N/A   32C    P0            116W /  700W |    5856MiB /  81559MiB |      0%      Default |
+-----------------------------------------+------------------------+----------------------+
"""

HYPERPARAMETERS = dict(
    track="single-gpu", recipe="modern", seed=1337, run_id="", data_path="data/fineweb10B",
    target=3.3821, val_tokens=1_048_576, token_budget=5_000_000_000, batch_size=393_216,
    matrix_lr=0.05, train_steps=40, log_dir="logs",
)

BY_CORE = dict(track="time-to-gpt2", target=0.0, val_tokens=10_485_760, token_budget=20_000_000_000)


def step_lines(
    steps: int = 40, val_every: int = 10, final: float = 3.375, step_time: float = 0.5,
    unit: str = "ms", validation_time: float = 0.0,
) -> list[str]:
    """The lines of a run whose val_loss falls from 10.8 to `final`; times in seconds.

    `validation_time` is what each validation adds to the clock. `unit` is ms, s or mixed: the
    train_time in s, the step_avg in ms.
    """
    def line(step: int, loss: str, seconds: float) -> str:
        average = seconds / max(1, step)
        time = f"{1000 * seconds:.0f}ms" if unit == "ms" else f"{seconds:.3f}s"
        step_avg = f"{average:.3f}s" if unit == "s" else f"{1000 * average:.2f}ms"
        return f"step:{step}/{steps}{loss} train_time:{time} step_avg:{step_avg}"

    lines, seconds = [], 0.0
    for step in range(steps + 1):
        if step:
            seconds += step_time * (1 + 0.02 * (step % 2))  # steps are never quite alike
            lines.append(line(step, "", seconds))
        if step % val_every == 0 or step == steps:
            loss = final + (10.8 - final) * (1 - step / steps) ** 2
            lines.append(line(step, f" val_loss:{loss:.5f}", seconds))
            seconds += validation_time
    return lines


def shard_lines(data: str = "fineweb", train: int = 2, num_bytes: int = 200_001_024) -> list[str]:
    names = [("train", f"{data}_train_{i + 1:06d}.bin") for i in range(train)]
    names.append(("val", f"{data}_val_000000.bin"))
    return [f"{kind} data: data/{data}10B/{name} {num_bytes} bytes sha256 "
            f"{hashlib.sha256(name.encode()).hexdigest()}" for kind, name in names]


def our_log(
    seed: int = 1337, lines: list[str] | None = None, source: str = SOURCE,
    shards: list[str] | None = None, marks: str = "", warmup: str = "warm-up: undone after 67.2s",
    gpu: str = "NVIDIA H200", torch: str = "2.11.0+cu130", ranks: int = 1,
    environment: str = "no settings", end: str = "peak memory: 27351 MiB allocated",
    **hyperparameters,
) -> str:
    """A log as train_gpt.py writes it; by default one of a record on single-gpu."""
    settings = HYPERPARAMETERS | dict(seed=seed, run_id=f"run-{seed}") | hyperparameters
    header = [
        "date: 2026-11-21 03:41:21 UTC", f"Python 3.12.3, torch {torch}, CUDA 13.0, numpy 2.5.2",
        "Linux-6.18-x86_64-with-glibc2.39", f"GPU: {gpu}", SMI, f"environment: {environment}",
        "git commit: none", SEPARATOR.strip(), *(shard_lines() if shards is None else shards),
        *(f"hyperparameter {name}: {value}" for name, value in settings.items()),
        "parameters: 277,921,578 in all, 123,532,032 in matrix products of each token",
        f"tokens per step: 393,216 = {ranks} ranks x 8 micro-batches x 49,152",
        "attention: varlen", *([marks] if marks else []), SEPARATOR.strip(),
        "track single-gpu, recipe modern: 40 steps of 393,216 tokens to val_loss 3.3821",
        *([warmup] if warmup else []),
    ]
    if lines is None:
        lines = step_lines(steps=settings["train_steps"], final=3.375 + seed % 10 * 1e-4)
    return "\n".join([f"{source}\n{SEPARATOR.strip()}", *header, *lines, end]) + "\n"


def public_log(lines: list[str], source: str = SOURCE) -> str:
    """A log in the style of modded-nanogpt."""
    return (f"{source}{SEPARATOR}Running Python 3.10.12 (main, May 27 2025) [GCC 11.4.0]\n"
            f"Running PyTorch 2.8.0.dev20250524+cu126 compiled for CUDA 12.6\n"
            f"Sun Jul 13 01:33:51 2025\n{SMI}\n{SEPARATOR}" + "\n".join(lines)
            + "\npeak memory allocated: 30000 MiB reserved: 40000 MiB\n")


def write_logs(folder: Path, *texts: str, script: str | None = SOURCE) -> list[Path]:
    """Each text as a log of its own in the folder, with the script beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    if script is not None:
        (folder / "train_gpt.py").write_text(script, encoding="utf-8")
    paths = [folder / f"log{index}.txt" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def write_core(log: Path, mean: float = 0.3, **more) -> Path:
    """What evals/core.py writes of the end of a run of 40 steps, beside its log."""
    result = dict(task="core", run=log.stem, step=40, is_core=True, mean=mean) | more
    path = log.with_suffix(".core.json")
    path.write_text(json.dumps(result))
    return path
