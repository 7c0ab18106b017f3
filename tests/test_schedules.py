"""Learning rates, momentum and attention windows as functions of the step."""

import dataclasses
import math

import pytest
from conftest import baseline_args, build, tiny_args

from train_gpt import (
    ahead_weights,
    attention_windows,
    build_optimizers,
    lr_multiplier,
    muon_momentum,
    parse_hyperparameters,
    set_schedules,
)

MODERN = parse_hyperparameters(["--track", "single-gpu"])


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 256),
        (1, 2 / 256),
        (254, 255 / 256),
        (255, 1.0),
        (256, 1.0),
        (3743, 1.0),
        (3744, 1.0),
        (3745, 1023 / 1024),
        (4256, 0.5),
        (4767, 1 / 1024),
    ],
)
def test_the_baseline_rises_256_steps_and_falls_1024(step, expected):
    assert lr_multiplier(step, baseline_args()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps, rise, fall", [(380, 20, 82), (391, 21, 84), (2384, 128, 512)])
def test_a_shorter_baseline_keeps_the_shares_of_its_phases(steps, rise, fall):
    args = baseline_args(train_steps=steps)
    for step in range(steps):
        expected = min((step + 1) / rise, 1.0, (steps - step) / fall)
        assert lr_multiplier(step, args) == pytest.approx(expected)


def test_the_modern_recipe_is_flat_and_then_falls_to_its_final_share():
    args = dataclasses.replace(MODERN, train_steps=1000, cooldown_frac=0.4, final_lr_frac=0.1)
    values = [lr_multiplier(step, args) for step in range(1001)]
    assert values[:601] == [1.0] * 601
    assert values[800] == pytest.approx(0.55)
    assert values[1000] == pytest.approx(0.1)
    falls = {round(a - b, 9) for a, b in zip(values[600:-1], values[601:], strict=True)}
    assert falls == {round(0.9 / 400, 9)}


@pytest.mark.parametrize("shape, half, quarter", [
    ("linear", 0.5, 0.25), ("cosine", 0.5, 0.1464466), ("sqrt", 1 - 0.5**0.5, 1 - 0.75**0.5)])
def test_a_cooldown_of_each_shape_falls_all_the_way(shape, half, quarter):
    args = dataclasses.replace(MODERN, train_steps=100, cooldown_frac=0.4, final_lr_frac=0.1,
                               cooldown_shape=shape)
    values = [lr_multiplier(step, args) for step in (60, 80, 90, 100)]
    assert values == pytest.approx([1.0, 0.1 + 0.9 * half, 0.1 + 0.9 * quarter, 0.1])


@pytest.mark.parametrize("growth, expected", [
    ("linear", [128, 640, 1024, 1536, 2048]), ("geometric", [128, 256, 512, 1024, 2048]),
    ("stepwise", [128, 128, 1152, 2048, 2048])])
def test_windows_grow_in_each_way_from_their_start_to_their_end(growth, expected):
    args = dataclasses.replace(MODERN, train_steps=100, window_start=128, window_end=2048,
                               window_growth=growth)
    windows = [attention_windows(step, args) for step in (0, 25, 50, 75, 100)]
    if growth == "linear":
        expected = [128 * math.ceil((128 + 19.2 * step) / 128) for step in (0, 25, 50, 75, 100)]
    assert windows == [(long // 2, long) for long in expected]


def test_geometric_windows_end_where_they_should():
    for start, end in ((448, 3712), (256, 1792), (64, 2048)):
        args = dataclasses.replace(MODERN, window_start=start, window_end=end,
                                   window_growth="geometric")
        assert attention_windows(args.train_steps, args) == (end // 2, end)


def test_a_stage_of_smaller_batches_has_smaller_learning_rates():
    args = dataclasses.replace(MODERN, train_steps=9, cooldown_frac=0.0, batch_size=400,
                               batch_stages="100,200,400", batch_lr_power=0.5)
    values = [lr_multiplier(step, args) for step in range(9)]
    assert values == pytest.approx([0.5] * 3 + [0.5**0.5] * 3 + [1.0] * 3)
    falling = dataclasses.replace(args, cooldown_frac=1.0, final_lr_frac=0.0, batch_lr_power=1.0)
    assert [lr_multiplier(step, falling) for step in (3, 8)] == pytest.approx([1 / 3, 1 / 9])


def test_the_optimizers_divide_by_the_tokens_of_the_step():
    args = tiny_args(batch_stages="512,1024", train_steps=2)
    optimizers = build_optimizers(build(args), args)
    for step, tokens in enumerate((512, 1024)):
        set_schedules(optimizers, step, args)
        scales = {group["grad_scale"] for o in optimizers for group in o.param_groups}
        assert scales == {1 / tokens}


@pytest.mark.parametrize("train_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("fractions", [(0, 0), (0, 1), (1, 0), (0.5, 0.5), (0.01, 0.01)])
def test_learning_rates_stay_within_0_and_1_in_the_shortest_runs(train_steps, fractions):
    args = dataclasses.replace(MODERN, train_steps=train_steps, warmup_frac=fractions[0],
                               cooldown_frac=fractions[1])
    for step in range(train_steps):
        assert 0 < lr_multiplier(step, args) <= 1
        assert 0.85 <= muon_momentum(step, args) <= 0.95


def test_momentum_rises_from_085_to_its_final_value_over_a_fifth():
    args = dataclasses.replace(MODERN, train_steps=1000, muon_momentum=0.95)
    assert muon_momentum(0, args) == pytest.approx(0.85)
    assert muon_momentum(100, args) == pytest.approx(0.90)
    assert muon_momentum(199, args) < 0.95
    for step in (200, 201, 999, 1000):
        assert muon_momentum(step, args) == pytest.approx(0.95)
    assert muon_momentum(1000, dataclasses.replace(args, muon_momentum=0.9)) == pytest.approx(0.9)


def test_the_tokens_ahead_lose_their_weight_one_after_the_other_from_the_last_on():
    args = dataclasses.replace(MODERN, train_steps=60, tokens_ahead=3)
    weights = {step: ahead_weights(step, args) for step in range(60)}
    assert weights[0] == [1.0, 0.5, 0.25]
    assert weights[10] == [1.0, 0.5, 0.125]
    assert weights[20] == [1.0, 0.5, 0.0]
    assert weights[30] == [1.0, 0.25, 0.0]
    assert all(weights[step] == [1.0, 0.0, 0.0] for step in range(40, 60))
    assert ahead_weights(5, dataclasses.replace(args, tokens_ahead=1)) == [1.0]
    assert ahead_weights(10, dataclasses.replace(args, tokens_ahead=2)) == [1.0, 0.25]


def test_windows_grow_in_multiples_from_their_start_to_their_end():
    args = dataclasses.replace(MODERN, train_steps=500, window_start=256, window_end=1792)
    windows = [attention_windows(step, args) for step in range(501)]
    assert windows[0] == (128, 256)
    assert windows[250] == (512, 1024)
    assert windows[-1] == (896, 1792)
    assert windows == sorted(windows)
    for short, long in windows:
        assert short % 64 == 0 and long % 128 == 0 and long == 2 * short
    assert {long for _, long in windows} == set(range(256, 1793, 128))


def test_a_window_that_is_no_multiple_is_rounded_up():
    args = dataclasses.replace(MODERN, window_start=1, window_end=1000)
    assert attention_windows(0, args) == (64, 128)
    assert attention_windows(args.train_steps, args) == (512, 1024)


def test_no_window_means_no_limit_at_every_step():
    args = dataclasses.replace(MODERN, window_start=0, window_end=0)
    steps = (0, 1, args.train_steps // 2, args.train_steps)
    assert {attention_windows(step, args) for step in steps} == {(0, 0)}
    assert attention_windows(3000, baseline_args()) == (0, 0)


def test_every_group_follows_the_schedule_from_its_own_learning_rate():
    args = tiny_args(train_steps=100, warmup_frac=0.1, cooldown_frac=0.5, final_lr_frac=0.2,
                     muon_momentum=0.9, matrix_lr=0.1, embed_lr=0.2, head_lr=0.3,
                     scalar_lr=0.4)
    optimizers = build_optimizers(build(args), args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    initial = [group["lr"] for group in groups]
    assert sorted(set(initial)) == [0.1, 0.2, 0.3, 0.4]
    for step, factor, momentum in ((99, 0.216, 0.9), (4, 0.5, 0.86), (30, 1.0, 0.9)):
        set_schedules(optimizers, step, args)
        assert [group["lr"] for group in groups] == pytest.approx([factor * lr for lr in initial])
        momenta = [group["momentum"] for group in groups if "momentum" in group]
        assert momenta and momenta == pytest.approx([momentum] * len(momenta))
