"""Try many changes side by side: run a plan over all GPUs, then print the table of its logs.

    ./run.sh screen plan.txt [--seeds 2] [--per_gpu 3] [any option of train_gpt.py]

A line of the plan is a name and the options that it changes, as `no-gate: --attention_gate false`;
the first line is the control, with options or none, as `control:`. What follows a # is a comment.
Each line is run with the options of the command line and its own, with seeds from --seed on, one
GPU each. With --per_gpu 3, a GPU trains one run at a time while two more compile, and wait for
their turn before their clocks start. All of them need memory, and their warm-up takes a second or
so of the one that trains: where times matter, leave it at 1.

Logs are named after line and seed. What has a finished log is not run again, so that the same
command goes on where it was stopped. Exit status: 0 if all runs ended well, 1 if not.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from typing import NamedTuple, TextIO

from ablation import read_ablation, render
from attempt import visible_gpus
from logs import LogError, read_log

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Job(NamedTuple):
    """A run to do; `settings` are the hyper-parameters as its log will state them."""

    log: Path
    options: list[str]
    settings: dict[str, str]

    @property
    def name(self) -> str:
        return self.log.stem


def read_plan(text: str) -> dict[str, list[str]]:
    """{name: options} of each line. LogError where a line is no such thing."""
    plan = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not (line := line.split("#")[0].strip()):
            continue
        if not (match := re.fullmatch(r"([\w.-]+):((?:\s+\S+)*)", line)):
            raise LogError(f"line {number} of the plan is {line!r}, expected NAME: --option value")
        name, options = match[1], match[2].split()
        if name in plan:
            raise LogError(f"line {number} of the plan: there is a line {name!r} above already")
        plan[name] = options
    if not plan:
        raise LogError("the plan is empty; a line of it is NAME: --option value")
    return plan


def hyperparameters_of(options: list[str]):
    """train_gpt.Hyperparameters of a run here with these options; LogError says what is refused."""
    import torch

    import train_gpt

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            args = train_gpt.parse_hyperparameters(options)
    except SystemExit:
        raise LogError(refusal.getvalue().split("error: ", 1)[-1].strip()) from None
    return train_gpt.switch_off(args, device)[0]


def names_of(options: list[str]) -> set[str]:
    """The hyper-parameters that the options give, however they are spelled."""
    return {option.split("=")[0].lstrip("-").replace("-", "_")
            for option in options if option.startswith("--")}


def plan_jobs(
    plan: dict[str, list[str]], options: list[str], seeds: range, log_dir: Path
) -> list[Job]:
    """Every line once before any a second time, so that a screening cut short has seen them all.

    LogError names a line whose options train_gpt.py refuses.
    """
    lines = {f"the line {name!r} of the plan": changes for name, changes in plan.items()}
    for place, some in ({"the options": options} | lines).items():
        if ours := names_of(some) & {"seed", "run_id", "log_dir"}:
            raise LogError(f"{place}: leave out --{min(ours)}, which each run has of its own here")
    jobs = []
    for seed in seeds:
        for name, changes in plan.items():
            log = log_dir / f"{name}-seed{seed}.txt"
            argv = [*options, *changes, "--seed", str(seed), "--run_id", log.stem,
                    "--log_dir", os.path.relpath(log_dir, ROOT)]  # the log names nobody's home
            try:
                args = hyperparameters_of(argv)
            except LogError as error:
                raise LogError(f"the line {name!r} of the plan: {error}") from None
            if args.stop_at_target:
                raise LogError("runs of other lengths share no table: leave out --stop_at_target")
            settings = {key: str(value) for key, value in dataclasses.asdict(args).items()}
            jobs.append(Job(log, argv, settings))
    return jobs


def lock_plan(plan: Path, log_dir: Path) -> TextIO:
    """A file in the folder, which this makes, that keeps others from running the same plan there.

    LogError if one does.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    lock = open(log_dir / f".screening-{plan.stem}", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LogError(f"{plan} is being run in {log_dir} already; wait for it, or stop "
                       f"it") from None
    return lock


def has_finished(job: Job) -> bool:
    """Whether the job's log is there and whole. One that was cut off makes room, and is kept.

    LogError if it is that of a run with other hyper-parameters.
    """
    if not job.log.exists():
        return False
    try:
        [run] = read_log(job.log)
    except ValueError:  # several runs, or, as a LogError, none
        run = None
    if run is None or not run.is_val[-1] or run.steps[-1] != run.train_steps:
        job.log.rename(job.log.with_suffix(".cut-off"))
        return False
    given = run.hyperparameters
    if other := [key for key, value in job.settings.items() if given.get(key) != value]:
        raise LogError(f"{job.log} is that of a run with another {', '.join(other)}; "
                       f"choose another --log_dir")
    return True


def train_in_turn(lock: str, options: list[str]) -> int:
    """train_gpt.main(), which waits for the file `lock` before its clock starts."""
    import train_gpt

    start, turn = train_gpt.Clock.start, []

    def start_in_turn(clock: train_gpt.Clock) -> None:
        if not turn:
            turn.append(open(lock, "w"))
            fcntl.flock(turn[0], fcntl.LOCK_EX)  # until this process ends
        start(clock)

    train_gpt.Clock.start = start_in_turn
    sys.argv = ["train_gpt.py", *options]
    return train_gpt.main()


class Screening:
    """Runs jobs, in order, on as many GPUs as call `work`."""

    def __init__(self, jobs: list[Job]):
        self.queue: Queue[Job] = Queue()
        self.running: set[subprocess.Popen] = set()
        self.stopped = threading.Event()
        for job in jobs:
            self.queue.put(job)

    def work(self, gpu: str) -> None:
        while not self.stopped.is_set():
            try:
                job = self.queue.get_nowait()
            except Empty:
                return
            self.run(job, gpu)

    def run(self, job: Job, gpu: str) -> None:
        lock = job.log.with_name(f".turn-{gpu or 'cpu'}")
        console = job.log.with_suffix(".console")
        with open(console, "w") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, "--train-in-turn", str(lock), *job.options], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}))
        self.running.add(process)
        if self.stopped.is_set():
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        if status == 0:
            [run] = read_log(job.log)
            print(f"{job.name}: val_loss {run.final_loss:.5f}, train_time {run.train_time:.1f} s",
                  flush=True)
        else:
            print(f"{job.name}: ended with exit status {status}; see {console}", flush=True)

    def stop(self) -> None:
        self.stopped.set()
        for process in list(self.running):
            process.terminate()


