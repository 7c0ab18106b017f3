"""Do the gains hold as models grow? Sizes and lengths of two recipes, with the law that fits them.

    ./run.sh miniseries                                     # trains what is missing, then tells
    ./run.sh miniseries --depths 4,6,8 --ratios 2,4,8 --recipes baseline,modern
    ./run.sh miniseries --logs FOLDER                       # tells of logs that are there

Each recipe is trained at each --depth, to each --ratio of training tokens per weight; the dial of
train_gpt.py sets the rest. The last recipe is measured against the others. Compute is 6 x weights
in matrix products x training tokens, in FLOP, attention left out. The law is E + A / weights^a +
B / tokens^b (Hoffmann et al. 2022), fitted by least squares to the final val_loss; where weights
and tokens share the compute best, it gives the loss that a recipe can reach with it.

Other options go to train_gpt.py. Logs, table.md and plot.png are in logs/miniseries, and the same
command goes on where it was stopped. Exit status: 0 if all runs ended well, 1 if not.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import check
import numpy as np
from ablate import fetch_data, fit_memory
from compare import crossing, differences, save_figure
from logs import LogError, Run, read_logs
from screen import (
    ROOT,
    add_run_options,
    hyperparameters_of,
    names_of,
    parse_run_options,
    plan_jobs,
    run_all,
    run_command,
    visible_gpus,
)


class Point(NamedTuple):
    """A run of the series."""

    recipe: str
    depth: int
    ratio: float  # training tokens per weight, as asked for
    weights: int  # in matrix products of each token
    tokens: int  # trained on
    run: Run

    @property
    def compute(self) -> float:
        """FLOP."""
        return 6.0 * self.weights * self.tokens

    @property
    def loss(self) -> float:
        return self.run.final_loss


class Law(NamedTuple):
    """loss = E + A / weights^a + B / tokens^b, nats per token."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def __call__(self, weights, tokens):
        return self.E + self.A * weights**-self.a + self.B * tokens**-self.b

    def best(self, compute):
        """The lowest loss with so much compute, in FLOP, and the weights that reach it."""
        share = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        weights = share * (compute / 6) ** (self.b / (self.a + self.b))
        return self(weights, compute / 6 / weights), weights


def read_series(paths: Sequence[str | Path]) -> list[Point]:
    """The runs of the dial, by recipe, in the order of the logs, by depth and by ratio.

    LogError if one is another kind of run.
    """
    points = []
    runs = read_logs(paths)
    for rule in (check.is_complete, check.is_finite, check.has_times):
        finding = rule(runs, check.TRACKS["webmix"], None)
        if finding.status != check.PASS:
            raise LogError(f"{finding.reason}; run it again, or name the other logs only")
    for run in runs:
        problems, _ = differences(runs[:1], [run])
        if problems:
            raise LogError(f"{run.name} cannot stand beside {runs[0].name}: {'; '.join(problems)}")
        given, weights = run.hyperparameters, run.fact(r"^parameters: .*?([\d,]+) in matrix")
        depth = run.number("depth")
        if not depth or weights is None or run.train_tokens is None:
            raise LogError(f"{run.name} was not trained with --depth, or not in one go; name the "
                           f"other logs only")
        points.append(Point(given["recipe"], depth, float(given["target_param_data_ratio"]),
                            int(weights.replace(",", "")), run.train_tokens, run))
    recipes = [point.recipe for point in points]
    return sorted(points, key=lambda point: (recipes.index(point.recipe), *point[1:3]))


def spans(points: list[Point]) -> bool:
    """Whether there are sizes and lengths enough for a law."""
    return len({p.weights for p in points}) > 2 and len({p.ratio for p in points}) > 1


