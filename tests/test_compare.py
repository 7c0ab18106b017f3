"""records/compare.py: speed-ups at a loss, what is not comparable, and the plot."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from record_logs import our_log, public_log, shard_lines, step_lines, write_logs

import train_gpt

from compare import PEAK_RATES, compare, crossing, plot  # isort: skip  records/ is on the path from here on
from logs import LogError, read_logs  # isort: skip


def lines(*points: tuple[int, float, float], steps: int = 40) -> list[str]:
    """Validations at (step, seconds, val_loss)."""
    return [f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{1000 * seconds:.0f}ms "
            f"step_avg:{1000 * seconds / max(1, step):.2f}ms" for step, seconds, loss in points]


def runs(folder, *texts):
    return read_logs(write_logs(folder, *texts))


def at(*times, final=3.3, **header):
    """Logs of runs that reach 3.4 after each of these times, straight from 4.4 at 0 s."""
    return [our_log(seed=seed, lines=lines((0, 0, 4.4), (20, time, 3.4), (40, 2 * time, final)),
                    **header) for seed, time in enumerate(times)]


def command(*argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "records" / "compare.py"), *map(str, argv)],
                          capture_output=True, text=True, timeout=60)


def test_the_crossing_is_interpolated_between_the_validations_around_it(tmp_path):
    [run] = runs(tmp_path, our_log(
        lines=lines((0, 0, 10), (10, 100, 5), (20, 220, 4), (40, 460, 3))))
    where = crossing(run, 4.25)
    assert where.step == pytest.approx(17.5) and where.time == pytest.approx(190)
    assert where.tokens == pytest.approx(17.5 * 393_216) and where.gap == pytest.approx(1)
    assert crossing(run, 3)[:2] == (40, 460) and crossing(run, 2.99) is None


def test_the_first_crossing_counts_where_the_loss_rises_again(tmp_path):
    [run] = runs(tmp_path, our_log(
        lines=lines((0, 0, 5), (10, 100, 4), (20, 200, 4.5), (40, 400, 3.5))))
    assert crossing(run, 4.0).time == pytest.approx(100)
    assert crossing(run, 4.2).time == pytest.approx(80)


def test_a_crossing_at_a_validation_is_not_interpolated(tmp_path):
    [run] = runs(tmp_path, our_log(lines=lines((0, 0, 5), (40, 100, 4))))
    assert crossing(run, 4.0).gap == 0 and crossing(run, 4.1).gap == pytest.approx(1)


def test_the_speedup_is_the_ratio_of_mean_times(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100, 110, 120)),
                     runs(tmp_path / "b", *at(50, 55, 51)), 3.4)
    assert result.speedup == pytest.approx(110 / 52)
    assert not result.problems


def test_welch_tests_the_times_of_both_sides(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100, 110, 120)),
                     runs(tmp_path / "b", *at(90, 105, 95)), 3.4)
    assert result.welch.difference == pytest.approx(13 + 1 / 3)
    # scipy 1.17: ttest_ind(..., equal_var=False, alternative="greater"), and the interval of the
    # two-sided test
    assert result.welch.p == pytest.approx(0.07264889764132305, rel=1e-9)
    assert (result.welch.low, result.welch.high) == pytest.approx(
        (-7.400084903730168, 34.066751570396825), rel=1e-9)


def test_one_run_a_side_has_a_speedup_but_no_test(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50)), 3.4)
    assert result.speedup == pytest.approx(2) and result.welch is None


def test_the_default_loss_is_the_target_if_all_reach_it(tmp_path):
    reached = compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50)))
    assert reached.loss == 3.3821 and "target of track single-gpu" in reached.why


def test_the_default_loss_is_else_what_all_reach(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100, final=3.39)),
                     runs(tmp_path / "b", *at(50, final=3.35)))
    assert result.loss == pytest.approx(3.39) and "all runs reach" in result.why


def test_a_loss_that_is_never_reached_is_an_error_that_names_run_and_lowest_loss(tmp_path):
    with pytest.raises(LogError, match=r"log0.txt never reaches 3.2; its lowest val_loss is 3.3"):
        compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50)), 3.2)


def test_a_loss_above_the_first_validation_is_an_error(tmp_path):
    with pytest.raises(LogError, match="before it trains"):
        compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50)), 11.0)
    # A clock that nothing warmed up for shows a little at step 0.
    late = [our_log(lines=lines((0, 0.005, 4.4), (40, 9, 3.3)))]
    with pytest.raises(LogError, match="before it trains"):
        compare(runs(tmp_path / "c", *late), runs(tmp_path / "d", *late), 4.5)


def test_logs_without_times_cannot_be_compared(tmp_path):
    with pytest.raises(LogError, match="no train_time"):
        compare(runs(tmp_path / "a", "s:0 tel:11.0\ns:250 tel:6.17\n"),
                runs(tmp_path / "b", *at(50)), 6.2)


@pytest.mark.parametrize("header, problem", [
    (dict(gpu="NVIDIA H100 80GB HBM3"), "hardware: NVIDIA H200 against NVIDIA H100 80GB HBM3"),
    (dict(ranks=2), "GPUs: 1 against 2"),
    (dict(torch="2.12.0"), "torch: 2.11.0+cu130 against 2.12.0"),
    (dict(val_tokens=10_485_760), "val_tokens: 1048576 against 10485760"),
    (dict(shards=shard_lines(data="other")), "validation data: "),
    (dict(shards=[]), "validation data: not in all of the logs"),
])
def test_what_has_to_be_equal_is_named_where_it_differs(tmp_path, header, problem):
    result = compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50, **header)), 3.4)
    assert any(found.startswith(problem) for found in result.problems)
    assert len(result.problems) == 1 + ("shards" in header and header["shards"] != [])


def test_reading_more_shards_of_the_same_data_is_comparable(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100)),
                     runs(tmp_path / "b", *at(50, shards=shard_lines(train=5))), 3.4)
    assert not result.problems


@pytest.mark.parametrize("header, note", [
    (dict(batch_size=65_536), "other tokens per step: 393216 against 65536"),
    (dict(optimizer="muon"), "other optimizer: None against muon"),
    (dict(matrix_lr=0.1), "other peak matrix_lr: 0.05 against 0.1"),
])
def test_what_a_fair_comparison_mentions_is_noted(tmp_path, header, note):
    result = compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50, **header)), 3.4)
    assert note in result.notes and not result.problems


def test_a_raised_learning_rate_asks_for_the_baseline_with_it(tmp_path):
    result = compare(runs(tmp_path / "a", *at(100, optimizer="adam")),
                     runs(tmp_path / "b", *at(50, optimizer="adam", matrix_lr=0.1)), 3.4)
    assert any("run the baseline with it too: --matrix_lr 0.1" in note for note in result.notes)


def test_the_peak_learning_rates_are_all_that_train_gpt_has():
    assert {rate.removesuffix("_lr") for rate in PEAK_RATES} == set(train_gpt.LEARNING_RATES)


def test_validations_far_apart_are_noted_and_close_ones_are_not(tmp_path):
    far = compare(runs(tmp_path / "a", *at(100)), runs(tmp_path / "b", *at(50)), 3.5)
    assert sum("up to 1.00 apart in loss" in note for note in far.notes) == 2
    near = compare(runs(tmp_path / "a", *at(100, final=3.35)),
                   runs(tmp_path / "b", *at(50, final=3.35)), 3.37)
    assert not any("apart" in note for note in near.notes)


def test_the_command_compares_two_logs_and_two_folders(tmp_path):
    [one], [other] = (write_logs(tmp_path / name, *at(time)) for name, time in
                      (("a", 100), ("b", 50)))
    write_logs(tmp_path / "c", *at(100, 102))
    for baseline in (one, tmp_path / "a", tmp_path / "c"):
        done = command("--loss", 3.4, baseline, "--", other)
        assert done.returncode == 0, done.stderr
        assert ("2.000x" if baseline != tmp_path / "c" else "2.020x") in done.stdout


def test_the_command_fails_and_says_so_where_it_is_not_comparable(tmp_path):
    [one], [other] = (write_logs(tmp_path / gpu, *at(100, gpu=gpu)) for gpu in ("H100", "H200"))
    done = command(one, "--", other)
    assert done.returncode == 1 and "NOT COMPARABLE: hardware: H100 against H200" in done.stdout


def test_json_has_the_same_result(tmp_path):
    [one], [other] = (write_logs(tmp_path / name, *at(time)) for name, time in
                      (("a", 100), ("b", 50)))
    found = json.loads(command(one, "--", other, "--json", "--loss=3.4").stdout)
    assert found["speedup"] == pytest.approx(2) and found["comparable"] is True
    assert found["mine"]["crossings"][0]["time"] == pytest.approx(50)


def test_hidden_tokens_are_another_thing_to_predict(tmp_path):
    one, other = (write_logs(tmp_path / str(share), *at(100, masked_share=share))
                  for share in (0.0, 0.15))
    done = command(*one, "--", *other)
    assert done.returncode == 1 and "NOT COMPARABLE: masked_share: 0.0 against 0.15" in done.stdout


def test_public_logs_can_be_compared_but_not_fairly(tmp_path):
    [one], [other] = (write_logs(tmp_path / str(time), public_log(step_lines(step_time=time)))
                      for time in (0.5, 0.25))
    done = command(one, "--", other, "--loss", "5")
    assert done.returncode == 1 and "2.000x" in done.stdout
    assert "NOT COMPARABLE: GPUs: not in all of the logs" in done.stdout


@pytest.mark.parametrize("argv, status, words", [
    (["a.txt", "b.txt"], 2, "parted by one --"),
    (["nowhere.txt", "--", "b.txt"], 1, "nowhere.txt: no such file or folder"),
    (["a.txt", "--"], 2, "LOG"),
    (["a.txt", "--nonsense", "--", "b.txt"], 2, "--nonsense"),
])
def test_a_wrong_command_is_told(argv, status, words):
    done = command(*argv)
    assert done.returncode == status and words in done.stderr


def test_the_plot_shows_both_sides_the_loss_and_the_crossings(tmp_path, monkeypatch):
    """Reads the figure before it is saved: what is drawn, not what a picture looks like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import figure as figures

    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig",
                        lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    sides = runs(tmp_path / "a", *at(100, 104)), runs(tmp_path / "b", *at(50))
    result = compare(*sides, 3.4)
    plot(tmp_path / "it.png", *sides, result)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    for axes, xs in zip(drawn[0].axes, ([100, 104, 50], [20 * 393_216 / 1e6] * 3), strict=True):
        curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(curves) == 3
        assert [p.get_xdata()[0] for p in points] == pytest.approx(xs)
        assert all(p.get_ydata()[0] == 3.4 for p in points)
        [level] = [line for line in axes.lines if len(line.get_xdata()) == 2]
        np.testing.assert_array_equal(level.get_ydata(), [3.4, 3.4])
    assert "2.04x" in drawn[0].get_suptitle() and "fineweb" in drawn[0].get_suptitle()


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path):
    [one], [other] = (write_logs(tmp_path / name, *at(50)) for name in "ab")
    done = command(one, "--", other, "--plot", tmp_path / "nowhere" / "it.png")
    assert done.returncode == 1 and "cannot write" in done.stderr and "x as fast" in done.stdout
