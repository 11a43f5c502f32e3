"""Intervals and paired tests against numbers that were worked out by other means."""

from __future__ import annotations

import math
import sys
from itertools import product

import numpy as np
import pytest
from scipy import stats

from proxytune.evaluation import statistics
from proxytune.evaluation.statistics import (
    Gap,
    Interval,
    bootstrap,
    compare,
    e_value,
    gap_closed,
    highest_e_value,
    interval,
    mcnemar,
    paired_bootstrap,
    wilson,
)

SPREAD = [0.013 * (n * n % 77) for n in range(100)]  # neither all 0 or 1 nor in order


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 600)


def resampled(arms, seed):
    """Each draw's means by a plain loop over the same draws of examples."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(arms[0]), size=(statistics.DRAWS, len(arms[0])))
    return [np.array([np.mean([arm[at] for at in draw]) for draw in chosen]) for arm in arms]


# -- proportions ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 11), (20, 20), (50, 100), (3, 7), (164, 1000)])
def test_wilson_is_where_the_score_test_turns(correct, total):
    """At both ends p the share lies z standard errors of p away: |share - p| = z sqrt(p (1 - p) / n)."""
    low, high = wilson(correct, total)
    z = 1.959964
    share = correct / total
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total))
    assert (low == 0) == (correct == 0)
    assert (high == 1) == (correct == total)


def test_wilson_is_of_95_per_cent_and_knows_nothing_of_nothing():
    assert wilson(50, 100) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5))
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("won", "lost"), [*product(range(5), repeat=2), (10, 2), (2, 10), (9, 30)])
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(won, lost):
    first = [True] * won + [False] * lost + [True] * 5 + [False] * 3
    second = [False] * won + [True] * lost + [True] * 5 + [False] * 3
    flips = won + lost  # of a fair coin; as far from the middle as these, or farther
    expected = sum(math.comb(flips, k) for k in range(flips + 1) if abs(2 * k - flips) >= abs(won - lost)) / 2**flips
    assert mcnemar(first, second) == (won, lost, pytest.approx(expected))


def test_mcnemar_by_hand():
    first = [True] * 10 + [False] * 2 + [True] * 5
    second = [False] * 10 + [True] * 2 + [True] * 5
    assert mcnemar(first, second) == (10, 2, 2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(first, first) == (0, 0, 1.0)


# -- evidence that may be looked at after every pair ------------------------------------------------------------
def test_e_value_by_hand():
    assert e_value(0, 0) == 1
    assert e_value(1, 0) == e_value(0, 1) == 1  # one pair says nothing: 2 / (2 * 1)
    assert e_value(2, 0) == pytest.approx(4 / 3)
    assert e_value(7, 0) == 128 / 8
    assert e_value(8, 0) == pytest.approx(256 / 9)
    assert e_value(5, 5) == pytest.approx(1024 / (11 * 252))
    assert e_value(55, 16) == e_value(16, 55) == pytest.approx(2**71 / (72 * math.comb(71, 16)))
    assert e_value(5000, 0) == sys.float_info.max
    with pytest.raises(ValueError, match="counts"):
        e_value(-1, 3)


def test_the_highest_e_value_is_that_of_some_prefix():
    ours = [True] * 9 + [False] * 4 + [True]
    other = [False] * 8 + [True] * 5 + [True]
    assert highest_e_value(ours, other) == highest_e_value(other, ours) == e_value(8, 0) > e_value(8, 4)
    assert highest_e_value([], []) == highest_e_value([True], [True]) == 1
    with pytest.raises(ValueError, match="shorter"):
        highest_e_value([True], [])


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 1), (20, 22)])
def test_e_value_is_a_martingale_of_equal_arms(won, lost):
    assert (e_value(won + 1, lost) + e_value(won, lost + 1)) / 2 == pytest.approx(e_value(won, lost), rel=1e-12)


def test_e_value_may_be_looked_at_after_every_pair():
    rng = np.random.default_rng(0)

    def ever_reached(rate, evidence):
        """The share of 500 runs of 80 pairs in which the evidence reaches 20 at some time."""
        won = (rng.random((500, 80)) < rate).cumsum(axis=1)
        known = {(int(w), n): evidence(int(w), n - int(w)) for n in range(1, 81) for w in set(won[:, n - 1])}
        return np.mean([any(known[int(w), n] >= 20 for n, w in enumerate(run, start=1)) for run in won])

    assert ever_reached(0.5, e_value) <= 0.05
    assert ever_reached(0.8, e_value) > 0.95
    # What it guards against: McNemar's p below 5 % at some time is far more frequent.
    assert ever_reached(0.5, lambda won, lost: 1 / stats.binomtest(won, won + lost).pvalue) > 0.15


# -- means ----------------------------------------------------------------------------------------------------
def test_an_interval_is_wilsons_where_examples_are_right_or_wrong():
    assert interval([1, 0, 1, 0]) == Interval(0.5, *wilson(2, 4), "Wilson")
    assert interval([1.0, True, 0.0]) == Interval(2 / 3, *wilson(2, 3), "Wilson")
    assert interval([]) == Interval(0.0, 0.0, 1.0, "none")


def test_an_interval_of_other_examples_is_the_bootstraps(few_draws):
    (means,) = resampled([SPREAD], seed=3)
    low, high = np.percentile(means, [2.5, 97.5])
    assert bootstrap(SPREAD, seed=3) == (pytest.approx(low), pytest.approx(high))
    assert interval(SPREAD, seed=3) == Interval(pytest.approx(np.mean(SPREAD)), *bootstrap(SPREAD, 3), "bootstrap")
    half = 1.96 * float(np.std(SPREAD)) / len(SPREAD) ** 0.5  # the normal interval
    assert low == pytest.approx(np.mean(SPREAD) - half, abs=0.01)
    assert high == pytest.approx(np.mean(SPREAD) + half, abs=0.01)


def test_without_a_seed_it_is_0_and_another_draws_anew(few_draws):
    assert bootstrap(SPREAD) == bootstrap(SPREAD, seed=0) != bootstrap(SPREAD, seed=1)
    assert interval(SPREAD) == interval(SPREAD, seed=0) != interval(SPREAD, seed=1)
    other = [value**2 for value in SPREAD]
    assert paired_bootstrap(SPREAD, other) == paired_bootstrap(SPREAD, other, seed=0)
    assert paired_bootstrap(SPREAD, other) != paired_bootstrap(SPREAD, other, seed=1)
    shuffled = SPREAD[1:] + SPREAD[:1]
    assert compare(SPREAD, shuffled) == compare(SPREAD, shuffled, seed=0) != compare(SPREAD, shuffled, seed=1)
    steered, tuned = [value + 0.2 * (n % 3) for n, value in enumerate(SPREAD)], [value + 1 for value in SPREAD]
    assert gap_closed(SPREAD, steered, tuned) == gap_closed(SPREAD, steered, tuned, seed=0)
    assert gap_closed(SPREAD, steered, tuned) != gap_closed(SPREAD, steered, tuned, seed=1)


def test_many_examples_are_drawn_in_pieces(monkeypatch):
    """A draw takes 8 bytes an example and arm: no piece holds more than 4 million of them."""
    batches = []

    def watched(*args, batch, **kwargs):
        batches.append(batch)
        return real(*args, batch=batch, **kwargs)

    real = statistics.stats.bootstrap
    monkeypatch.setattr(statistics.stats, "bootstrap", watched)
    monkeypatch.setattr(statistics, "DRAWS", 30)
    first, second = statistics._resampled_means([[0.25] * 500_000, [0.5] * 500_000], 0)
    assert (first == 0.25).all()
    assert (second == 0.5).all()
    assert len(first) == 30
    assert batches == [4]


def test_one_example_has_no_spread():
    assert interval([0.25]) == Interval(0.25, 0.25, 0.25, "bootstrap")


# -- pairs ----------------------------------------------------------------------------------------------------
def test_a_paired_test_sees_pairs():
    base = [0.1 * (n % 10) for n in range(100)]
    better = [value + 0.02 + 0.001 * (n % 3) for n, value in enumerate(base)]
    low, high, p = paired_bootstrap(better, base)
    assert 0.02 < low < high < 0.023
    assert p == pytest.approx(2 / (statistics.DRAWS + 1)), "no draw lies on the far side"
    assert paired_bootstrap(base, better) == (pytest.approx(-high), pytest.approx(-low), p)
    shuffled = better[1:] + better[:1]
    assert paired_bootstrap(shuffled, base)[2] > 0.05  # the same values, no longer in pairs


def test_a_paired_test_counts_the_draws_on_the_far_side(few_draws):
    first, second = SPREAD[:40], SPREAD[40:80]
    a, b = resampled([first, second], seed=0)
    low, high = np.percentile(a - b, [2.5, 97.5])
    far = min(int((a - b <= 1e-12).sum()), int((a - b >= -1e-12).sum()))
    assert 10 < far < 290, "neither none nor half of them"
    expected = (pytest.approx(low), pytest.approx(high), pytest.approx(2 * (far + 1) / (statistics.DRAWS + 1)))
    assert paired_bootstrap(first, second) == expected


def test_a_draw_of_no_difference_lies_on_both_sides():
    """One pair of two differs: a quarter of the draws has it not at all."""
    for first, second in (([0.5, 1.0], [0.5, 0.0]), ([0.5, 0.0], [0.5, 1.0])):
        low, high, p = paired_bootstrap(first, second)
        assert p == pytest.approx(2 * 0.25, abs=0.02)
        assert {abs(low), abs(high)} == {0.0, 1.0}


def test_equal_arms_do_not_differ():
    assert paired_bootstrap(SPREAD, SPREAD) == (0.0, 0.0, 1.0)
    assert paired_bootstrap(tuple(SPREAD), SPREAD) == (0.0, 0.0, 1.0)
    assert paired_bootstrap([0.5, 0.25], [0.25, 0.5])[2] == 1.0, "a p-value is at most 1"


def test_arms_of_other_examples_are_refused():
    for pair in (([0.5], [0.5, 0.7]), ([0.5, 0.7], [0.5])):
        with pytest.raises(ValueError, match=r"^paired arms must have the same examples"):
            paired_bootstrap(*pair)
    with pytest.raises(ValueError, match="argument 2"):  # zip's own
        mcnemar([True], [True, False])


def test_the_test_goes_by_the_examples():
    right, wrong = [1.0] * 10 + [0.0] * 2, [0.0] * 10 + [1.0] * 2
    assert compare(right, wrong) == (pytest.approx(0.03857421875), "exact McNemar")
    part = [0.5, *right[1:]]
    assert compare(part, wrong) == (paired_bootstrap(part, wrong)[2], "paired bootstrap")
    assert compare(right, [0.5, *wrong[1:]])[1] == "paired bootstrap"


# -- gap closed -----------------------------------------------------------------------------------------------
def test_gap_closed_is_the_ratio_with_a_paired_interval(few_draws):
    base, tuned = [0.0] * 50 + [1.0] * 50, [1.0] * 90 + [0.0] * 10
    steered = [1.0] * 70 + [0.0] * 30
    gap = gap_closed(base, steered, tuned, seed=2)
    assert gap.value == pytest.approx((0.7 - 0.5) / (0.9 - 0.5))
    bases, steereds, tuneds = resampled([base, steered, tuned], seed=2)
    assert (tuneds > bases).all()
    low, high = np.percentile((steereds - bases) / (tuneds - bases), [2.5, 97.5])
    assert (gap.low, gap.high) == (pytest.approx(low), pytest.approx(high))
    assert low < 0.5 < high


def test_a_tuned_model_below_the_base_has_a_gap_too(few_draws):
    base, tuned = [1.0] * 90 + [0.0] * 10, [0.0] * 50 + [1.0] * 50
    gap = gap_closed(base, [1.0] * 70 + [0.0] * 30, tuned)
    assert gap.value == pytest.approx(0.5)
    assert gap.low < 0.5 < gap.high


def test_what_is_the_base_or_the_tuned_model_closes_nothing_or_all():
    base, tuned = [0.0] * 50 + [1.0] * 50, [1.0] * 90 + [0.0] * 10
    assert gap_closed(base, base, tuned) == Gap(0.0, 0.0, 0.0)
    assert gap_closed(base, tuned, tuned) == Gap(1.0, 1.0, 1.0)


def test_where_there_is_no_gap_there_is_none_to_close():
    base, steered = [0.0] * 50 + [1.0] * 50, [1.0] * 100
    assert gap_closed(base, steered, base[::-1]) == Gap(None, None, None)
    assert gap_closed([], [], []) == Gap(None, None, None)


def test_an_interval_needs_draws_on_one_side():
    """With k of n pairs won and none lost, (1 - k / n)^n of the draws have no gap: 3 of 100 are 4.8 %, 4 are 1.7 %."""
    base = [0.0] * 100
    for won, apart in ((3, False), (4, True)):
        tuned = [1.0] * won + base[won:]
        gap = gap_closed(base, [0.5 * value for value in tuned], tuned)
        assert gap.value == pytest.approx(0.5)
        assert gap == (Gap(gap.value, pytest.approx(0.5), pytest.approx(0.5)) if apart else Gap(gap.value, None, None))
