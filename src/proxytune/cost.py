"""What a token costs: the cost model of steered and of speculative decoding, as pure arithmetic.

A forward of one set of weights costs ``fixed + per_row * rows``: the weights are read once, whatever the rows, and
each row (a token of a sequence) adds its share of arithmetic. At small batches the first term rules, which is why
verifying several drafted tokens in one pass costs little more than one token (2211.17192, section 3).

The unit is free (bytes, seconds, base steps), as long as one calculation keeps to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MAX_GAMMA", "Cost", "Costs", "expected_tokens"]

MAX_GAMMA = 12  # drafted tokens a cycle; beyond, acceptance has decayed for any realistic expert


@dataclass(frozen=True)
class Cost:
    """One forward of a lane (a set of weights): ``fixed + per_row * rows``, in any unit."""

    fixed: float
    per_row: float = 0.0

    def of(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Costs:
    """The lanes of a recipe, as far as speed goes.

    Attributes:
        base: the lane that holds the base. draft: the lane that drafts, with ``draft_seats`` members in it.
        others: the remaining lanes, each with its number of seats.
        overhead: what one step costs beyond the forwards: mixing, choosing, bookkeeping.
    """

    base: Cost
    draft: Cost | None
    draft_seats: int = 1
    others: Sequence[tuple[Cost, int]] = ()
    overhead: float = 0.0

    def base_alone(self, n_batch: int = 1) -> float:
        """One token of every row, by the base alone."""
        return self.base.of(n_batch)

    def cycle(self, gamma: int, acceptance: float, n_batch: int = 1) -> float:
        """One cycle: ``gamma`` drafting steps, one verifying pass of all other lanes, and the drafting lane's step
        on the last draft, which is only taken where some row accepted all of them. ``gamma`` = 0 is plain decoding.
        """
        draft = 0.0
        if self.draft is not None:
            last = 1 - (1 - acceptance**gamma) ** n_batch
            draft = (gamma + last) * self.draft.of(n_batch * self.draft_seats)
        verify = self.base.of(n_batch * (gamma + 1))
        verify += sum(cost.of(n_batch * (gamma + 1) * seats) for cost, seats in self.others)
        return draft + verify + self.overhead

    def per_token(self, gamma: int, acceptance: float, n_batch: int = 1) -> float:
        """The cost of one more token of every row."""
        return self.cycle(gamma, acceptance, n_batch) / expected_tokens(acceptance, gamma)

    def best_gamma(self, acceptance: float, n_batch: int = 1, most: int = MAX_GAMMA) -> int:
        """The number of drafts that makes a token cheapest; 0 where drafting does not pay."""
        if self.draft is None:
            return 0
        return min(range(most + 1), key=lambda gamma: self.per_token(gamma, acceptance, n_batch))


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens a cycle: ``(1 - a^(gamma + 1)) / (1 - a)`` (2211.17192, eq. 1), at least the one that M gives itself."""
    if acceptance >= 1:
        return gamma + 1.0
    return (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
