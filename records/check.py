"""Is it a record? Read logs, check them rule by rule, and say so.

    python records/check.py logs/*.txt
    python records/check.py --track gpt2-small a-public-log.txt
    python records/check.py --json records/single-gpu/2026-11-21_Name

A folder stands for the logs in it. Each rule ends in "pass", "fail" or "cannot tell" with its
reason; records/RULES.md explains them. The CORE score, by which time-to-gpt2 is claimed, is the one
that evals/core.py wrote beside the log: for logs/RUN.txt into logs/RUN.core.json. Exit status: 0 if
the verdict is a record, 1 if it is not, 2 if there is nothing to check. Needs the standard library
and numpy.
"""

import argparse
import ast
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from logs import KERNELS_MARK, LogError, Run, read_logs, source_files
from significance import below_target, sample_std

PASS, FAIL, CANNOT_TELL = "pass", "fail", "cannot tell"
MAX_P = 0.01
MAX_VALIDATION = 0.5  # steps; on single-gpu, a validation on the clock would take about 0.9

# Standard deviation of final losses, for the z-test of one or two runs. Public calibrations of
# speedruns at full length gave 0.0013 and 0.0019; this is the larger.
SIGMA = 0.0019
# The sample track's runs are short and scatter more: by 0.0108 over 8 seeds, in records/sample.
# This is the upper end of the 95% interval of that.
SAMPLE_SIGMA = 0.022

SHARD_HASHES = json.loads((Path(__file__).parent / "data_hashes.json").read_text())
FINEWEB_SHARD_BYTES = 200_001_024  # 100M tokens
# Environment variables that set flags of the compiler. Where it caches, and how many processes it
# compiles in, change nothing in what comes out.
FORBIDDEN_VARIABLE = r"TORCH(INDUCTOR|DYNAMO|_COMPILE)_(?!(CACHE_DIR|COMPILE_THREADS)\b)"
NOT_SETTINGS = {"seed", "run_id", "log_dir", "log_every", "log_wandb", "wandb_project",
                "wandb_name"}  # hyper-parameters in which the runs of one record may differ


class Track(NamedTuple):
    """What a record has to hold; None: anything goes."""

    target: float | None  # nats per token
    val_tokens: int | None
    token_budget: int  # training tokens at most
    world_size: int | None  # GPUs
    data: str  # shards are called {data}_train_000001.bin and so on
    sigma: float
    core: float | None = None  # the CORE score that a record is above

    @property
    def claim(self) -> str | None:
        """What its records show; None: the track is for measurements, and has no records."""
        if self.core is not None:
            return f"CORE above {self.core}"
        return None if self.target is None else f"val_loss at most {self.target}"


TRACKS = {
    "single-gpu": Track(3.3821, 1_048_576, 5_000_000_000, 1, "fineweb", SIGMA),
    "gpt2-small": Track(3.28, 10_485_760, 10_000_000_000, None, "fineweb", SIGMA),
    "gpt2-medium": Track(2.92, 10_485_760, 10_000_000_000, None, "fineweb", SIGMA),
    # The score of GPT-2 with 1.6B parameters, by nanochat's evaluation.
    "time-to-gpt2": Track(None, 10_485_760, 20_000_000_000, None, "fineweb", SIGMA, core=0.256525),
    "sample": Track(7.2, 16_384, 2_000_000, None, "sample", SAMPLE_SIGMA),
    # Our own measurements on text that is not FineWeb. It has no target, hence no records.
    "webmix": Track(None, None, 5_000_000_000, None, "webmix", SIGMA),
}


class Finding(NamedTuple):
    status: str
    reason: str


def worst(problems: dict[str, str], otherwise: Finding) -> Finding:
    """A failure that names the first runs with a problem ({run's name: problem}), if any."""
    if not problems:
        return otherwise
    shown = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:3])
    more = f"; and {len(problems) - 3} more runs" if len(problems) > 3 else ""
    return Finding(FAIL, shown + more)


def compare_values(runs: list[Run], values: list, what: str) -> Finding:
    """Whether the values, one of each run, are known and equal."""
    counts = Counter(value for value in values if value is not None)
    if len(counts) > 1:
        found = ", ".join(f"{value} in {count}" for value, count in counts.most_common(4))
        return Finding(FAIL, f"{what} differs between the logs: {found}")
    if None in values:
        return Finding(CANNOT_TELL, f"{runs[values.index(None)].name} does not say its {what}")
    return Finding(PASS, f"{what}: {values[0]}")