def fit_law(points: list[Point]) -> Law | None:
    """The law with the smallest squares; None if none has losses fall with weights and tokens."""
    if not spans(points):
        return None
    weights, tokens, losses = (np.array([getattr(point, name) for point in points], float)
                               for name in ("weights", "tokens", "loss"))
    best, smallest = None, np.inf
    # Given the exponents, the rest is a linear fit. Units near 1, or it loses all its digits.
    N, D = weights.mean(), tokens.mean()
    for a in np.arange(0.05, 1.2, 0.02):
        for b in np.arange(0.05, 1.2, 0.02):
            terms = np.stack([np.ones_like(losses), (weights / N) ** -a, (tokens / D) ** -b], 1)
            found = np.linalg.lstsq(terms, losses, rcond=None)[0]
            error = np.square(terms @ found - losses).sum()
            if (found > 0).all() and error < smallest:
                E, A, B = found
                best, smallest = Law(E, A * N**a, a, B * D**b, b), error
    return best


def frontier(law: Law, points: list[Point], compute: np.ndarray) -> np.ndarray:
    """The law's lowest loss with so much compute; NaN where that takes a size, or tokens per
    weight, beyond those of the points it was fitted to: there it is a guess."""
    losses, weights = law.best(compute)
    sizes, ratios = [p.weights for p in points], [p.tokens / p.weights for p in points]
    tokens_per_weight = compute / 6 / weights**2
    known = ((min(sizes) <= weights) & (weights <= max(sizes))
             & (min(ratios) <= tokens_per_weight) & (tokens_per_weight <= max(ratios)))
    return np.where(known, losses, np.nan)


def speed_up(points: list[Point], against: Point, recipe: str) -> float | None:
    """How much faster the recipe reaches a run's final loss at its depth; None if it never does,
    infinite if it is there before it trains."""
    found = [crossing(point.run, against.loss) for point in points
             if (point.recipe, point.depth) == (recipe, against.depth)]
    times = [at.time if at.step > 0 else 0.0 for at in found if at]
    if not times:
        return None
    return against.run.train_time / min(times) if min(times) else np.inf


def describe_speed_up(times: float | None) -> str:
    if times is None:
        return "not reached"
    return "before it trains" if np.isinf(times) else f"{times:.1f} times"


