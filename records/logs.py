"""Reading the logs of speedruns: ours, the public ones of the same family, and llm.c's.

    step:125/1500 val_loss:4.5123 train_time:98123ms step_avg:784.98ms     ours, modded-nanogpt
    step:126/1500 train_time:98.907s step_avg:0.785s                       times in seconds
    s:250 tel:6.1733                                                       llm.c
"""

import lzma
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

SUFFIXES = (".txt", ".log")
ARCHIVE = ".tar.xz"  # many logs of one script take a hundredth of the room there
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
SEPARATOR = re.compile(r"^={50,}[ \t]*$", re.MULTILINE)
LOOKS_LIKE_SOURCE = re.compile(r"^(import|from|def|class) ", re.MULTILINE)
LLM_C_LINE = re.compile(r"^s:(\d+) tel:(\S+)", re.MULTILINE)
RESUMED, STEP = re.compile(r"resumed: step (\d+) of "), re.compile(r"step:(\d+)/")
PLAIN_FIELD = re.compile(r" ([a-z_]+):\d+(?:\.(\d+))?([a-z%]*)")
ONLY_DIGITS = bytes(code if chr(code).isdigit() else ord(" ") for code in range(128)) + b" " * 128
SECONDS = {"ms": 1e-3, "s": 1.0}
KERNELS_MARK = "\n# file: triton_kernels.py\n"


class LogError(ValueError):
    """A file that is no log; the message is for a person."""


class Shard(NamedTuple):
    kind: str  # train or val
    name: str
    num_bytes: int
    sha256: str