def run_all(
    jobs: list[Job], plan: Path, log_dir: Path, per_gpu: int, others: list[Job] | None = None
) -> list[Job]:
    """Run those jobs of the plan that have no finished log, and return those that have one then.

    Also returns those of the `others`, which are not run, that have one. LogError if a log is of
    another run, or the plan is being run in the folder already.
    """
    lock = lock_plan(plan, log_dir)
    missing = [job for job in jobs if not has_finished(job)]
    slots = (visible_gpus() or [""]) * per_gpu
    screening = Screening(missing)

    def stop(signum, frame):
        screening.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done, {len(slots)} at a time; "
          f"logs in {log_dir}", flush=True)
    with ThreadPoolExecutor(len(slots)) as pool:
        workers = [pool.submit(screening.work, gpu) for gpu in slots]
    for worker in workers:
        worker.result()
    done = [job for job in [*jobs, *(others or [])] if has_finished(job)]
    lock.close()
    return done


def add_run_options(parser: argparse.ArgumentParser, log_dir: str) -> None:
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each line")
    parser.add_argument("--seed", type=int, default=1337, help="of the first run (default: 1337)")
    parser.add_argument("--per_gpu", type=int, default=1, metavar="N",
                        help="runs on a GPU, of which one trains (default: 1)")
    parser.add_argument("--log_dir", type=Path, help=f"default: {log_dir}")


def parse_run_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """What the command line says, with `seeds` as a range, and the options of train_gpt.py."""
    args, options = parser.parse_known_args()
    if args.seeds < 1 or args.per_gpu < 1:
        parser.error("--seeds and --per_gpu must be at least 1")
    args.seeds = range(args.seed, args.seed + args.seeds)
    return args, options


def run_command(main: Callable[[], int]) -> int:
    """The exit status of main(); 1 after an error for a person, 130 after Ctrl-C, which it says."""
    try:
        return main()
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh screen", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options go to train_gpt.py.")
    parser.add_argument("plan", type=Path, help="file of lines NAME: --option value ...")
    add_run_options(parser, "logs/NAME OF THE PLAN")
    args, options = parse_run_options(parser)
    if not args.plan.exists():
        parser.error(f"there is no plan {args.plan}; it comes first, as in: ./run.sh screen "
                     f"plan.txt --option value")
    log_dir = (args.log_dir or ROOT / "logs" / args.plan.stem).resolve()
    plan = read_plan(args.plan.read_text(encoding="utf-8"))
    jobs = plan_jobs(plan, options, args.seeds, log_dir)
    done = run_all(jobs, args.plan, log_dir, args.per_gpu)
    if not done:
        print("no table: not one run has ended well", file=sys.stderr)
        return 1
    try:
        control = f"{next(iter(plan))}-seed{args.seed}"
        print(f"\n{render(read_ablation([job.log for job in done], control))}", end="")
    except LogError as error:
        print(f"no table: {error}", file=sys.stderr)
    return 0 if len(done) == len(jobs) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train-in-turn"]:
        sys.exit(train_in_turn(sys.argv[2], sys.argv[3:]))
    sys.exit(run_command(main))