def render(points: list[Point]) -> str:
    """Markdown: the data, a table of all runs, the laws, and the speed-up at each size."""
    recipes = list(dict.fromkeys(point.recipe for point in points))
    first, lines = points[0].run, []
    lines.append(f"{first.world_size} x {first.hardware}, torch {first.torch}; data: "
                 f"{first.shards[0].name} and on; val_loss on {first.number('val_tokens'):,} "
                 f"tokens.\n")
    rows = [("recipe", "depth", "weights", "tokens per weight", "tokens", "FLOP", "val_loss",
             "train_time"), ("---",) + ("---:",) * 7]
    rows += [(p.recipe, p.depth, f"{p.weights / 1e6:.1f}M", f"{p.ratio:g}",
              f"{p.tokens / 1e6:,.1f}M", f"{p.compute:.2e}", f"{p.loss:.5f}",
              f"{p.run.train_time:,.1f} s") for p in points]
    lines += [f"| {' | '.join(check.cell(str(cell)) for cell in row)} |" for row in rows]
    for recipe in recipes:
        mine = [point for point in points if point.recipe == recipe]
        law = fit_law(mine)
        lines.append("")
        if law is None:
            reason = ("losses do not fall with weights and tokens alike" if spans(mine)
                      else "it takes three sizes and two lengths")
            lines.append(f"`{recipe}`: no law; {reason}.")
            continue
        errors = [law(p.weights, p.tokens) - p.loss for p in mine]
        lines.append(f"`{recipe}`: loss = {law.E:.3f} + {law.A:.4g} / weights^{law.a:.2f} + "
                     f"{law.B:.4g} / tokens^{law.b:.2f}, {np.abs(errors).max():.4f} off at most.")
    for against in recipes[:-1]:
        mine = recipes[-1]
        lines += ["", f"`{mine}` at the final loss of `{against}`:", "",
                  "| depth | tokens per weight | val_loss | as fast |", "| ---: | ---: | ---: | "
                  "---: |"]
        for point in points:
            if point.recipe == against:
                lines.append(f"| {point.depth} | {point.ratio:g} | {point.loss:.5f} | "
                             f"{describe_speed_up(speed_up(points, point, mine))} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, points: list[Point]) -> None:
    """Write a PNG: loss against compute, the runs of a size joined, each law where it is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    recipes = list(dict.fromkeys(point.recipe for point in points))
    compute = np.geomspace(min(p.compute for p in points), max(p.compute for p in points), 100)
    colors = ["tab:gray", "tab:blue", "tab:red", "tab:green"]
    for color, recipe in zip(itertools.cycle(colors), recipes, strict=False):
        mine = [point for point in points if point.recipe == recipe]
        axis.plot([], [], "o-", ms=4, lw=0.8, color=color, alpha=0.7, label=recipe)
        for depth in dict.fromkeys(point.depth for point in mine):
            of_size = [point for point in mine if point.depth == depth]
            axis.plot([p.compute for p in of_size], [p.loss for p in of_size], "o-", ms=4, lw=0.8,
                      color=color, alpha=0.7)
            axis.annotate(f"d{depth}", (of_size[0].compute, of_size[0].loss), fontsize=8,
                          xytext=(3, 3), textcoords="offset points")
        law = fit_law(mine)
        curve = [] if law is None else frontier(law, mine, compute)
        if np.isfinite(curve).any():
            axis.plot(compute, curve, "--", color=color, label=f"{recipe}: the best by its law")
    axis.set(xscale="log", xlabel="training compute, FLOP", ylabel="final val_loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def series_plan(
    depths: list[str], ratios: list[str], recipes: list[str], options: list[str]
) -> dict[str, list[str]]:
    """{name: options} of each run, the shortest and smallest first. LogError if all were alike."""
    for name, lists in (("train_steps", "ratios"), ("target_param_data_ratio", "ratios"),
                        ("depth", "depths"), ("recipe", "recipes")):
        if name in names_of(options):
            raise LogError(f"--{name} would be the same for all runs: leave it out, and name them "
                           f"with --{lists}")
    models = {f"{recipe}-d{depth}": fit_memory([*options, "--recipe", recipe, "--depth", depth])
              for depth in depths for recipe in recipes}
    return {f"{name}-r{ratio}": [*model, "--target_param_data_ratio", ratio]
            for ratio in ratios for name, model in models.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh miniseries", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depths", default="6,8,10,12,16", metavar="N,...", help="default: %(default)s")
    add("--ratios", default="5,10.5,19", metavar="R,...", help="default: %(default)s")
    add("--recipes", metavar="NAME,...",
        help="the last is measured against those before it (default: baseline,record)")
    add("--logs", nargs="+", type=Path, help="train nothing: logs, or folders of logs")
    add_run_options(parser, "logs/miniseries")
    args, options = parse_run_options(parser)
    folder = (args.log_dir or ROOT / "logs" / "miniseries").resolve()
    jobs = []
    if not args.logs:
        if not args.recipes and not visible_gpus():
            raise LogError("there is no GPU; a small series for a CPU: --recipes "
                           "sample-baseline,sample-record --depths 1,2 --ratios 0.002,0.004")
        recipes = args.recipes or "baseline,record"
        lists = (text.split(",") for text in (args.depths, args.ratios, recipes))
        plan = series_plan(*lists, options)
        fetch_data([hyperparameters_of(line) for line in plan.values()])
        jobs = plan_jobs(plan, [], args.seeds, folder)
    done = run_all(jobs, Path("miniseries"), folder, args.per_gpu) if jobs else []
    if jobs and not done:
        raise LogError("not one run has ended well")
    points = read_series(args.logs or [job.log for job in done])
    table = render(points)
    print(f"\n{table}", end="")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table, encoding="utf-8")
    plot(folder / "plot.png", points)
    print(f"\ntable.md and plot.png are in {folder}")
    return 0 if len(done) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
