"""How far counts and means can be trusted: Wilson's interval, exact McNemar, e-values, paired bootstrap, gap closed.

Pure functions of numbers, with scipy's tests. All random draws use a seed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, starmap

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "Gap",
    "Interval",
    "bootstrap",
    "bootstrap_of",
    "compare",
    "e_value",
    "gap_closed",
    "highest_e_value",
    "interval",
    "mcnemar",
    "paired_bootstrap",
    "wilson",
]

DRAWS = 10_000
ROUNDING = 1e-12  # a smaller difference of means counts as none
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean in [0, 1] with its 95 % interval, and the name of the method."""

    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Gap:
    """Gap closed with its 95 % interval; None if the tuned model is not clearly apart from the base."""

    value: float | None
    low: float | None
    high: float | None


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as two numbers in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    found = stats.binomtest(correct, total).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """The paired two-sided exact test of two arms on the same problems.

    Returns:
        problems that only the first solved, problems that only the second solved, and the p-value.
    """
    pairs = list(zip(first, second, strict=True))
    won = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    return won, lost, float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def e_value(won: int, lost: int) -> float:
    """The evidence of discordant pairs against two arms being equal. It is valid at any stopping time.

    Of n = won + lost problems that only one of two paired arms solved, each is as likely to be won as lost if the arms
    are equal. The e-value is the likelihood ratio of a win rate drawn uniformly from [0, 1] against a rate of 1/2::

        e = 2**n / ((n + 1) * C(n, won))

    Under equal arms it is a test martingale that begins at 1, so by Ville's inequality the chance that it *ever*
    reaches 1 / level is at most the level. So the rule "the arms differ, as e >= 1 / level" may be tried after every
    pair, and one may stop when it holds, which a p-value such as McNemar's does not allow. (Ville 1939; Ramdas et al.,
    Game-theoretic statistics and safe anytime-valid inference, 2210.01948.)

    Returns:
        A number above 0, at most the largest float. It is symmetric; the two counts show which arm is ahead.

    Raises:
        ValueError: for a negative count.
    """
    if min(won, lost) < 0:
        raise ValueError(f"won and lost are counts, not {won} and {lost}")
    n = won + lost
    return float(min(Fraction(2**n, (n + 1) * math.comb(n, won)), Fraction(sys.float_info.max)))


def highest_e_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The highest :func:`e_value` of two arms along the problems, in the order in which they were answered.

    It too reaches 1 / level with a probability of at most the level, by Ville's inequality. So a clear result stays
    clear.

    Raises:
        ValueError: if the arms have answered different numbers of problems.
    """
    won = accumulate(bool(a and not b) for a, b in zip(first, second, strict=True))
    lost = accumulate(bool(b and not a) for a, b in zip(first, second, strict=True))
    return max(starmap(e_value, set(zip(won, lost))), default=1.0)


def interval(examples: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one arm's examples: Wilson's interval where each is 0 or 1, otherwise the bootstrap's."""
    if not examples:
        return Interval(0.0, 0.0, 1.0, "none")
    mean = float(np.mean(examples))
    if zero_or_one(examples):
        return Interval(mean, *wilson(round(sum(examples)), len(examples)), "Wilson")
    return Interval(mean, *bootstrap(examples, seed), "bootstrap")


def bootstrap(examples: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, over examples resampled with replacement."""
    (means,) = _resampled_means([examples], seed)
    return _percentiles(means)


def bootstrap_of(
    statistic: Callable[..., Floats], columns: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a statistic of means, over resampled examples; all columns of an example stay
    together.

    With sums and counts of several values per example, ``lambda total, count: total / count`` is the mean of the
    values, and its interval knows that the values of one example are not independent.

    Args:
        statistic: of arrays (n_draws,), one per column. Draws for which it is not finite are left out.
        columns: (n_columns, n_examples).

    Returns:
        None for fewer than two examples, and if it is never finite.
    """
    if len(columns[0]) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(*_resampled_means(columns, seed))
    finite = values[np.isfinite(values)]
    return _percentiles(finite) if finite.size else None


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Two arms on the same examples: the 95 % interval of the mean difference, and a two-sided p-value.

    p is twice the share of draws on the far side of 0, never below 2 / (draws + 1).
    """
    if list(first) == list(second):
        return 0.0, 0.0, 1.0
    means, others = _resampled_means([first, second], seed)
    difference = means - others
    far = min(int((difference <= ROUNDING).sum()), int((difference >= -ROUNDING).sum()))
    return *_percentiles(difference), min(1.0, 2 * (far + 1) / (DRAWS + 1))


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, str]:
    """The two-sided p-value of a difference, and the test: exact McNemar if all examples are 0 or 1."""
    if zero_or_one(first) and zero_or_one(second):
        return mcnemar([bool(v) for v in first], [bool(v) for v in second])[2], "exact McNemar"
    return paired_bootstrap(first, second, seed)[2], "paired bootstrap"


def gap_closed(base: Sequence[float], steered: Sequence[float], tuned: Sequence[float], seed: int = 0) -> Gap:
    """(steered - base) / (tuned - base) of the means, with a paired 95 % bootstrap interval (2401.08565, section 4).

    The ratio has no meaning if tuned and base are equal; then the value is None. There is no interval if more than 2.5
    % of the draws put the tuned model on the other side of the base.
    """
    apart = float(np.mean(tuned) - np.mean(base)) if len(base) else 0.0
    if apart == 0:
        return Gap(None, None, None)
    value = float(np.mean(steered) - np.mean(base)) / apart
    bases, steereds, tuneds = _resampled_means([base, steered, tuned], seed)
    gaps = tuneds - bases
    same_side = gaps * apart > 0
    if same_side.mean() < 0.975:
        return Gap(value, None, None)
    low, high = _percentiles(((steereds - bases)[same_side]) / gaps[same_side])
    return Gap(value, low, high)


def zero_or_one(examples: Sequence[float]) -> bool:
    """Whether every example was either right or wrong."""
    return all(value in (0, 1) for value in examples)


def _resampled_means(arms: Sequence[Sequence[float]], seed: int) -> list[Floats]:
    """The means of each arm over the same draws of examples: one array (n_draws,) an arm."""
    if len({len(arm) for arm in arms}) > 1:
        raise ValueError("paired arms must have the same examples")
    values = np.array(arms)  # (n_arms, n_examples): the columns are drawn, so pairs stay together
    if values.shape[1] == 1:  # scipy wants two
        return [np.full(DRAWS, value) for value in values[:, 0]]
    batch = max(1, 4_000_000 // values.size)  # draws at a time: each takes 8 bytes an example and arm
    drawn = stats.bootstrap((values,), np.mean, n_resamples=DRAWS, batch=batch, axis=-1, method="percentile", rng=seed)
    return list(drawn.bootstrap_distribution)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
