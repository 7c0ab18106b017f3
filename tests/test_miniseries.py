"""records/miniseries.py: the law that fits a series, the table, the speed-up and the plot."""

import numpy as np
import pytest
from record_logs import our_log, step_lines, write_logs

from miniseries import (  # isort: skip
    Law, fit_law, frontier, plot, read_series, render, speed_up)
from logs import LogError  # isort: skip

TRUE = Law(E=1.8, A=90.0, a=0.33, B=400.0, b=0.29)
SIZES = {4: 16_000_000, 6: 29_000_000, 8: 50_000_000, 12: 123_000_000}


def series_log(recipe="modern", depth=4, ratio=10.0, law=TRUE, step_time=0.5, **changes) -> str:
    """A run whose final loss lies on the law, of 40 steps."""
    weights = SIZES[depth]
    batch = round(ratio * weights / 40)
    final = float(law(weights, 40 * batch))
    text = our_log(recipe=recipe, depth=depth, target_param_data_ratio=ratio, batch_size=batch,
                   lines=step_lines(final=final, step_time=step_time), **changes)
    return text.replace("123,532,032 in matrix", f"{weights:,} in matrix")


def series(folder, recipe="modern", law=TRUE, step_time=0.5):
    return read_series(write_logs(folder, *(
        series_log(recipe, depth, ratio, law, step_time) for depth in SIZES
        for ratio in (5.0, 10.0, 20.0))))


def test_a_law_is_found_again_from_what_lies_on_it(tmp_path):
    law = fit_law(series(tmp_path))
    for weights, tokens in ((16e6, 1e8), (123e6, 2e9), (400e6, 8e9)):
        assert law(weights, tokens) == pytest.approx(TRUE(weights, tokens), abs=0.01)


def test_the_best_loss_is_the_lowest_over_all_sizes():
    compute, sizes = 1e18, np.geomspace(1e6, 1e9, 4001)
    losses = TRUE(sizes, compute / 6 / sizes)
    loss, weights = TRUE.best(compute)
    assert loss == pytest.approx(losses.min(), abs=1e-6)
    assert weights == pytest.approx(sizes[losses.argmin()], rel=0.02)


def test_the_best_loss_is_given_where_its_size_and_length_were_measured(tmp_path):
    points = series(tmp_path)  # 16M to 123M weights, 5 to 20 tokens for each
    compute = np.geomspace(1e13, 1e20, 200)
    law = Law(E=1.8, A=90.0, a=0.3, B=180.0, b=0.3)  # best with 10 tokens per weight, at any size
    found, (losses, weights) = frontier(law, points, compute), law.best(compute)
    known = (weights >= 16e6) & (weights <= 123e6)
    assert 0 < known.sum() < 200
    assert found == pytest.approx(np.where(known, losses, np.nan), nan_ok=True)
    too_long = law._replace(B=360.0)  # best with 100 tokens per weight
    assert np.isnan(frontier(too_long, points, compute)).all()


def test_one_length_or_two_sizes_make_no_law(tmp_path):
    points = series(tmp_path)
    assert fit_law([point for point in points if point.ratio == 5]) is None
    assert fit_law([point for point in points if point.depth < 8]) is None


def test_compute_is_that_of_the_weights_in_products(tmp_path):
    [point] = read_series(write_logs(tmp_path, series_log(depth=6, ratio=10.0)))
    assert point[:4] == ("modern", 6, 10.0, 29_000_000)
    assert point.compute == 6 * 29_000_000 * point.tokens
    assert point.tokens == pytest.approx(10 * 29_000_000, rel=1e-6)


def test_the_speed_up_is_to_the_final_loss_at_the_same_depth(tmp_path):
    better = TRUE._replace(E=1.5)
    points = series(tmp_path / "a", "baseline") + series(tmp_path / "b", "modern", better, 0.25)
    against = next(p for p in points if p[:3] == ("baseline", 8, 10.0))
    times = []
    for point in points:
        if (point.recipe, point.depth) == ("modern", 8):
            _, at, losses = point.run.val_curve
            times.append(np.interp(-against.loss, -losses, at))
    assert len(times) == 3
    assert speed_up(points, against, "modern") == pytest.approx(20.2 / min(times))
    lowest = next(p for p in points if p[:3] == ("modern", 8, 20.0))
    assert speed_up(points, lowest, "baseline") is None


def test_a_loss_that_a_recipe_starts_below_has_no_speed_up(tmp_path):
    poor = TRUE._replace(E=11.0)  # it ends above the 10.8 that every run here starts from
    points = series(tmp_path / "a", "baseline", poor) + series(tmp_path / "b", "modern")
    assert speed_up(points, points[0], "modern") == np.inf
    text = render(points)
    assert text.count("| before it trains |") == 12 and "inf" not in text


def test_the_table_tells_all_runs_the_laws_and_the_speed_up(tmp_path):
    points = series(tmp_path / "a", "baseline") + series(tmp_path / "b", "modern",
                                                         TRUE._replace(E=1.5), 0.25)
    text = render(points)
    assert text.count("| baseline |") == text.count("| modern |") == 12
    assert text.count("off at most") == 2 and "`modern` at the final loss of `baseline`" in text
    assert "| 8 | 50.0M | 10 |" in text and text.count(" times |") == 12
    plot(tmp_path / "it.png", points)
    assert (tmp_path / "it.png").stat().st_size > 10_000


def test_the_last_recipe_is_measured_against_the_others_whatever_their_names(tmp_path):
    logs = write_logs(tmp_path, *(series_log(recipe, depth, ratio)
                                  for ratio in (5.0, 10.0) for depth in (4, 6)
                                  for recipe in ("record", "modern")))
    points = read_series(logs)
    assert [point[:3] for point in points[:2]] == [("record", 4, 5.0), ("record", 4, 10.0)]
    text = render(points)
    assert "`modern` at the final loss of `record`" in text and "`record` at" not in text


def test_without_a_law_the_table_says_why(tmp_path):
    points = series(tmp_path, "baseline")
    assert "takes three sizes" in render([p for p in points if p.depth == points[0].depth])
    worse = [p._replace(weights=round(1e15 / p.weights)) for p in points]
    assert fit_law(points) and fit_law(worse) is None
    assert "losses do not fall with weights" in render(worse)


@pytest.mark.parametrize("text, expected", [
    (our_log(), "--depth"),
    (series_log().replace("step:40/40", "step:39/40"), "run"),
    (series_log(gpu="NVIDIA A100"), "hardware"),
])
def test_a_log_that_is_no_run_of_the_series_is_refused(tmp_path, text, expected):
    with pytest.raises(LogError, match=expected):
        read_series(write_logs(tmp_path, series_log(), text))
