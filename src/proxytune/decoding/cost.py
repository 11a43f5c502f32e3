"""What a token costs: the cost model of steered and of speculative decoding, as pure arithmetic.

A forward of one set of weights costs ``fixed + per_row * rows``: the weights are read once, whatever the rows, and each
row (a token of a sequence) adds its share of arithmetic. At small batches the first term dominates, so verifying
several drafted tokens in one pass costs little more than one token (2211.17192, section 3).

The unit is free (bytes, seconds, base steps), as long as each calculation uses only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "APART_BYTES",
    "MAX_DRAFTS",
    "QUICK_HEAD",
    "QUICK_ROWS",
    "Cost",
    "Costs",
    "cost_of_weights",
    "expected_tokens",
]

MAX_DRAFTS = 12  # of one cycle; beyond, acceptance has decayed for any realistic expert

# The cost of launching a layer's kernels, as the number of bytes that could be read in that time. Orders of magnitude
# of eager PyTorch, enough to choose a number of drafts; `proxytune plan --probe` measures.
LAYER_BYTES = {"cpu": 8e6, "cuda": 2e8}
# Arithmetic of one more row, as a share of the time that reading the weights takes. On the CPU measured: 16 rows of the
# demo's base take 1.9 times as long as one; on a GPU an order of magnitude.
ROW_SHARE = {"cpu": 0.1, "cuda": 0.004}
# What each row of a batch adds to a cycle of drafts, besides its forwards, in bytes. Rows of unequal length are moved
# in their caches, go through the processors one by one, and end at different times, while all are computed to the end.
# On the CPU set by the demo: drafting pays there at two rows (1.34 times the speed without) and not at four (0.82).
APART_BYTES = {"cpu": 3e8, "cuda": 2e8}
# PyTorch's CPU `linear` rearranges its weights in each call with more than one row (see kernels.py).
UNPACKED_CPU = 1.6
# What the quick head of a drafting lane reads, of its own float32 head's bytes (kernels.QuickHead).
QUICK_HEAD = 0.25
# The quick head is faster up to this number of rows. With more rows, arithmetic takes the time, not reading.
QUICK_ROWS = 8


@dataclass(frozen=True)
class Cost:
    """One forward of a lane (a set of weights) over ``rows`` rows, in any unit.

    Attributes:
        fixed: independent of the rows. per_row: for each row. several: the factor on ``fixed`` if there are several
            rows.
    """

    fixed: float
    per_row: float = 0.0
    several: float = 1.0

    def of(self, rows: float) -> float:
        return self.fixed * (self.several if rows > 1 else 1.0) + self.per_row * rows


@dataclass(frozen=True)
class Costs:
    """The costs of a recipe's lanes.

    Attributes:
        base: the lane that holds the base. draft: the lane that drafts, with ``draft_seats`` members in it.
        others: the remaining lanes, each with its number of seats; and the drafting lane's own head, where a quick one
            chooses the drafts.
        overhead: what one cycle costs beyond the forwards: mixing, choosing, bookkeeping.
        apart: what each row of a batch adds to a cycle with drafts, after which rows are of unequal length.
    """

    base: Cost
    draft: Cost | None = None
    draft_seats: int = 1
    others: Sequence[tuple[Cost, int]] = ()
    overhead: float = 0.0
    base_seats: int = 1
    apart: float = 0.0

    def draft_step(self, n_batch: int = 1) -> float:
        """The drafting lane reads one token of every row."""
        return 0.0 if self.draft is None else self.draft.of(n_batch * self.draft_seats)

    def verify(self, n_drafts: float, n_batch: int = 1) -> float:
        """All other lanes read the newest token and the drafts in one pass."""
        rows = n_batch * (n_drafts + 1)
        return self.base.of(rows * self.base_seats) + sum(cost.of(rows * seats) for cost, seats in self.others)

    def moving(self, n_batch: int = 1) -> float:
        """What a cycle with drafts adds because the rows of a batch accept unequal numbers."""
        return self.apart * n_batch if n_batch > 1 else 0.0

    def cycle(self, n_drafts: float, acceptance: float, n_batch: int = 1) -> float:
        """One cycle: the drafting steps, the verifying pass, and the drafting lane's step on the last draft, which is
        needed only if some row accepted all of them. Without drafts it is plain decoding.
        """
        last = 1 - (1 - acceptance**n_drafts) ** n_batch
        forwards = (n_drafts + last) * self.draft_step(n_batch) + self.verify(n_drafts, n_batch)
        return forwards + self.overhead + (self.moving(n_batch) if n_drafts else 0.0)

    def lookup_cycle(self, n_drafts: float, n_batch: int = 1) -> float:
        """One cycle whose drafts were looked up: every lane reads them in one pass."""
        draft = 0.0 if self.draft is None else self.draft.of(n_batch * (n_drafts + 1) * self.draft_seats)
        return draft + self.verify(n_drafts, n_batch) + self.overhead + self.moving(n_batch)

    def per_token(self, n_drafts: int, acceptance: float, n_batch: int = 1) -> float:
        """The cost of one more token of every row."""
        return self.cycle(n_drafts, acceptance, n_batch) / expected_tokens(acceptance, n_drafts)

    def lookup_per_token(self, n_drafts: int, acceptance: float, n_batch: int = 1) -> float:
        """The same with looked-up drafts."""
        return self.lookup_cycle(n_drafts, n_batch) / expected_tokens(acceptance, n_drafts)

    def best_drafts(self, acceptance: float, n_batch: int = 1, most: int = MAX_DRAFTS) -> int:
        """The number of drafts that makes a token cheapest; 0 where drafting does not pay."""
        if self.draft is None:
            return 0
        return min(range(most + 1), key=lambda n: self.per_token(n, acceptance, n_batch))

    def drafts_pay(self, acceptance: float, n_batch: int = 1) -> bool:
        """Whether some number of drafts makes a token cheaper; copied drafts, if no lane can draft."""
        if self.draft is not None:
            return self.best_drafts(acceptance, n_batch) > 0
        plain = self.cycle(0, 0.0, n_batch)
        return any(self.lookup_per_token(n, acceptance, n_batch) < plain for n in range(1, MAX_DRAFTS + 1))


def cost_of_weights(n_bytes: float, n_layers: int, device: str = "cuda", *, packed: bool = True) -> Cost:
    """One lane's cost in bytes, from what it reads in a step.

    Args:
        n_bytes: of all weights that a token passes through.
        n_layers: decoder layers.
        device: a torch device type; what is not listed counts as ``cuda``.
        packed: on a CPU, whether :func:`proxytune.lanes.kernels.pack` has laid the weights out.
    """
    kind = device if device in LAYER_BYTES else "cuda"
    several = UNPACKED_CPU if kind == "cpu" and not packed else 1.0
    return Cost(n_bytes + n_layers * LAYER_BYTES[kind], n_bytes * ROW_SHARE[kind], several)


def expected_tokens(acceptance: float, n_drafts: int) -> float:
    """Tokens per cycle: ``(1 - a^(γ + 1)) / (1 - a)`` (2211.17192, eq. 1), at least the one that M gives itself."""
    if acceptance >= 1:
        return n_drafts + 1.0
    return (1 - acceptance ** (n_drafts + 1)) / (1 - acceptance)
