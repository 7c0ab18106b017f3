"""Which switch matters how much? A table from logs: a control, and runs with other settings.

    python records/ablation.py                      # all of records/measurements/*_Ablation
    python records/ablation.py logs/ --control modern-seed1 --plot switches.png

Runs whose hyper-parameters are equal, but for seeds, names and reports, share a row. The control
is the one that --control names, else the one with a log called control*, else the one from which
the others differ in the fewest hyper-parameters. An archive of logs is a series of its own, with a
control of its own, so that another machine can add rows to the table; of a change that several
series have, the last one counts. A time is that of a run whose steps all take as long as the median
of their stage, because many runs share a machine in an ablation.

Exit status: 0 if there is a table, 1 if not.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import check
import numpy as np
from compare import differences, save_figure
from logs import ARCHIVE, LogError, Run, find_logs, read_logs
from record import RECORDS
from significance import Welch, sample_std, welch

# Names, the claim, and that for which the clock stands still do not change the training.
LABELS = {"track", "recipe", "data_path", "target", "token_budget", "val_loss_every",
          "sample_every", "save_every", "save_on_exit"}
FINEWEB = {"fineweb": "FineWeb", "sample": "this repository's sample of FineWeb"}
COLUMNS = "seeds", "val_loss", "against the control", "time", "tokens/s", "peak MiB"


class Group(NamedTuple):
    """Runs that differ in nothing but their seeds."""

    settings: dict[str, str]
    runs: list[Run]

    @property
    def losses(self) -> list[float]:
        return [run.final_loss for run in self.runs]

    @property
    def mean_time(self) -> float:
        return fmean(run.steady_time for run in self.runs)

    def differing(self, other: "Group") -> list[str]:
        """The hyper-parameters in which the two differ, in the order of the logs."""
        return [name for name in self.settings | other.settings
                if self.settings.get(name) != other.settings.get(name)]


class Ablation(NamedTuple):
    control: Group
    others: list[Group]

    def changes(self, group: Group) -> str:
        """`name`: value of the control -> value of the group, for all that differ."""
        def value(side: Group, name: str) -> str:
            return side.settings.get(name, "absent") or "empty"

        return "; ".join(f"`{name}`: {value(self.control, name)} -> {value(group, name)}"
                         for name in self.control.differing(group))

    def loss_gap(self, group: Group) -> tuple[float, Welch | None]:
        """How much higher the group's mean val_loss is than the control's, of the same seeds if the
        control has them; the test takes three seeds in both."""
        seeds = {run.seed for run in group.runs}
        same = [run.final_loss for run in self.control.runs if run.seed in seeds]
        against = same if len(same) == len(group.runs) else self.control.losses
        test = welch(group.losses, against) if min(len(group.runs), len(against)) > 2 else None
        return fmean(group.losses) - fmean(against), test

    def noise(self) -> float | None:
        """Standard deviation of a val_loss, without what the runs of a seed have in common.

        It is made from the rows with all of the control's seeds, of which there have to be two:
        from medians, so that a row that does not train does not count. None if there are fewer
        than four such rows.
        """
        seeds = sorted({run.seed or "" for run in self.control.runs})
        rows = [[run.final_loss for run in sorted(group.runs, key=lambda run: run.seed or "")]
                for group in (self.control, *self.others)
                if sorted(run.seed or "" for run in group.runs) == seeds]
        if len(seeds) < 2 or len(rows) < 4:
            return None
        rest = np.array(rows) - np.mean(rows, axis=1, keepdims=True)
        rest -= np.median(rest, axis=0)
        # 0.6745: the median of the size of a normal number.
        return float(np.median(np.abs(rest)) / 0.6745 * math.sqrt(len(seeds) / (len(seeds) - 1)))


def train_tokens(run: Run) -> int | None:
    """Tokens trained on. Logs that do not state them may count `batch_stages` in another unit."""
    if stated := run.fact(r"^training tokens: ([\d,]+)$"):
        return int(stated.replace(",", ""))
    return None if run.hyperparameters.get("batch_stages") else run.train_tokens


def find_control(groups: list[Group], name: str | None = None) -> Group:
    """The group that the others are compared with. LogError if that is not clear."""
    def with_log(fits) -> list[Group]:
        return [group for group in groups if any(fits(run.path) for run in group.runs)]

    if name is not None:
        found = with_log(lambda path: name in (path.name, path.stem, str(path)))
        problem = f"--control {name} has to name a log of one row, not of {len(found)}"
    else:
        total = [sum(len(group.differing(other)) for other in groups) for group in groups]
        found = with_log(lambda path: path.stem.startswith("control")) or [
            group for group, count in zip(groups, total, strict=True) if count == min(total)]
        problem = ("it is ambiguous which runs are the control; name one of its logs with "
                   "--control, or call that control.txt")
    if len(found) != 1:
        first = ", ".join(group.runs[0].name for group in found or groups)
        raise LogError(f"{problem}; the rows begin with {first}")
    return found[0]


def require(rule: check.Rule, runs: list[Run], advice: str) -> None:
    """LogError, with what to do, unless the runs pass a rule that is the same on all tracks."""
    finding = rule(runs, check.TRACKS["webmix"], None)
    if finding.status != check.PASS:
        raise LogError(f"{finding.reason}; {advice}")


def read_ablation(paths: Sequence[str | Path], control: str | None = None) -> Ablation:
    """Group the runs of these logs and folders. LogError if they make no fair table."""
    runs, groups = read_logs(paths), {}
    for run in runs:
        if not run.hyperparameters:
            raise LogError(f"{run.name} does not list its hyper-parameters, as logs of "
                           f"train_gpt.py do; name the other logs only")
        settings = {name: value for name, value in run.hyperparameters.items()
                    if name not in check.NOT_SETTINGS | LABELS}
        groups.setdefault(frozenset(settings.items()), Group(settings, [])).runs.append(run)
    for rule in (check.is_complete, check.is_finite, check.has_times):
        require(rule, runs, "run it again, to its end, or name the other logs only")
    if len(groups) < 2:
        raise LogError("all of the logs have the same hyper-parameters, but for seeds and names; "
                       "add runs with a switch that is set otherwise")
    for group in groups.values():
        names = ", ".join(run.name for run in group.runs)
        require(check.is_independent, group.runs, f"leave one of these out: {names}")
    chosen = find_control(list(groups.values()), control)
    first = chosen.runs[0]
    for run in runs:
        problems, _ = differences([first], [run])
        if problems:
            raise LogError(f"{run.name} cannot be compared with the control, {first.name}: "
                           f"{'; '.join(problems)}; run both on one machine and the same data")
    return Ablation(chosen, [group for group in groups.values() if group is not chosen])


def read_series(paths: Sequence[str | Path], control: str | None = None) -> list[Ablation]:
    """An ablation for each archive among these logs and folders, and one for all other logs.

    LogError if they make no fair table; the series may be of different GPUs.
    """
    logs = find_logs(paths)
    archives = [[path] for path in logs if path.name.endswith(ARCHIVE)]
    others = [path for path in logs if not path.name.endswith(ARCHIVE)]
    series = [read_ablation(some, control) for some in [*([others] if others else []), *archives]]
    first = series[0].control.runs[0]
    for run in (ablation.control.runs[0] for ablation in series[1:]):
        problems, _ = differences([first], [run], may_differ=("hardware",))
        if run.train_steps != first.train_steps:
            problems.append(f"steps: {first.train_steps} against {run.train_steps}")
        if problems:
            raise LogError(f"the controls {first.path} and {run.path} cannot share a table: "
                           f"{'; '.join(problems)}; name one of the series only")
    return series


def changed_rows(series: Sequence[Ablation]) -> list[tuple[Ablation, Group]]:
    """Each change with its series, what costs most first; of one in several series, the last."""
    rows = {ablation.changes(group): (ablation, group)
            for ablation in series for group in ablation.others}
    return sorted(rows.values(), key=lambda row: -row[0].loss_gap(row[1])[0])


def describe_data(run: Run) -> str:
    """What the run's shards are, by their names, sizes and hashes."""
    for track in check.TRACKS.values():
        if check.has_tracks_data([run], track, None).status == check.PASS:
            return FINEWEB.get(track.data, f"**{track.data}, which is not FineWeb**")
    return f"**data that is not known to be FineWeb**, with {run.shards[0].name}"