@dataclass
class Run:
    """One training run of a log. Arrays have an entry per step line; times are in seconds.

    What the log does not say is NaN in `times` and `step_avgs`, and None elsewhere.
    """

    path: Path
    trial: int  # counts the runs of one file, from 1
    source: str | None  # the script and its kernels, if the log starts with them
    notes: str  # all lines outside of the source that are not step lines
    train_steps: int | None
    steps: np.ndarray
    losses: np.ndarray  # val_loss; NaN on a line without one
    times: np.ndarray
    step_avgs: np.ndarray
    is_val: np.ndarray
    damaged: list[str] = field(default_factory=list)  # step lines that cannot be read

    @property
    def name(self) -> str:
        return self.path.name if self.trial == 1 else f"{self.path.name} trial {self.trial}"

    @property
    def final_loss(self) -> float:
        """val_loss of the last validation; NaN without one."""
        losses = self.losses[self.is_val]
        return float(losses[-1]) if len(losses) else float("nan")

    @property
    def train_time(self) -> float:
        """Seconds on the clock at the last line; NaN if the log has no times."""
        return float(self.times[-1])

    @property
    def steady_time(self) -> float:
        """Seconds that it takes if the steps of each stage are as long as their median.

        So what disturbed some steps, as another run that compiled on the same GPU, does not count.
        It is `train_time` if the log does not have a time for each step.
        """
        steps, ends = self.steps[~self.is_val], self.times[~self.is_val]
        if len(steps) != self.train_steps:
            return self.train_time
        stages, times, total = len(self.batch_sizes or [0]), np.append(0.0, ends), 0.0
        for i in range(stages):
            count = int(np.sum((steps - 1) * stages // self.train_steps == i))
            several = max(1, min(8, count // 10))  # a log's times are rounded to milliseconds
            stage, times = times[: count + 1], times[count:]
            if count:
                total += count * float(np.median(stage[several:] - stage[:-several])) / several
        return total

    @property
    def val_curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, times and losses of the validations."""
        return self.steps[self.is_val], self.times[self.is_val], self.losses[self.is_val]

    @cached_property
    def hyperparameters(self) -> dict[str, str]:
        return dict(re.findall(r"^hyperparameter (\w+): (.*)$", self.notes, re.MULTILINE))

    def number(self, name: str) -> int | None:
        """A whole-number hyper-parameter that the log states, or that stands in its source."""
        if name in self.hyperparameters:
            text = self.hyperparameters[name]
            return int(text) if re.fullmatch(r"\d+", text, re.ASCII) else None
        pattern = rf"^\s*{name}\s*(?::\s*int)?\s*=\s*(\d[\d_]*(?:\s*\*\s*\d[\d_]*)*)\s*(?:#.*)?$"
        found = re.search(pattern, self.source or "", re.MULTILINE)
        if not found:
            return None
        return int(np.prod([int(factor) for factor in found[1].split("*")], dtype=np.int64))

    def fact(self, pattern: str) -> str | None:
        """The first group of the first match in the notes."""
        found = re.search(pattern, self.notes, re.MULTILINE)
        return found[1].strip() if found else None

    def lines(self, pattern: str) -> list[str]:
        """The lines of the notes that begin with the pattern."""
        return re.findall(rf"^(?:{pattern}).*$", self.notes, re.MULTILINE)

    @cached_property
    def shards(self) -> list[Shard]:
        lines = re.findall(r"^(train|val) data: (.*) (\d+) bytes sha256 ([0-9a-f]{64})$",
                           self.notes, re.MULTILINE)
        return [Shard(kind, re.split(r"[/\\]", path)[-1], int(size), sha256)
                for kind, path, size, sha256 in lines]

    @property
    def seed(self) -> str | None:
        return self.hyperparameters.get("seed")

    @cached_property
    def batch_sizes(self) -> list[int] | None:
        """Tokens per step in stages of equally many steps; nearly always there is one stage.

        None if they are unknown, or were others before the run was resumed.
        """
        if self.lines("resumed, although (?:train_steps|batch_size|batch_stages) is "):
            return None
        stages = self.hyperparameters.get("batch_stages")
        if stages and re.fullmatch(r"\d+(,\d+)*", stages):
            return [int(size) for size in stages.split(",")]
        size = self.number("batch_size") if self.hyperparameters else None
        return None if size is None else [size]

    def tokens_at(self, step: float) -> float | None:
        """Tokens trained on until `step`, which may lie between two."""
        if self.batch_sizes is None or self.train_steps is None:
            return None
        edges = [math.ceil(i * self.train_steps / len(self.batch_sizes))
                 for i in range(len(self.batch_sizes))] + [math.inf]
        return sum(size * max(0, min(step, end) - start) for size, start, end
                   in zip(self.batch_sizes, edges, edges[1:], strict=False))

    @property
    def train_tokens(self) -> int | None:
        return None if self.train_steps is None else self.tokens_at(self.train_steps)

    @property
    def world_size(self) -> int | None:
        ranks = self.fact(r"^tokens per step: .* = (\d+) ranks")
        return int(ranks) if ranks else None

    @property
    def hardware(self) -> str | None:
        """The GPU's name, or the kind of CPU."""
        return (self.fact(r"^GPU: (.*)$") or self.fact(r"^(CPU: .*)$")
                or self.fact(r"^\|\s+\d+\s+(NVIDIA .*?)\s{2,}(?:On|Off)\s"))

    @property
    def torch(self) -> str | None:
        return self.fact(r"\b(?i:(?:py)?torch)(?:\s|: ?)(\d+\.\d+[^\s,]*)")

    @property
    def cuda(self) -> str | None:
        return self.fact(r"\bCUDA (\w[\w.]*)")


def find_logs(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, and the logs in the folders named, in order. LogError if there are none.

    Of a folder without logs it is the archives of logs.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            logs = (sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
                    or sorted(path.glob(f"*{ARCHIVE}")))
            if not logs:
                kinds = " or ".join(f"*{suffix}" for suffix in (*SUFFIXES, ARCHIVE))
                raise LogError(f"{path} holds no logs ({kinds})")
            found += logs
        elif path.is_file():
            found.append(path)
        else:
            raise LogError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def source_files(source: str) -> dict[str, str]:
    """{name: text} of the files that a log begins with: train_gpt.py, and after a mark kernels."""
    # At the last mark, so that nothing can hide between two of them.
    script, mark, kernels = source.rpartition(KERNELS_MARK)
    return {"train_gpt.py": script, "triton_kernels.py": kernels} if mark else {
        "train_gpt.py": source}


def read_logs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs in these files and folders. LogError if one of the files holds none."""
    return [run for path in find_logs(paths) for run in read_log(path)]


def read_log(path: str | Path) -> list[Run]:
    """The runs of one log, or of all the logs in an archive. LogError if there are none."""
    path = Path(path)
    try:
        if not path.name.endswith(ARCHIVE):
            return _read_text(path, path.read_bytes())
        with tarfile.open(path) as archive:
            logs = sorted((path / file.name, archive.extractfile(file).read()) for file in archive
                          if file.isfile() and Path(file.name).suffix in SUFFIXES)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise LogError(f"{path} cannot be read: {getattr(error, 'strerror', 0) or error}") from None
    if not logs:
        raise LogError(f"{path} holds no logs")
    return [run for log in logs for run in _read_text(*log)]


def _read_text(path: Path, content: bytes) -> list[Run]:
    text = content.decode("utf-8", "replace").removeprefix("\ufeff")
    if "\x1b" in text:
        text = ANSI.sub("", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    source, parts = None, [text]
    separator = SEPARATOR.search(text)
    if separator and LOOKS_LIKE_SOURCE.search(text[: separator.start()]):
        source = text[: separator.start()]
        # Several parts, if logs of one script were joined to one file.
        parts = text.split(text[: separator.end()])[1:]
    runs = [run for part in parts for run in _read_runs(path, source, part)]
    if not runs:
        raise LogError(f"{path} holds no run: no line like 'step:125/1500 val_loss:4.5123 "
                       f"train_time:98123ms step_avg:784.98ms', and none like 's:250 tel:6.1733'")
    for trial, run in enumerate(runs, start=1):
        run.trial = trial
    return runs


def _read_runs(path: Path, source: str | None, text: str) -> Iterator[Run]:
    """The runs under one header. A new one starts where the steps start again, or are to be
    another number; but one that was resumed is one run, without what it did twice."""
    lines = text.split("\n")
    if is_resumed := "\nresumed: step " in text:
        lines = _without_repeats(lines)
    notes = "\n".join([line for line in lines if line and not line.startswith("step:")])
    rows, damaged = _read_steps([line for line in lines if line.startswith("step:")])
    if not len(rows):
        rows = np.array([(int(step), np.nan, _number(loss), np.nan, np.nan, 1)
                         for step, loss in LLM_C_LINE.findall(notes)]).reshape(-1, 6)
    if is_resumed and len(rows):
        rows[:, 1] = rows[-1, 1]  # it may have gone on to more steps
    new = (np.diff(rows[:, 0]) < 0) | (np.diff(np.nan_to_num(rows[:, 1], nan=-1)) != 0)
    for part in np.split(rows, np.flatnonzero(new) + 1) if len(rows) else []:
        train_steps = None if np.isnan(part[0, 1]) else int(part[0, 1])
        yield Run(Path(path), 1, source, notes, train_steps, part[:, 0].astype(int), part[:, 2],
                  part[:, 3], part[:, 4], part[:, 5].astype(bool), damaged)
        damaged = []


def _without_repeats(lines: list[str]) -> list[str]:
    """The lines of a run that was resumed, without those of steps that it did again."""
    kept = []
    for line in lines:
        if resumed := RESUMED.match(line):
            kept = [old for old in kept if not (place := STEP.match(old))
                    or int(place[1]) <= int(resumed[1])]
        kept.append(line)
    return kept


def _read_steps(lines: list[str]) -> tuple[np.ndarray, list[str]]:
    """A row (step, train_steps, val_loss, time, step_avg, is_val) for each line that can be read,
    in order, and the lines that cannot."""
    rows, damaged = np.full((len(lines), 6), np.nan), []
    is_plain = np.array(["val_loss:" not in line and ":nan" not in line for line in lines], bool)
    plain = _read_plain([line for line, chosen in zip(lines, is_plain, strict=True) if chosen])
    if plain is None:
        is_plain[:] = False
    else:
        rows[is_plain] = plain
    for index in np.flatnonzero(~is_plain):
        row = _read_step(lines[index])
        if row is None:
            damaged.append(lines[index])
        else:
            rows[index] = row
    return rows[~np.isnan(rows[:, 0])], damaged


def _read_plain(lines: list[str]) -> np.ndarray | None:
    """The rows of lines that all have one form, which numpy can read in one go.

    None if they do not; but nearly all lines of nearly all logs do, and thousands of logs are read
    in seconds because of it.
    """
    fields = PLAIN_FIELD.findall(lines[0]) if lines else []
    units = {name: unit for name, _, unit in fields if name in ("train_time", "step_avg")}
    if "train_time" not in units or not set(units.values()) <= set(SECONDS):
        return None
    form = "".join(rf" {name}:\d++" + rf"\.\d{{{len(decimals)}}}" * bool(decimals) + unit
                   for name, decimals, unit in fields)
    text = "\n".join(lines) + "\n"
    if not re.fullmatch(rf"(?:step:\d++/\d++{form}\n)*+", text, re.ASCII):
        return None
    digits = text.encode().translate(ONLY_DIGITS, delete=b".")
    numbers = np.fromstring(digits, dtype=np.int64, sep=" ").reshape(len(lines), -1)
    rows = np.full((len(lines), 6), np.nan)
    rows[:, :2], rows[:, 5] = numbers[:, :2], 0
    for column, (name, decimals, unit) in enumerate(fields, start=2):
        if name in units:
            # In this order it is the very number that float() and _read_step would give.
            rows[:, 3 if name == "train_time" else 4] = (
                numbers[:, column] / 10 ** len(decimals) * SECONDS[unit])
    return rows


def _read_step(line: str) -> tuple | None:
    """The row of one line, whatever the order and number of its fields; None if it is damaged."""
    fields = dict(re.findall(r"(\w+): ?(\S+)", line))
    place = re.fullmatch(r"(\d+)/(\d+)", fields.get("step", ""))
    times = [re.fullmatch(r"(\d+\.?\d*|nan)(ms|s)", fields.get(name, "nans"))
             for name in ("train_time", "step_avg")]
    try:
        val_loss = float(fields.get("val_loss", "nan"))
        time, step_avg = (float(found[1]) * SECONDS[found[2]] for found in times)
    except (ValueError, TypeError):
        return None
    if place is None or "train_time" not in fields:
        return None
    return int(place[1]), int(place[2]), val_loss, time, step_avg, "val_loss" in fields


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
