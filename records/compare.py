"""How much faster are these runs than those? Fairly: on the same machine and data.

    python records/compare.py logs/baseline.txt -- logs/mine.txt
    python records/compare.py records/webmix/2026-11-21_Baseline -- logs/ --loss 4.0 --plot it.png

Compares the times at which val_loss first reaches the target of the track (or --loss), found by
interpolating between validations. Says what keeps the two sides from being comparable, and what a
fair comparison has to mention. Exit status: 0 if they can be compared, 1 if they cannot.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from check import TRACKS, table, without_nan
from logs import LogError, Run, read_logs
from significance import Welch, welch

MAX_GAP = 0.1  # loss curves bend; across a larger fall a straight line is too far above them
PEAK_RATES = ("matrix_lr", "embed_lr", "bigram_lr", "head_lr", "scalar_lr")


class Crossing(NamedTuple):
    """Where a run's val_loss first reaches a loss; times in seconds."""

    step: float
    time: float
    tokens: float | None
    gap: float  # fall of the loss between the validations around it; 0 at a validation


def crossing(run: Run, loss: float) -> Crossing | None:
    """Interpolated linearly between the two validations around it. None if it never gets there."""
    steps, times, losses = run.val_curve
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return None
    last = reached[0]
    before = max(0, last - 1)
    gap = float(losses[before] - losses[last])
    share = (losses[before] - loss) / gap if gap > 0 else 1.0
    step, time = (float(values[before] + share * (values[last] - values[before]))
                  for values in (steps, times))
    return Crossing(step, time, run.tokens_at(step), gap if share < 1 else 0.0)


def default_loss(baseline: list[Run], mine: list[Run]) -> tuple[float, str]:
    """The target of the runs' track if all reach it, else the lowest loss that all reach."""
    everyone = baseline + mine
    lowest = max(float(np.nanmin(run.losses)) for run in everyone)
    tracks = {run.hyperparameters.get("track") for run in everyone}
    name = tracks.pop() if len(tracks) == 1 else None
    target = TRACKS[name].target if name in TRACKS else None
    if target is not None and lowest <= target:
        return target, f"the target of track {name}"
    return lowest, "the lowest loss that all runs reach"


def values_of(runs: list[Run], fact) -> list:
    """The different values of fact(run), in order."""
    return list(dict.fromkeys(fact(run) for run in runs))


# What must be the same for two times to be comparable, and what a fair comparison mentions.
MUST_BE_EQUAL = {
    "hardware": lambda run: run.hardware,
    "GPUs": lambda run: run.world_size,
    "torch": lambda run: run.torch,
    "CUDA": lambda run: run.cuda,
    "val_tokens": lambda run: run.number("val_tokens"),
    "validation data": lambda run: tuple(s.sha256[:12] for s in run.shards if s.kind == "val"),
    "masked_share": lambda run: run.hyperparameters.get("masked_share", "0.0"),
}
TO_MENTION = {
    "tokens per step": lambda run: run.batch_sizes and tuple(map(str, run.batch_sizes)),
    "train_steps": lambda run: run.train_steps,
    "optimizer": lambda run: run.hyperparameters.get("optimizer"),
} | {f"peak {name}": lambda run, name=name: run.hyperparameters.get(name) for name in PEAK_RATES}


def training_data_differs(baseline: list[Run], mine: list[Run]) -> bool:
    """Whether shards of one name have other content; one side may read more of them."""
    content = [{(s.name, s.sha256) for run in runs for s in run.shards if s.kind == "train"}
               for runs in (baseline, mine)]
    return not (content[0] <= content[1] or content[1] <= content[0])