def span(counts: list[int | None], unit: str) -> str:
    """`80 steps`, `80 to 160 steps`, or that not all of the logs tell."""
    if None in counts:
        return f"{unit} not in all of the logs"
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) + f" {unit}"


def headline(series: Sequence[Ablation]) -> str:
    """Data, machines, length and seeds of the runs, as one line."""
    groups = [group for ablation in series for group in (ablation.control, *ablation.others)]
    runs = [run for group in groups for run in group.runs]
    first, scripts = runs[0], len({run.source for run in runs})
    noise, seeds = max((ablation.noise() or 0, len(ablation.control.runs)) for ablation in series)
    machines = dict.fromkeys(f"{run.world_size} x {run.hardware}".removeprefix("1 x ")
                             for run in runs)
    facts = [
        f"On {describe_data(max(runs, key=lambda run: len(run.shards)))}",
        " and ".join(machines), f"torch {first.torch}",
        span([run.train_steps for run in runs], "steps"),
        span([train_tokens(run) for run in runs], "training tokens"),
        f"val_loss on {first.number('val_tokens'):,} tokens",
        *["one seed each, so that small differences may be noise"] * (len(runs) == len(groups)),
        *[f"rows of {seeds} seeds differ by ±{1.96 * noise * math.sqrt(2 / seeds):.4f} by "
          f"chance (95%)"] * (noise > 0),
        *[f"{len(series)} series, each row compared with the control of its own"]
        * (len(series) > 1),
        *[f"**the logs are of {scripts} different scripts**"] * (scripts > 1)]
    return check.cell("; ".join(facts)) + "."


