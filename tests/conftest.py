"""What the tests share: tiny hyper-parameters, shards, batches, ranks and runs, all on a CPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402  needs the path above
from train_gpt import MicroBatch, Ranks  # noqa: E402

CPU = torch.device("cpu")
ONE_RANK = Ranks(0, 1, CPU)
START = train_gpt.DOCUMENT_START

# A vocabulary without START: for models on batches built here, or without document masking.
TINY = dict(
    track="sample", recipe="sample", batch_size=512, device_batch_size=256, val_batch_size=128,
    val_tokens=512, row_length=64, max_document_length=64, vocab_size=256, num_layers=2,
    num_heads=2, model_dim=32, value_embeddings=1, window_start=0, window_end=0, train_steps=4,
    loss_chunk_size=48, dtype="float32", residual_dtype="float32", compile=False, attention="sdpa",
)


@pytest.fixture(autouse=True)
def same_random_numbers_in_each_test():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nothing here is large enough for two


def tiny_args(**overrides) -> train_gpt.Hyperparameters:
    """A modern model of two layers on rows of 64 tokens; `overrides` by name."""
    settings = TINY | overrides
    return train_gpt.parse_hyperparameters(
        [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    )


def baseline_args(**overrides) -> train_gpt.Hyperparameters:
    """The baseline recipe in full; `overrides` by name."""
    settings = dict(track="single-gpu", recipe="baseline") | overrides
    return train_gpt.parse_hyperparameters(
        [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    )


# -----------------------------------------------------------------------------
# Shards


def write_tokens(path: Path, tokens, magic=20240520, version=1, count=None) -> Path:
    """A shard of `tokens` as they are; the header can be made to lie."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def write_shard(path: Path, documents) -> Path:
    """A shard of documents, each a list of tokens without its START."""
    return write_tokens(path, [token for text in documents for token in (START, *text)])


def random_documents(seed: int, count: int, longest: int, vocab_size: int = 256) -> list[list[int]]:
    """Documents of 0 to `longest` tokens, none of them START."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, count)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def random_tokens(seed: int, count: int, vocab_size: int = 256) -> list[int]:
    """A stream without document starts."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


# -----------------------------------------------------------------------------
# Batches


def random_batch(args, rows: int = 2, lengths: list[int] | None = None, seed=0) -> MicroBatch:
    """Random tokens; `lengths` of the sequences over all rows, else each row is one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, args.row_length)
    inputs, targets = torch.randint(args.vocab_size, (2, *shape), generator=generator).int()
    whole = lengths is None
    lengths = [args.row_length] * rows if whole else lengths
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    assert ends[-1] == rows * args.row_length
    return MicroBatch(inputs, targets, ends, max(lengths), whole)


def wake_up(model: train_gpt.GPT, scale: float = 1.0) -> train_gpt.GPT:
    """Give every weight a random value, so that nothing is hidden behind an initial zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * scale * p.size(-1) ** -0.5 if p.ndim > 1 else 0.5 + 0.2 * noise)
    return model


def build(args, awake: bool = True, seed: int = 0) -> train_gpt.GPT:
    torch.manual_seed(seed)
    model = train_gpt.GPT(args)
    return wake_up(model) if awake else model


# -----------------------------------------------------------------------------
# Several ranks, and whole runs


# Ranks are forked from a process that has what takes seconds to import, and that did nothing else.
torch.multiprocessing.set_forkserver_preload(["torch._dynamo", "train_gpt"])


def _rank_main(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank,
                            world_size=world_size)
    result = function(Ranks(rank, world_size, CPU), *arguments)
    torch.save(result, f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # All is done and saved. Gloo's threads have been seen to abort a process that was tidying up.
    os._exit(0)


def run_ranks(function, world_size: int, folder: Path, *arguments) -> list:
    """function(ranks, *arguments) in so many processes; what each returned, tensors or numbers.

    `function` has to be one of a module's own, and `folder` fresh.
    """
    folder.mkdir(parents=True)
    torch.multiprocessing.start_processes(
        _rank_main, (world_size, str(folder), function, arguments), nprocs=world_size,
        start_method="forkserver",
    )
    return [torch.load(folder / f"result{rank}.pt") for rank in range(world_size)]


def wait_for(process: subprocess.Popen, happens, seconds: float = 120) -> None:
    """Return as soon as `happens()`, which it has to do in time, and while the process runs."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_train(
    *argv, cwd: Path, nproc: int = 1, timeout: float = 300, env: dict | None = None
) -> subprocess.CompletedProcess:
    """Run train_gpt.py in `cwd` on the CPU, under torchrun if nproc > 1; output as text.

    The logs go to cwd / "logs" unless `argv` says otherwise.
    """
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        [*launcher, str(ROOT / "train_gpt.py"), *map(str, argv)], cwd=cwd, env=environment,
        capture_output=True, text=True, timeout=timeout,
    )
