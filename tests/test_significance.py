"""Student's t, its quantile, and the tests of records, against scipy's numbers."""

import math

import pytest
import record_logs  # noqa: F401  finds the modules of records/
from significance import (
    below_target,
    normal_sf,
    sample_std,
    student_t_quantile,
    student_t_sf,
    welch,
)

LOSSES = [3.3791, 3.3799, 3.3785, 3.3802]

# Expected values were computed once with scipy 1.17.1: stats.t.sf(t, df).
TAILS = [
    (0.0, 1, 0.5),
    (1e-06, 1, 0.4999996816759652),
    (1.0, 1, 0.25000000000000006),
    (12.7, 1, 0.025012163844672083),
    (1000000.0, 1, 3.1830988618368455e-07),
    (0.5, 2, 0.33333333333333337),
    (1.7, 2, 0.11561671310078561),
    (1.75, 2, 0.1111111111111111),
    (-3.0, 2, 0.9522670168666454),
    (6.965, 2, 0.009998765127525556),
    (40.0, 2, 0.0003122073360923703),
    (2.5, 3, 0.04385332350403278),
    (0.01, 9, 0.49611972276816263),
    (2.821, 9, 0.010007152313181247),
    (10.0, 9, 1.789118715962368e-06),
    (30.0, 9, 1.2418523520791317e-10),
    (-1.2, 9, 0.8696134013047693),
    (2.0, 4.37, 0.055066260903652034),
    (3.3, 0.8, 0.11739124475433743),
    (2.4, 60, 0.00975765242803103),
    (8.0, 60, 2.450132573975106e-11),
    (1.0, 1000, 0.15877620904233627),
    (5.0, 1999, 3.1165781917158405e-07),
    (12.0, 1999, 2.1854684077186156e-32),
    (0.3, 1000000.0, 0.3820886089894971),
]
# stats.t.isf(p, df)
QUANTILES = [
    (0.025, 1, 12.706204736174705),
    (0.01, 2, 6.964556734283274),
    (0.025, 3.4, 2.9807735025586215),
    (0.3, 5, 0.5594296444693604),
    (0.5, 7, 0.0),
    (0.9, 7, -1.4149239276505086),
    (1e-08, 9, 18.283967455910624),
    (0.025, 25.5, 2.057492834327876),
    (0.001, 1999, 3.094314341814241),
]


@pytest.mark.parametrize("t, df, expected", TAILS)
def test_the_tail_of_students_t_is_scipys(t, df, expected):
    assert student_t_sf(t, df) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("p, df, expected", QUANTILES)
def test_the_quantile_of_students_t_is_scipys(p, df, expected):
    assert student_t_quantile(p, df) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_published_critical_values():
    """From the tables that stand in textbooks: one-sided 1% and 2.5%."""
    for df, at_1, at_2_5 in ((2, 6.965, 4.303), (9, 2.821, 2.262), (30, 2.457, 2.042)):
        assert student_t_quantile(0.01, df) == pytest.approx(at_1, abs=5e-4)
        assert student_t_quantile(0.025, df) == pytest.approx(at_2_5, abs=5e-4)


def test_the_two_tails_of_students_t_add_up_to_one():
    for t in (0, 1e-8, 0.3, 1.73, 1.74, 9.0, 1e5, math.inf):
        for df in (0.5, 1, 3, 11.7, 1e4):
            assert student_t_sf(t, df) + student_t_sf(-t, df) == pytest.approx(1, abs=1e-14)


def test_the_tail_falls_and_the_quantile_undoes_it():
    for df in (1, 2.5, 7, 300):
        tails = [student_t_sf(t / 10, df) for t in range(-60, 61)]
        assert tails == sorted(tails, reverse=True)
        for p in (1e-6, 0.01, 0.3, 0.5, 0.77, 0.999):
            assert student_t_sf(student_t_quantile(p, df), df) == pytest.approx(p, rel=1e-9)


def test_students_t_becomes_normal():
    for t in (-2.0, 0.0, 0.5, 3.0):
        assert student_t_sf(t, 1e7) == pytest.approx(normal_sf(t), rel=1e-5)


def test_three_losses_or_more_take_a_t_test():
    p, name = below_target(LOSSES, 3.38, sigma=5.0)
    assert name == "t-test"
    assert p == pytest.approx(0.11652015591560755, rel=1e-9)


def test_one_loss_or_two_take_a_z_test_with_the_given_sigma():
    p, name = below_target([3.3781], 3.38, sigma=0.0019)  # one sigma below
    assert (p, name) == (pytest.approx(0.15865525393145707), "z-test with sigma 0.0019")
    p, _ = below_target([3.3781, 3.3781], 3.38, sigma=0.0019)  # the square root of two
    assert p == pytest.approx(0.07864960352514251)


def test_p_is_small_only_where_the_mean_is_below_the_target():
    assert below_target(LOSSES, 3.39, 0.0019)[0] < 0.001
    assert below_target(LOSSES, 3.37, 0.0019)[0] > 0.999
    assert below_target([3.1, 3.1, 3.1], 3.2, 0.0019)[0] == 0
    assert below_target([3.2, 3.2, 3.2], 3.2, 0.0019)[0] == 1


def test_more_scatter_makes_p_larger():
    spreads = [below_target([3.37 - s, 3.37, 3.37 + s], 3.38, 0.0019)[0]
               for s in (0.001, 0.005, 0.02)]
    assert spreads == sorted(spreads) and spreads[0] < 0.01 < spreads[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_loss_that_is_no_number_is_never_significant(bad, n):
    p, _ = below_target([bad] + LOSSES[: n - 1], 3.5, 0.0019)
    assert not p < 0.01


def test_the_sample_standard_deviation():
    assert sample_std([1.0, 2.0, 4.0]) == pytest.approx(1.5275252316519468)
    assert math.isnan(sample_std([1.0])) and math.isnan(sample_std([1.0, math.nan]))


def test_welch_agrees_with_scipy():
    """stats.ttest_ind(first, second, equal_var=False), and its confidence_interval()."""
    result = welch([10.1, 10.4, 9.9, 10.2], [9.1, 9.9, 8.7])
    expected = 0.9166666666666661, -0.45944985307497666, 2.292783186408309, 0.05578623722432827
    assert result == pytest.approx(expected, rel=1e-9)


def test_welch_of_a_slower_second_is_not_significant():
    assert welch([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]).p > 0.99


def test_welch_needs_two_values_on_each_side_and_copes_with_no_scatter():
    assert welch([1.0], [2.0, 3.0]) is None and welch([1.0, 2.0], []) is None
    assert welch([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0, 1.0, 0.0)
    assert welch([1.0, 1.0], [1.0, 1.0]).p == 1