def differences(
    baseline: list[Run], mine: list[Run], may_differ: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """What keeps the two sides from being comparable, and what else differs, as sentences.

    Names of MUST_BE_EQUAL in `may_differ` keep them from nothing.
    """
    problems, notes = [], []
    for name, fact in MUST_BE_EQUAL.items():
        if name in may_differ:
            continue
        sides = [values_of(runs, fact) for runs in (baseline, mine)]
        if not all(value not in (None, ()) for side in sides for value in side):
            problems.append(f"{name}: not in all of the logs")
        elif sides[0] != sides[1] or len(sides[0]) > 1:
            problems.append(f"{name}: {describe(sides[0])} against {describe(sides[1])}")
    if training_data_differs(baseline, mine):
        problems.append("training data: other shards, by their hashes")
    for name, fact in TO_MENTION.items():
        sides = [values_of(runs, fact) for runs in (baseline, mine)]
        if sides[0] != sides[1]:
            advice = ""
            if name.startswith("peak") and same_optimizer(baseline, mine):
                advice = f"; run the baseline with it too: --{name[5:]} {describe(sides[1])}"
            notes.append(f"other {name}: {describe(sides[0])} against {describe(sides[1])}{advice}")
    return problems, notes


def same_optimizer(baseline: list[Run], mine: list[Run]) -> bool:
    names = values_of(baseline + mine, TO_MENTION["optimizer"])
    return len(names) == 1 and names[0] is not None


def describe(values: list) -> str:
    """All values on one line: `65536`, or `a or b`."""
    return " or ".join(" ".join(value) if isinstance(value, tuple) else str(value)
                       for value in values)


class Comparison(NamedTuple):
    loss: float
    why: str  # why this loss
    baseline: list[Crossing]
    mine: list[Crossing]
    problems: list[str]
    notes: list[str]

    def mean_time(self, side: str) -> float:
        return fmean(crossing.time for crossing in getattr(self, side))

    @property
    def speedup(self) -> float:
        return self.mean_time("baseline") / self.mean_time("mine")

    @property
    def welch(self) -> Welch | None:
        return welch(*([crossing.time for crossing in side]
                       for side in (self.baseline, self.mine)))

    def as_json(self) -> dict:
        sides = {side: {"n": len(getattr(self, side)), "mean_time": self.mean_time(side),
                        "crossings": [crossing._asdict() for crossing in getattr(self, side)]}
                 for side in ("baseline", "mine")}
        return without_nan({
            "loss": self.loss, "speedup": self.speedup, "comparable": not self.problems, **sides,
            "welch": self.welch._asdict() if self.welch else None,
            "problems": self.problems, "notes": self.notes})


def compare(baseline: list[Run], mine: list[Run], loss: float | None = None) -> Comparison:
    """Compare two sets of runs at a loss. LogError, for a person, if a run never gets there."""
    for run in baseline + mine:
        if np.isnan(run.times[run.is_val]).any():
            raise LogError(f"{run.name} has no train_time, so it cannot be compared")
        if np.isnan(run.losses[run.is_val]).all():
            raise LogError(f"{run.name} has no val_loss, so it cannot be compared")
    why = "as asked for"
    if loss is None:
        loss, why = default_loss(baseline, mine)
    problems, notes = differences(baseline, mine)
    sides = []
    for runs in (baseline, mine):
        found = [(run, crossing(run, loss)) for run in runs]
        for run, where in found:
            if where is None:
                raise LogError(f"{run.name} never reaches {loss:g}; its lowest val_loss is "
                               f"{np.nanmin(run.losses):.5f}; choose another --loss, or train it "
                               f"longer")
            if where.step <= 0:
                raise LogError(f"{run.name} is at {loss:g} before it trains; choose a lower --loss")
        gap = max(where.gap for _, where in found)
        if gap > MAX_GAP:
            notes.append(f"{runs[0].name}{' and others' * (len(runs) > 1)}: validations around the "
                         f"crossing are up to {gap:.2f} apart in loss, so the time is an upper "
                         f"bound; validate more often: --val_loss_every")
        sides.append([where for _, where in found])
    return Comparison(loss, why, *sides, problems, notes)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure to a PNG, and close it. LogError if that cannot be written."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise LogError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)


def plot(path: Path, baseline: list[Run], mine: list[Run], result: Comparison) -> None:
    """Write a PNG: val_loss over time and over tokens, and where the curves cross the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    shown = []
    for runs, crossings, color, label in (
        (baseline, result.baseline, "tab:gray", "baseline"), (mine, result.mine, "tab:blue", "mine")
    ):
        for index, (run, where) in enumerate(zip(runs, crossings, strict=True)):
            steps, times, losses = run.val_curve
            shown.append(losses[times > 0])
            tokens = None if where.tokens is None else [run.tokens_at(s) / 1e6 for s in steps]
            places = None if where.tokens is None else where.tokens / 1e6
            for axis, x, cross in ((axes[0], times, where.time), (axes[1], tokens, places)):
                if x is None:
                    continue
                name = f"{label}: {run.path.stem}" if index == 0 else None
                axis.plot(x, losses, ".-", color=color, lw=1.2, ms=4, alpha=0.8, label=name)
                axis.plot([cross], [result.loss], "o", color=color, ms=9, mec="black", zorder=3)
        for axis, values, unit in ((axes[0], [c.time for c in crossings], "s"),
                                   (axes[1], [c.tokens for c in crossings], "M tokens")):
            if None not in values:
                mean = fmean(values) / (1 if unit == "s" else 1e6)
                on_left = mean > axis.get_xlim()[1] / 2
                axis.annotate(f"{mean:,.1f} {unit}", (mean, result.loss), color=color,
                              weight="bold", xytext=(-6, -18) if on_left else (6, 8),
                              textcoords="offset points", ha="right" if on_left else "left")
    for axis, label in zip(axes, ("train_time, seconds", "training tokens, millions"),
                           strict=True):
        axis.axhline(result.loss, color="tab:red", ls="--", lw=1, label=f"loss {result.loss:g}")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("val_loss, nats per token")
    losses = np.concatenate(shown)
    low, high = np.nanmin(losses), np.nanmax(losses)
    axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes[0].legend(loc="upper right")
    data = {shard.name.split("_train_")[0] for run in baseline + mine for shard in run.shards
            if shard.kind == "train"}
    figure.suptitle(f"{result.speedup:.2f}x to val_loss {result.loss:g}"
                    + (f" on {' and '.join(sorted(data))}" if data else "")
                    + (" (NOT COMPARABLE)" if result.problems else ""))
    save_figure(figure, path)


def describe_comparison(baseline: list[Run], mine: list[Run], result: Comparison) -> str:
    rows = [("", "log", "seed", "crossed at step", "tokens", "time")]
    for label, runs, crossings in (("baseline", baseline, result.baseline),
                                   ("mine", mine, result.mine)):
        for run, where in zip(runs, crossings, strict=True):
            tokens = "-" if where.tokens is None else f"{where.tokens / 1e6:,.1f}M"
            rows.append((label, run.name, run.seed or "-", f"{where.step:,.1f}", tokens,
                         f"{where.time:,.3f} s"))
    lines = [f"val_loss {result.loss:g} ({result.why}), interpolated between validations", "",
             table(rows, "llrrrr"), "",
             f"mean time {result.mean_time('baseline'):,.3f} s against "
             f"{result.mean_time('mine'):,.3f} s: {result.speedup:.3f}x as fast"]
    if test := result.welch:
        lines.append(f"Welch's test: {test.difference:,.3f} s less, 95% interval {test.low:,.3f} "
                     f"to {test.high:,.3f} s, one-sided p {test.p:.3g} that it is not faster")
    else:
        lines.append("Welch's test: needs at least 2 runs on each side")
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"NOT COMPARABLE: {problem}" for problem in result.problems]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        usage="compare.py [--loss L] [--plot FILE.png] [--json] BASELINE... -- MINE...")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="logs, or folders of logs")
    parser.add_argument("--loss", type=float, metavar="L",
                        help="val_loss to compare at; default: the track's target, or else the "
                             "lowest loss that all runs reach")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    if argv.count("--") != 1:
        if {"-h", "--help"} & set(argv):
            parser.print_help()
            return 0
        parser.error("the baseline's logs and yours have to be parted by one --")
    # Options may stand on either side.
    before, after = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    try:
        first, rest = parser.parse_known_args(before)
        second, more = parser.parse_known_args(after)
        if rest or more:
            parser.error(f"unknown option {' '.join(rest + more)}")
        loss = first.loss if first.loss is not None else second.loss
        path, as_json = first.plot or second.plot, first.json or second.json
        baseline, mine = read_logs(first.logs), read_logs(second.logs)
        result = compare(baseline, mine, loss)
        print(json.dumps(result.as_json(), indent=2) if as_json
              else describe_comparison(baseline, mine, result))
        if path:
            plot(path, baseline, mine, result)
            print(f"plot: {path}", file=sys.stderr)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