def row(ablation: Ablation, group: Group) -> list[str]:
    """The group's cells of the table; what the logs do not say is a dash."""
    label, against, percent = f"none: the control, {group.runs[0].name}", "", ""
    if group is not ablation.control:
        label, (gap, test) = ablation.changes(group), ablation.loss_gap(group)
        against = f"{gap:+z.4f}" + (f" (95%: {test.low:+.4f} to {test.high:+.4f})" if test else "")
        percent = f" ({100 * (group.mean_time / ablation.control.mean_time - 1):+z.1f}%)"
    spread, tokens = sample_std(group.losses), train_tokens(group.runs[0])
    memory = [int(run.fact(r"^peak memory: (\d+) MiB") or 0) for run in group.runs]
    return [label, str(len(group.runs)),
            f"{fmean(group.losses):.5f}" + ("" if math.isnan(spread) else f" ± {spread:.5f}"),
            against, f"{group.mean_time:,.1f} s{percent}",
            "-" if tokens is None else f"{tokens / group.mean_time:,.0f}",
            f"{max(memory):,}" if all(memory) else "-"]


def render(*series: Ablation) -> str:
    """Markdown: what ran on what, and a table, the controls first, then what costs most."""
    rows = [(ablation, ablation.control) for ablation in series] + changed_rows(series)
    cells = [row(ablation, group) for ablation, group in rows]
    columns, rules = ["changed", *COLUMNS], ["---"] + ["---:"] * len(COLUMNS)
    if len(series) > 1:
        columns, rules = ["changed", "series", *COLUMNS], ["---", *rules[1:], "---:"]
        for (ablation, group), line in zip(rows, cells, strict=True):
            line.insert(1, str(series.index(ablation) + 1))
            if group is ablation.control:
                line[0] += f", on {group.runs[0].hardware}"
    table = [columns, rules, *(map(check.cell, line) for line in cells)]
    return f"{headline(series)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def plot(path: Path, *series: Ablation) -> None:
    """Write a PNG: a bar for each change, as long as its difference in val_loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = changed_rows(series)
    gaps, tests = zip(*(ablation.loss_gap(group) for ablation, group in rows), strict=True)
    labels = [textwrap.fill(textwrap.shorten(ablation.changes(group).replace("`", ""), 110), 60)
              for ablation, group in rows]
    figure, axis = pyplot.subplots(figsize=(12, 1.8 + 0.5 * len(gaps)), layout="constrained")
    axis.barh(range(len(gaps)), gaps, tick_label=labels, capsize=4,
              color=["tab:red" if gap > 0 else "tab:blue" for gap in gaps],
              xerr=[test.high - test.difference if test else math.nan for test in tests])
    axis.axvline(0, color="black", lw=1)
    axis.invert_yaxis()  # from the top, as in the table
    axis.margins(y=0.01)
    if beyond := max(map(abs, gaps)) > 1:  # what does not train would hide all of the others
        axis.set_xscale("symlog", linthresh=0.1)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("val_loss against the control, nats per token"
                    + ", with its 95% interval" * any(tests)
                    + ", logarithmic beyond 0.1" * beyond)
    figure.suptitle(textwrap.fill(headline(series).replace("*", ""), 110), fontsize=9)
    save_figure(figure, path)


def ablation_folders() -> list[Path]:
    """records/measurements/*_Ablation, by the date in their names."""
    return sorted((RECORDS / "measurements").glob("*_Ablation"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("logs", nargs="*", metavar="LOG", help="logs, archives, or folders of "
                        "them; default: all of records/measurements/*_Ablation")
    parser.add_argument("--control", metavar="LOG", help="the name of one of the control's logs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the differences")
    args = parser.parse_args()
    try:
        paths = args.logs or ablation_folders()
        if not paths:
            raise LogError("there is no folder records/measurements/*_Ablation; name your logs")
        series = read_series(paths, args.control)
        print(render(*series), end="")
        if args.plot:
            plot(args.plot, *series)
            print(f"plot: {args.plot}", file=sys.stderr)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
