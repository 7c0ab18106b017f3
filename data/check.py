"""Pre-flight: can this machine run train_gpt.py with these options? A few seconds.

    python data/check.py [any option of train_gpt.py]
    python data/check.py --advise [any option of train_gpt.py]

The first looks at versions, GPUs, memory, data and disk, and exits with status 1 if something is
missing. The second prints only the options with which the run fits the GPUs' memory, or nothing
if it fits as it is; run.sh calls it.
"""

import dataclasses
import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from cached_fineweb10B import SHARD_BYTES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import (
    GPT,
    TRACKS,
    Hyperparameters,
    RunError,
    check_accumulation,
    check_shard,
    data_folder,
    estimate_shards,
    find_problem,
    find_shards,
    parse_hyperparameters,
    switch_off,
)

MIN_PYTHON, MIN_TORCH = (3, 11), (2, 11)
LOG_BYTES = 100_000_000  # what the logs and curves of a run may take, generously


def estimate_memory(args: Hyperparameters) -> float:
    """GPU memory of a run in GiB, fitted to the recipes' runs in records/; within some 15%."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(args).parameters())
    # Validation keeps nothing for a backward pass.
    tokens = max(args.device_batch_size, args.val_batch_size // 4)
    per_number = 58 if args.skip_connections else 55  # bytes, of `modern` and of `baseline`
    if args.fp8_blocks:
        per_number = 36 if args.fp8_gradients else 50
    # A cap without its kernel keeps several numbers of each logit.
    has_kernel = args.triton_kernels and args.softcap_kind == "tanh"
    per_logit = 7.5 if args.logit_softcap and not has_kernel else 2.3
    num_bytes = (11 * parameters  # weights, gradients, and the optimizers' state
                 + per_number * args.num_layers * args.model_dim * tokens  # activations
                 + per_logit * args.loss_chunk_size * args.vocab_size
                 # The memory of CUDA graphs is of no use to validation.
                 + 165 * args.model_dim * args.val_batch_size * args.cuda_graphs)
    return 1.05 * num_bytes / 2**30 + 0.7  # what the allocator leaves unused, and CUDA itself


class Report:
    """Lines of findings, and whether any of them stands in the way of the run."""

    def __init__(self):
        self.ready = True

    def line(self, subject: str, finding: str, problem: str | None = None) -> None:
        self.ready &= problem is None
        print(f"{subject:9}{finding}" + (f"\n{'':9}-> {problem}" if problem else ""))


def check_versions(report: Report) -> None:
    torch_version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    old = sys.version_info < MIN_PYTHON or torch_version < MIN_TORCH
    report.line("versions", f"Python {platform.python_version()}, torch {torch.__version__}, "
                f"CUDA {torch.version.cuda}",
                "Python 3.11 and torch 2.11 or newer are needed" if old else None)


def free_memory() -> float:
    """GiB free on the fullest GPU."""
    gpus = range(torch.cuda.device_count())
    return min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) / 2**30


def advise(args: Hyperparameters, free: float) -> str:
    """Options that make the run fit the ranks and `free` GiB; empty if it does. The training stays.

    RunError if nothing helps.
    """
    rows = args.common_rows // int(os.environ.get("WORLD_SIZE", 1))
    micro_rows = args.device_batch_size // args.row_length
    if rows % micro_rows == 0 and estimate_memory(args) < 0.95 * free:
        return ""
    # Graphs take memory of their own, but are worth more than a large micro-batch.
    for cuda_graphs in dict.fromkeys([args.cuda_graphs, False]):
        for n in range(micro_rows, 0, -1):
            size = n * args.row_length
            val_rows = max(1, size // args.max_val_length)
            val_size = min(val_rows * args.max_val_length, args.val_batch_size)
            smaller = dataclasses.replace(args, device_batch_size=size, val_batch_size=val_size,
                                          cuda_graphs=cuda_graphs)
            fits = rows % n == 0 and find_problem(smaller) is None
            if fits and estimate_memory(smaller) < 0.9 * free:
                return (f"--device_batch_size {size} --val_batch_size {val_size}"
                        + " --cuda_graphs false" * (args.cuda_graphs and not cuda_graphs))
    raise RunError(f"about {estimate_memory(smaller):.0f} GiB of GPU memory are needed at least, "
                   f"but {free:.0f} GiB are free")


def check_gpus(report: Report, args: Hyperparameters) -> None:
    """GPUs and whether the micro-batch fits them; on a CPU, cores."""
    if not torch.cuda.is_available():
        report.line("GPU", f"none; a CPU with {os.cpu_count()} cores",
                    None if args.track == "sample" else
                    f"track {args.track} takes days without one; try --track sample")
        return
    for index in range(torch.cuda.device_count()):
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        report.line("GPU", f"{index}: {torch.cuda.get_device_name(index)}, {total:.0f} GiB, "
                    f"{free:.0f} GiB free")
    finding = (f"about {estimate_memory(args):.0f} GiB with --device_batch_size "
               f"{args.device_batch_size} --val_batch_size {args.val_batch_size}")
    try:
        options = advise(args, free_memory())
        report.line("memory", finding + (f"; run.sh will use {options}" if options else ""))
    except RunError as error:
        report.line("memory", finding, str(error))


def check_shares(args: Hyperparameters) -> None:
    """RunError if the ranks cannot share the steps out; on GPUs, run.sh finds a micro-batch."""
    if torch.cuda.is_available():
        args = dataclasses.replace(args, device_batch_size=args.row_length)
    check_accumulation(args, int(os.environ.get("WORLD_SIZE", 1)))


def check_batch(report: Report, args: Hyperparameters) -> None:
    try:
        check_shares(args)
    except RunError as error:
        report.line("batch", f"steps of {args.describe_batch()} tokens", str(error))


def check_data(report: Report, args: Hyperparameters) -> int:
    """Shards needed, present and valid; returns the bytes still to be fetched."""
    folder, needed = data_folder(args), estimate_shards(args)
    official = args.data_path == TRACKS["single-gpu"]["data_path"]
    present, broken, missing_bytes = 0, [], 0
    train, val = find_shards(folder)
    for path in [*train, *val]:
        try:
            check_shard(path)
            present += path in train
        except ValueError as error:
            broken.append(str(error))
    problem = "; ".join(broken) or None
    if official:
        missing = max(0, needed - present) + (not val)
        missing_bytes = missing * SHARD_BYTES
        if missing and not broken:
            problem = (f"run.sh will download {missing} shards ({missing_bytes / 1e9:.1f} GB), or: "
                       f"python data/cached_fineweb10B.py {needed}")
    elif not train or not val:
        problem = f"{folder} needs *_train_*.bin and *_val_*.bin"
    wanted = f"of about {needed} " if official else ""
    report.line("data", f"{folder}: {present} {wanted}train shards, {len(val)} val", problem)
    return missing_bytes


def check_disk(report: Report, args: Hyperparameters, missing_bytes: int) -> None:
    for purpose, folder, wanted in (
        ("data", data_folder(args), missing_bytes), ("logs", Path(args.log_dir), LOG_BYTES),
    ):
        while not folder.exists():
            folder = folder.absolute().parent
        free = shutil.disk_usage(folder).free
        problem = f"{wanted / 1e9:.1f} GB are needed there" if free < wanted else None
        if not os.access(folder, os.W_OK):
            problem = f"{folder} cannot be written"
        report.line("disk", f"{free / 1e9:.0f} GB free for {purpose}", problem)


def main() -> int:
    argv = sys.argv[1:]
    if {"-h", "--help"} & {*argv}:
        print(__doc__, end="")
        return 0
    args = parse_hyperparameters([option for option in argv if option != "--advise"])
    if torch.cuda.is_available():
        args, _ = switch_off(args, torch.device("cuda", 0))
    if "--advise" in argv:
        try:
            check_shares(args)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        try:
            print(advise(args, free_memory()) if torch.cuda.is_available() else "")
        except RunError as error:  # it may fit all the same
            print(f"warning: {error}", file=sys.stderr)
        return 0
    report = Report()
    report.line("run", args.describe_run())
    check_versions(report)
    check_gpus(report, args)
    check_batch(report, args)
    check_disk(report, args, check_data(report, args))
    print("ready" if report.ready else "not ready yet: see the lines marked ->")
    return 0 if report.ready else 1


if __name__ == "__main__":
    sys.exit(main())