# -----------------------------------------------------------------------------
# The rules: each takes (runs, track, the train_gpt.py beside the logs or None)


def is_complete(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Every run goes from its first step to its last, and ends with a validation."""
    problems, unknown = {}, None
    for run in runs:
        stopped = run.lines("error:|stopped by")
        if run.damaged:
            problems[run.name] = f"a line cannot be read: {run.damaged[0][:60]!r}"
        elif stopped:
            problems[run.name] = stopped[0][:100]
        elif run.steps[0] > 1:
            problems[run.name] = f"its first line is of step {run.steps[0]}"
        elif not run.is_val.any():
            problems[run.name] = "it has no validation"
        elif run.train_steps is None:
            unknown = f"{run.name} does not say how many steps were planned"
        elif not run.is_val[-1] or run.steps[-1] != run.train_steps:
            problems[run.name] = (f"it ends at step {run.steps[-1]} of {run.train_steps}"
                                  f"{'' if run.is_val[-1] else ', without a validation'}")
    if unknown and not problems:
        return Finding(CANNOT_TELL, unknown)
    return worst(problems, Finding(PASS, "all runs go from their first step to their last, and "
                                         "end with a validation"))


def is_finite(runs: list[Run], track: Track, script: str | None) -> Finding:
    """No loss is NaN or infinite."""
    problems = {run.name: f"val_loss {loss} at step {step}" for run in runs
                for step, _, loss in zip(*run.val_curve, strict=True) if not math.isfinite(loss)}
    return worst(problems, Finding(PASS, "all losses are numbers"))


def core_file(run: Run) -> Path:
    """Where evals/report.py too looks for what evals/core.py has written."""
    return run.path.with_suffix(".core.json")


def core_command(run: Run) -> str:
    """What measures the CORE score of a run that has saved its end."""
    return shlex.join(["python", "evals/core.py", str(run.path.with_suffix("")), "--json",
                       str(core_file(run))])


def read_core(run: Run) -> tuple[float, Finding]:
    """The CORE score of the run's end, or NaN and why it is not known."""
    path, wanted, problem = core_file(run), (run.path.stem, int(run.steps[-1])), ""
    if run.trial > 1:
        return math.nan, Finding(CANNOT_TELL, f"{run.path.name} holds several runs, and a CORE "
                                              f"score is of one: give each a log of its own")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found, is_core, score = (result["run"], result["step"]), result["is_core"], result["mean"]
        if found != wanted:
            problem = "{} is of run {}, step {}, not of run {}, step {}".format(
                path.name, *found, *wanted)
        elif is_core is not True:
            problem = f"{path.name} is only a part of CORE"
        elif isinstance(score, bool) or not score <= 1 or not math.isfinite(score):
            problem = f"{path.name} has a mean of {score}, which is no score"
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{run.name} has no CORE score"
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        problem = f"{path.name} is not as evals/core.py writes it ({type(error).__name__}: {error})"
    if problem:
        return math.nan, Finding(CANNOT_TELL, f"{problem}: measure it with `{core_command(run)}`")
    return score, Finding(PASS, "")


def reaches_target(runs: list[Run], track: Track, script: str | None) -> Finding:
    """The mean of the final losses is at or under the target, that of CORE scores above it."""
    losses = [run.final_loss for run in runs]
    mean = fmean(losses)
    spread = f", sample standard deviation {sample_std(losses):.5f}" if len(losses) > 1 else ""
    facts = f"n {len(losses)}, mean val_loss {mean:.5f}{spread}"
    if track.core is not None:
        scores, findings = zip(*map(read_core, runs), strict=True)
        if unknown := [finding for finding in findings if finding.status != PASS]:
            return unknown[0]
        return Finding(PASS if fmean(scores) > track.core else FAIL,
                       f"{facts}; mean CORE {fmean(scores):.6f}; needed: above {track.core}")
    if track.target is None:
        return Finding(PASS, f"{facts}; the track has no target")
    return Finding(PASS if mean <= track.target else FAIL, f"{facts}; target {track.target}")


def is_significant(runs: list[Run], track: Track, script: str | None) -> Finding:
    """It is unlikely (p < 0.01) that the true mean is not below the target."""
    if track.target is None:
        return Finding(PASS, "the track has no target for val_loss, there is nothing to test")
    losses = [run.final_loss for run in runs]
    p, test = below_target(losses, track.target, track.sigma)
    return Finding(PASS if p < MAX_P else FAIL,
                   f"p {p:.3g} that the true mean is not below {track.target}: one-sided {test}, "
                   f"n {len(losses)}; needed: below {MAX_P}")


def is_independent(runs: list[Run], track: Track, script: str | None) -> Finding:
    """No run counts twice."""
    if len(runs) == 1:
        return Finding(PASS, "one run")
    curves: dict[tuple, str] = {}
    for run in runs:
        curve = tuple(run.losses[run.is_val])
        if curve in curves:
            return Finding(FAIL, f"{run.name} and {curves[curve]} have the same losses")
        curves[curve] = run.name
    seeds = Counter(run.seed for run in runs)
    if None in seeds:
        return Finding(PASS, "all runs have other losses; some do not say their seed")
    seed, count = seeds.most_common(1)[0]
    if count > 1:
        return Finding(FAIL, f"seed {seed} was used {count} times")
    return Finding(PASS, "all runs have other seeds and other losses")


def has_same_settings(runs: list[Run], track: Track, script: str | None) -> Finding:
    """All runs have the same length and the same hyper-parameters."""
    steps = compare_values(runs, [run.train_steps for run in runs], "train_steps")
    if steps.status == FAIL:
        return steps
    first = runs[0].hyperparameters
    for run in runs:
        for name in sorted(first.keys() | run.hyperparameters.keys()):
            ours, others = first.get(name), run.hyperparameters.get(name)
            if name not in NOT_SETTINGS and ours != others:
                return Finding(FAIL, f"{name} is {ours} in {runs[0].name} and {others} in "
                                     f"{run.name}")
    if not first:
        return Finding(CANNOT_TELL, "the logs do not list their hyper-parameters")
    return Finding(PASS, f"{len(first)} hyper-parameters are the same in all runs, but for seeds "
                         f"and names")


def has_times(runs: list[Run], track: Track, script: str | None) -> Finding:
    """There is a training time to rank by."""
    times = [run.train_time for run in runs]
    if any(map(math.isnan, times)):
        name = next(run.name for run in runs if math.isnan(run.train_time))
        return Finding(CANNOT_TELL, f"{name} has no train_time")
    spread = f", standard deviation {sample_std(times):.3f} s" if len(times) > 1 else ""
    return Finding(PASS, f"mean {fmean(times):.3f} s{spread}, fastest {min(times):.3f} s, "
                         f"slowest {max(times):.3f} s")


def last_digit(times: np.ndarray) -> float:
    """The value of the last digit that these times are written with, at most 0.001 s."""
    for digits in range(3, 9):
        scaled = times[~np.isnan(times)] * 10.0**digits
        if np.allclose(scaled, scaled.round(), rtol=0, atol=1e-3):
            break
    return 10.0**-digits


def has_sane_clock(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Steps and times rise, and step_avg times the steps is train_time."""
    problems, unknown = {}, None
    for run in runs:
        if np.isnan(run.times).any():
            unknown = f"{run.name} has no train_time on some lines"
            continue
        plain = run.steps[~run.is_val]
        repeated = np.flatnonzero(np.diff(plain) <= 0)
        back = np.flatnonzero(np.diff(run.times) < 0)
        # Both are rounded; allow for two of their last digits.
        expected = run.step_avgs * np.maximum(run.steps, 1)
        allowed = 2 * (last_digit(run.times) + last_digit(run.step_avgs) * run.steps)
        off = np.flatnonzero(np.abs(expected - run.times) > allowed)
        if len(repeated):
            problems[run.name] = f"step {plain[repeated[0] + 1]} stands there twice"
        elif len(back):
            problems[run.name] = f"the time goes back at step {run.steps[back[0] + 1]}"
        elif len(off):
            worst_line = off[np.argmax(np.abs(expected - run.times)[off])]
            problems[run.name] = (
                f"at step {run.steps[worst_line]} train_time is {run.times[worst_line]:.3f} s, but "
                f"step_avg x steps is {expected[worst_line]:.3f} s")
        elif np.isnan(run.step_avgs).any():
            unknown = f"{run.name} has no step_avg on some lines"
    if unknown and not problems:
        return Finding(CANNOT_TELL, unknown)
    return worst(problems, Finding(PASS, "steps and times rise; step_avg x steps is train_time"))


def time_of_validation(run: Run) -> tuple[float, float] | None:
    """(what a validation adds to the clock, noise of that), in steps; None if unknown.

    The median over the validations of how much longer the two steps after one take than the pairs
    of steps around them. It takes two, as public logs stamp steps when they are queued, so that
    the first after a validation seems long and the second short. The noise is four standard errors
    by how the same figure scatters where there is no validation.
    """
    val_steps, steps, times = run.steps[run.is_val], run.steps[~run.is_val], run.times[~run.is_val]
    if len(steps) and not ((0 < val_steps) & (val_steps < steps[-1])).any():
        return 0.0, 0.0  # none stands between steps
    middle = np.arange(2, len(steps) - 4)
    middle = middle[steps[middle + 4] - steps[middle - 2] == 6]
    before, pair, after = np.diff([times[middle + i] for i in (-2, 0, 2, 4)], axis=0)
    around = np.where(before + after > 0, before + after, np.nan) / 4  # time of a step
    added = pair / around - 2
    # Validations, with no other in these steps, and what lies between validations.
    nearest = np.sort(np.abs(np.append(val_steps, [2**40, 2**41]) - steps[middle][:, None]))
    alone = added[(nearest[:, 0] == 0) & (nearest[:, 1] > 3)]
    elsewhere = added[nearest[:, 0] > 3]
    if np.isnan(alone).all():
        return None
    spread = 1.4826 * np.nanmedian(np.abs(elsewhere)) if len(elsewhere) else 0.0
    return float(np.nanmedian(alone)), float(4 * spread / math.sqrt(len(alone)))


def leaves_out_validation(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Validations take no time on the clock."""
    found = [time_of_validation(run) for run in runs]
    problems = {run.name: f"a validation takes as long as {added[0]:.2f} steps on the clock, which "
                          f"should stand still" for run, added in zip(runs, found, strict=True)
                if added is not None and added[0] > max(MAX_VALIDATION, added[1])}
    if None in found and not problems:
        return Finding(CANNOT_TELL, f"{runs[found.index(None)].name} has no validation with enough "
                                    f"lines of steps around it")
    known = [added for added in found if added is not None]
    longest, noise = (max((added[i] for added in known), default=0) for i in (0, 1))
    note = f", within the noise of {noise:.2f}" if noise > MAX_VALIDATION else ""
    return worst(problems, Finding(PASS, f"a validation takes as long as {max(longest, 0):.2f} "
                                         f"steps on the clock{note}"))


def has_val_tokens(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Validation is over exactly the track's tokens."""
    if hidden := [run for run in runs
                  if run.hyperparameters.get("masked_share", "0.0") not in ("0", "0.0")]:
        return Finding(FAIL, f"{hidden[0].name} predicts hidden tokens, from both sides, and no "
                             f"others")
    values = [run.number("val_tokens") for run in runs]
    same = compare_values(runs, values, "val_tokens")
    if same.status == PASS and track.val_tokens not in (None, values[0]):
        return Finding(FAIL, f"{same.reason} instead of {track.val_tokens}")
    return same


def keeps_token_budget(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Training takes no more tokens than the track allows."""
    tokens = [run.train_tokens for run in runs]
    if None in tokens:
        return Finding(CANNOT_TELL, f"{runs[tokens.index(None)].name} does not say its batch_size "
                                    f"or its train_steps")
    status = PASS if max(tokens) <= track.token_budget else FAIL
    return Finding(status, f"{max(tokens):,} training tokens; allowed: {track.token_budget:,}")


def has_tracks_data(runs: list[Run], track: Track, script: str | None) -> Finding:
    """The shards are the track's, whole, in order, and the same in all logs."""
    if not all(run.shards for run in runs):
        name = next(run.name for run in runs if not run.shards)
        return Finding(CANNOT_TELL, f"{name} does not name its shards with sizes and hashes")
    for run in runs:
        for kind, first in (("train", 1), ("val", 0)):
            names = [shard.name for shard in run.shards if shard.kind == kind]
            wanted = [f"{track.data}_{kind}_{first + i:06d}.bin" for i in range(len(names) or 1)]
            if names != wanted:
                differ = next((pair for pair in zip(names, wanted, strict=False)
                               if pair[0] != pair[1]), ("no shard", wanted[0]))
                return Finding(FAIL, f"{run.name}: {kind} data is {differ[0]} where "
                                     f"{differ[1]} should be")
        if run.shards != runs[0].shards:
            return Finding(FAIL, f"{run.name} and {runs[0].name} have other data")
    shards = runs[0].shards
    hashes = SHARD_HASHES.get(track.data, {})
    for shard in shards:
        if shard.name in hashes and hashes[shard.name] != shard.sha256:
            return Finding(FAIL, f"{shard.name} has sha256 {shard.sha256[:12]}... instead of "
                                 f"{hashes[shard.name][:12]}...")
        if track.data == "fineweb" and shard.num_bytes != FINEWEB_SHARD_BYTES:
            return Finding(FAIL, f"{shard.name} has {shard.num_bytes:,} bytes instead of "
                                 f"{FINEWEB_SHARD_BYTES:,}")
    unknown = sum(shard.name not in hashes for shard in shards)
    note = f"; the hashes of {unknown} are not in data_hashes.json yet" if unknown else ""
    return Finding(PASS, f"{len(shards)} shards of {track.data}, in order, whole, the same in all "
                         f"logs{note}")


def shows_its_source(runs: list[Run], track: Track, script: str | None) -> Finding:
    """All logs start with the same source, which is the train_gpt.py beside them.

    And with that of triton_kernels.py, if the run used it.
    """
    sources = Counter(run.source for run in runs)
    if None in sources:
        name = next(run.name for run in runs if run.source is None)
        return Finding(CANNOT_TELL, f"{name} does not start with its source")
    if len(sources) > 1:
        return Finding(FAIL, f"the logs start with {len(sources)} different sources")
    if script is None:
        return Finding(CANNOT_TELL, "the same in all logs, but there is no train_gpt.py beside "
                                    "them (or name it: --script FILE)")
    found, expected = source_files(runs[0].source), source_files(script)
    names = " and ".join(found)
    for name, text in found.items():
        if clean(text) != clean(expected.get(name, "")):
            return Finding(FAIL, f"the source in the logs is not the {name} beside them")
    return Finding(PASS, f"the same in all logs, and the {names} beside them")


def clean(source: str) -> str:
    return "\n".join(line.rstrip() for line in source.split("\n")).strip()


def declares_warmup(runs: list[Run], track: Track, script: str | None) -> Finding:
    """The log says how kernels were warmed up."""
    found = compare_values(runs, [
        "undone before the clock started" if run.lines("warm-up: undone after") else
        "none, so that the clock ran during compilation" if run.lines("warm-up: none") else None
        for run in runs], "warm-up")
    recompiled = sum(int(run.fact(r"^graphs compiled while the clock ran: (\d+)") or 0)
                     for run in runs)
    note = f"; {recompiled} graphs were compiled on the clock" if recompiled else ""
    return Finding(found.status, found.reason + note)


def forbidden_flags(source: str) -> Iterator[str]:
    """Settings of the compiler in the source of a run that no record may have.

    Follows the syntax, not the text, so that comments and strings for people do not count. Code
    that hides a setting on purpose (getattr, exec) is not found: reviewers read the diff.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"the source is not valid Python (line {error.lineno})"
        return
    config_lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.lineno not in config_lines:
            if not re.search(r"\b_inductor\b", ast.unparse(node)):
                continue
            config_lines.add(node.lineno)
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                if re.search(r"\b_inductor\b", name):
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, (ast.Constant, ast.keyword)):  # "NAME", and update(NAME="1")
            text = node.value if isinstance(node, ast.Constant) else node.arg
            if isinstance(text, str) and re.fullmatch(
                    FORBIDDEN_VARIABLE + r"\w*|max-autotune[\w-]*", text):
                yield f"line {node.lineno}: {text!r}"
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            # functools.partial(torch.compile, mode=...) and model.compile(...) pass them on.
            targets = [function] + [ast.unparse(argument) for argument in node.args[:1]
                                    if function.endswith("partial")]
            if any(re.search(r"(^|\.)compile$", target) for target in targets):
                for keyword in node.keywords:
                    if keyword.arg in ("mode", "options", None):
                        yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


def keeps_compile_flags(runs: list[Run], track: Track, script: str | None) -> Finding:
    """Neither the source nor the environment sets flags of the compiler."""
    flags = []
    for source in {run.source for run in runs if run.source is not None}:
        flags += forbidden_flags(source)
    for run in runs:
        settings = (run.fact(r"^environment: (.*)$") or "").split()
        flags += [f"{run.name} ran with {setting}" for setting in settings
                  if re.match(FORBIDDEN_VARIABLE, setting)]
    if flags:
        return Finding(FAIL, "; ".join(list(dict.fromkeys(flags))[:3]))
    if any(run.source is None for run in runs):
        return Finding(CANNOT_TELL, "there is no source to look at")
    return Finding(PASS, "no flags of the compiler in the source or the environment")


def names_machine(runs: list[Run], track: Track, script: str | None) -> Finding:
    """All runs name the same hardware and torch, and as many GPUs as the track allows."""
    findings = [compare_values(runs, [getattr(run, name) for run in runs], label)
                for name, label in (("hardware", "hardware"), ("world_size", "number of ranks"),
                                    ("torch", "torch"))]
    ranks = runs[0].world_size
    if track.world_size is not None and ranks is not None and ranks != track.world_size:
        findings.append(Finding(FAIL, f"{ranks} ranks instead of {track.world_size}"))
    for status in (FAIL, CANNOT_TELL):
        bad = [finding for finding in findings if finding.status == status]
        if bad:
            return Finding(status, "; ".join(finding.reason for finding in bad))
    return Finding(PASS, "; ".join(finding.reason for finding in findings))


def has_no_marks(runs: list[Run], track: Track, script: str | None) -> Finding:
    """No run says of itself that it is not a record, or that it was resumed."""
    problems = {}
    for run in runs:
        marks = run.lines("resumed")
        if track.claim:
            marks += run.lines("not a record:")
        if marks:
            problems[run.name] = marks[0][:120]
    if not problems and not all(run.hyperparameters for run in runs):
        return Finding(CANNOT_TELL, "the logs do not say whether something was overridden")
    return worst(problems, Finding(PASS, "nothing was resumed, and no claim overridden"
                                         if track.claim else "nothing was resumed"))


Rule = Callable[[list[Run], Track, str | None], Finding]
RULES: dict[str, Rule] = {
    "complete": is_complete,
    "finite": is_finite,
    "target": reaches_target,
    "significance": is_significant,
    "independent": is_independent,
    "settings": has_same_settings,
    "time": has_times,
    "clock": has_sane_clock,
    "validation untimed": leaves_out_validation,
    "val tokens": has_val_tokens,
    "training tokens": keeps_token_budget,
    "data": has_tracks_data,
    "source": shows_its_source,
    "warm-up": declares_warmup,
    "compile flags": keeps_compile_flags,
    "machine": names_machine,
    "marks": has_no_marks,
}
CLAIM = ("target", "significance")  # an idea that failed may fail these


# -----------------------------------------------------------------------------
# The verdict


class Report(NamedTuple):
    track_name: str
    runs: list[Run]
    findings: dict[str, Finding]

    @property
    def track(self) -> Track:
        return TRACKS[self.track_name]

    def rules_with(self, status: str) -> list[str]:
        return [rule for rule, finding in self.findings.items() if finding.status == status]

    @property
    def is_sound(self) -> bool:
        """The logs prove what they say, be it a record or not."""
        return all(finding.status == PASS for rule, finding in self.findings.items()
                   if rule not in CLAIM)

    @property
    def is_record(self) -> bool:
        return bool(self.track.claim) and self.rules_with(PASS) == list(self.findings)

    @property
    def lacks_core(self) -> bool:
        """All that keeps it from being a record is that its CORE is not known."""
        return self.is_sound and self.rules_with(CANNOT_TELL) == ["target"]

    @property
    def cores(self) -> list[float]:
        """The CORE score of each run; NaN where it is not known, or not what the track asks for."""
        return [read_core(run)[0] if self.track.core is not None else math.nan
                for run in self.runs]

    @property
    def verdict(self) -> str:
        if failed := self.rules_with(FAIL):
            return f"not a record of {self.track_name}: {', '.join(failed)}"
        if unknown := self.rules_with(CANNOT_TELL):
            return (f"not shown to be a record of {self.track_name}: cannot tell "
                    f"{', '.join(unknown)}")
        if not self.track.claim:
            return f"a sound measurement; {self.track_name} has no target, hence no records"
        return f"a record of {self.track_name}: {self.findings['time'].reason}"

    def as_json(self) -> dict:
        losses = [run.final_loss for run in self.runs]
        times = [run.train_time for run in self.runs]
        cores, p = self.cores, math.nan
        if self.track.target is not None:
            p = below_target(losses, self.track.target, self.track.sigma)[0]
        summary = {
            "track": self.track_name, "verdict": self.verdict, "is_record": self.is_record,
            "n": len(losses), "mean_val_loss": fmean(losses),
            "std_val_loss": sample_std(losses), "p": p, "mean_core": fmean(cores),
            "mean_train_time": fmean(times), "fastest_train_time": min(times),
            "rules": {rule: finding._asdict() for rule, finding in self.findings.items()},
            "runs": [
                {"log": str(run.path), "trial": run.trial, "seed": run.seed,
                 "train_steps": run.train_steps, "train_tokens": run.train_tokens,
                 "val_loss": run.final_loss, "core": core, "train_time": run.train_time,
                 "hardware": run.hardware, "world_size": run.world_size, "torch": run.torch}
                for run, core in zip(self.runs, cores, strict=True)],
        }
        return without_nan(summary)


def without_nan(value):
    """The same with null for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_script(path: Path) -> str | None:
    """The train_gpt.py beside a log, or one folder up, as `read_script` reads it."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "train_gpt.py").is_file():
            return read_script(folder / "train_gpt.py")
    return None


def read_script(path: Path) -> str:
    """A train_gpt.py and the triton_kernels.py beside it, if there is one, as a log has them."""
    kernels = path.with_name("triton_kernels.py")
    files = [path, kernels] if kernels.is_file() else [path]
    return KERNELS_MARK.join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def check(runs: list[Run], track_name: str | None = None, script: str | None = None) -> Report:
    """Try every rule of the track on the runs.

    Without `track_name` the track is the one that the logs name, without `script` the source they
    should start with is the train_gpt.py beside the first. LogError if no track is named.
    """
    track_name = track_name or runs[0].hyperparameters.get("track")
    if track_name not in TRACKS:
        found = "no track" if track_name is None else f"the unknown track {track_name!r}"
        raise LogError(f"{runs[0].name} names {found}; say whose rules to use: "
                       f"--track {' or '.join(TRACKS)}")
    script = script if script is not None else find_script(runs[0].path.resolve())
    track = TRACKS[track_name]
    return Report(track_name, runs, {name: rule(runs, track, script)
                                     for name, rule in RULES.items()})


def table(rows: list[tuple], right: str) -> str:
    """Aligned columns; `right` has an r for each column that is aligned to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(
        cell.rjust(width) if side == "r" else cell.ljust(width)
        for cell, width, side in zip(row, widths, right, strict=True)).rstrip() for row in rows)


def cell(text: str) -> str:
    """Text that cannot break the table it stands in."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def describe_runs(runs: list[Run], most: int = 20) -> str:
    """A table of the runs, of the first `most` of them."""
    def show(value, form: str) -> str:
        return "-" if value is None or value != value else format(value, form)

    rows = [("log", "seed", "steps", "tokens", "val_loss", "train_time", "step_avg", "hardware")]
    for run in runs[:most]:
        rows.append((
            run.name, run.seed or "-", show(run.train_steps, ","), show(run.train_tokens, ","),
            show(run.final_loss, ".5f"), show(run.train_time, ",.3f") + " s",
            show(1000 * run.step_avgs[-1], ",.2f") + " ms", run.hardware or "-"))
    more = f"\n... and {len(runs) - most:,} more" if len(runs) > most else ""
    return table(rows, "lrrrrrrl") + more


def describe_report(report: Report) -> str:
    """The runs, what each rule found, and the verdict."""
    rows = [(rule, finding.status, finding.reason) for rule, finding in report.findings.items()]
    return "\n\n".join((describe_runs(report.runs), table(rows, "lll"),
                        f"verdict: {report.verdict}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     epilog="A folder stands for the logs in it.")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="logs, or folders of logs")
    parser.add_argument("--track", choices=TRACKS, help="whose rules; default: the logs' own")
    parser.add_argument("--script", type=Path, metavar="FILE",
                        help="the source that ran; default: the train_gpt.py beside the logs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        script = None if args.script is None else read_script(args.script)
        report = check(read_logs(args.logs), args.track, script)
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(describe_report(report))
    return 0 if report.is_record else 1


if __name__ == "__main__":
    sys.exit(main())
