"""Attempt a record: train n times with different seeds, check, compare, and offer the folder.

    ./run.sh attempt -n 4 [--parallel] [--name Name --description "..." --by "First Last"]
        [any option of train_gpt.py]

The runs are `./run.sh` with the given options and seeds from --seed on (default 1337), one after
the other, or with --parallel side by side, one on each GPU. Their logs are checked as
records/check.py does, and compared with the newest baseline log of this machine, if there is one.
With --name, or where a person answers at a terminal, the record folder is made. On time-to-gpt2,
which is claimed by CORE, each run saves its end (--save_every -1, unless you say otherwise), and
the commands are told that measure the scores; the folder has to wait for them.

Exit status: 0 if all runs ended and are a record, or lack nothing but their CORE scores to be
checked as one; 1 if not; 130 after Ctrl-C.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from check import TRACKS, Report, check, core_command, describe_report
from compare import compare, describe_comparison
from logs import LogError, Run, find_logs, read_log
from record import RecordError, make_folder

ROOT = Path(__file__).resolve().parents[1]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by what CUDA_VISIBLE_DEVICES calls them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(index) for index in range(count)]


def run_all(
    seeds: list[int], options: list[str], log_dir: Path, name: str, gpus: list[str]
) -> list[Path]:
    """Train with each seed; the logs of the runs that ended well, in the order of the seeds.

    One after the other, or, with a list of GPUs, as many side by side; then each run sees one GPU
    only and prints to a file beside its log.
    """
    free: Queue[str | None] = Queue()
    for gpu in gpus or [None]:
        free.put(gpu)

    def run(seed: int) -> Path | None:
        gpu, run_id = free.get(), f"{name}-seed{seed}"
        command = ["./run.sh", "train", *options, "--seed", str(seed), "--run_id", run_id,
                   "--log_dir", os.path.relpath(log_dir, ROOT)]  # the log names nobody's home
        try:
            if gpu is None:
                print(f"--- seed {seed}: {' '.join(command)}", flush=True)
                done = subprocess.run(command, cwd=ROOT)
            else:
                console = log_dir / f"{run_id}.console"
                print(f"--- seed {seed} on GPU {gpu}, printing to {console}", flush=True)
                log_dir.mkdir(parents=True, exist_ok=True)
                with open(console, "w") as file:
                    done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file,
                                          stdin=subprocess.DEVNULL,
                                          env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu})
        finally:
            free.put(gpu)
        if done.returncode:
            print(f"error: seed {seed} ended with exit status {done.returncode}", file=sys.stderr)
            return None
        return log_dir / f"{run_id}.txt"

    with ThreadPoolExecutor(free.qsize()) as pool:
        runs = [pool.submit(run, seed) for seed in seeds]
        try:
            return [log for log in (done.result() for done in runs) if log is not None]
        except KeyboardInterrupt:  # which the run under way has got as well
            pool.shutdown(cancel_futures=True)
            raise


def newest_baseline(log_dir: Path, mine: list[Run]) -> Run | None:
    """The newest finished baseline run in the log folder, on the hardware of `mine`."""
    def is_baseline(run: Run) -> bool:
        return (run.hyperparameters.get("recipe", "").endswith("baseline")
                and run.hardware == mine[0].hardware and run.steps[-1] == run.train_steps
                and run.hyperparameters.get("track") == mine[0].hyperparameters.get("track"))

    for path in sorted(find_logs([log_dir]), key=lambda path: -path.stat().st_mtime):
        try:
            found = [run for run in read_log(path) if is_baseline(run)]
        except LogError:
            continue
        if found and path not in {run.path for run in mine}:
            return found[-1]
    return None


def print_comparison(log_dir: Path, mine: list[Run]) -> None:
    baseline = newest_baseline(log_dir, mine)
    if baseline is None:
        print(f"no baseline log of this machine in {log_dir} to compare with; ./run.sh baseline "
              f"makes one")
        return
    try:
        print("compared with the baseline on this machine:\n"
              + describe_comparison([baseline], mine, compare([baseline], mine)))
    except LogError as error:
        print(f"not compared with {baseline.path}: {error}")


def folder_command(runs: list[Run], args: argparse.Namespace) -> str:
    """What makes the record folder of the runs, with placeholders for what nobody has named."""
    logs = [str(run.path) for run in runs]
    by = [word for name in args.by or ["YOUR NAME"] for word in ("--by", name)]
    return shlex.join(["python", "records/record.py", *logs, "--name", args.name or "NAME",
                       "--description", args.description or "THE IDEA IN A LINE", *by,
                       "--attempted", str(args.n)])


def offer_folder(report: Report, args: argparse.Namespace) -> None:
    """Make the record folder if it was asked for, or is when asked; else say how."""
    if not report.is_sound and args.name is None:
        print("the logs prove nothing on this track, so that they have no record folder: see above "
              "what fails")
        return
    if report.lacks_core:
        commands = "\n".join(core_command(run) for run in report.runs)
        print(f"CORE decides whether it is a record; measure it before you make a folder:\n"
              f"{commands}\n{folder_command(report.runs, args)}")
        return
    negative = bool(report.track.claim) and not report.is_record
    if negative:
        print("not a record; if there is something to learn from it, it has a home in "
              "records/negative")
    if sys.stdin.isatty():
        try:
            if args.name is None:
                args.name = input("name of the record folder, as in WiderHead (empty: "
                                  "none): ").strip()
            if args.name:
                args.description = args.description or input("the idea, in a line: ").strip()
                args.by = args.by or [input("your name: ").strip()]
        except (EOFError, KeyboardInterrupt):
            print()
            args.name = None
    if not args.name:
        print(f"to make the folder: {folder_command(report.runs, args)}"
              + " --negative" * negative)
        return
    folder = make_folder(report, args.name, args.description or args.name, args.by or ["(unnamed)"],
                         runs_attempted=args.n, negative=negative)
    print(f"made {folder}\nnow tell the idea in its README.md, and run: python records/table.py")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh attempt", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Other options go to train_gpt.py.")
    parser.add_argument("-n", type=int, default=4, metavar="N", help="runs (default: 4)")
    parser.add_argument("--parallel", action="store_true", help="side by side, one on each GPU")
    parser.add_argument("--seed", type=int, default=1337, help="of the first run (default: 1337)")
    parser.add_argument("--track", help="default: as ./run.sh chooses it")
    parser.add_argument("--log_dir", type=Path, default=ROOT / "logs", help="folder of the logs")
    parser.add_argument("--run_id", default=time.strftime("%Y%m%d-%H%M%S-attempt"),
                        help="what the logs' names begin with")
    parser.add_argument("--name", help="make the record folder, of this name, as in WiderHead")
    parser.add_argument("--description", help="the idea, in a line for the table")
    parser.add_argument("--by", action="append", metavar="NAME", help="a contributor")
    args, options = parser.parse_known_args()
    if args.n < 1:
        parser.error(f"-n must be at least 1, got {args.n}")
    gpus = visible_gpus() if args.parallel else []
    if args.parallel and not gpus:
        parser.error("--parallel needs GPUs, one for each run at a time; there is none here")

    if args.track:
        options += ["--track", args.track]
    if args.track in TRACKS and TRACKS[args.track].core is not None:
        options = ["--save_every", "-1", *options]  # of an option given twice the last counts
    args.log_dir = args.log_dir.resolve()
    seeds = list(range(args.seed, args.seed + args.n))
    try:
        logs = run_all(seeds, options, args.log_dir, args.run_id, gpus)
    except KeyboardInterrupt:
        logs = (args.log_dir / f"{args.run_id}-seed{seed}.txt" for seed in seeds)
        found = " ".join(str(log) for log in logs if log.exists())
        print(f"stopped; logs so far: {found or 'none'}", file=sys.stderr)
        return 130
    if not logs:
        print("error: no run ended well, there is nothing to check", file=sys.stderr)
        return 1
    try:
        runs = [run for log in logs for run in read_log(log)]
        report = check(runs)
        print(f"\n{describe_report(report)}\n")
        print_comparison(args.log_dir, runs)
        print()
        offer_folder(report, args)
    except (LogError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if (report.is_record or report.lacks_core) and len(logs) == args.n else 1


if __name__ == "__main__":
    sys.exit(main())
