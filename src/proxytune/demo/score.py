"""Counts, and how far they can be trusted: Wilson's interval and the exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["mcnemar", "wilson"]


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as two numbers in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share, weight = correct / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """The paired two-sided exact test of two arms on the same problems.

    Returns:
        problems that only the first solved, problems that only the second solved, and the p-value.
    """
    won = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return won, lost, min(1.0, 2 * tail / 2 ** (won + lost))
