"""How many tokens to draft, decided from distributions and the past, never from a draw that may be discarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from proxytune.decoding.cost import MAX_DRAFTS, Costs
from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:
    from proxytune.decoding.drafting import Draft

__all__ = ["Pace", "Speculate", "parse_speculate"]

Speculate = Literal["auto"] | bool | int


def parse_speculate(value: Any) -> Speculate:
    """Return ``"auto"``, False (off) or a number of drafts from 1 to 12 unchanged; raise :class:`ProxyTuneError` for
    anything else."""
    if value == "auto" or value is False or (value == 0 and isinstance(value, int)):
        return "auto" if value == "auto" else False
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_DRAFTS:
        return value
    raise ProxyTuneError(
        f"speculate must be 'auto', False, or a number of drafts from 1 to {MAX_DRAFTS}, not {value!r}"
    )


@dataclass
class Estimate:
    """A running estimate of acceptance. It starts at ``prior`` and covers about the last 50 drafts."""

    prior: float
    weight: float = 4.0
    accepted: float = 0.0
    judged: float = 0.0

    @property
    def value(self) -> float:
        return (self.prior * self.weight + self.accepted) / (self.weight + self.judged)

    def saw(self, accepted: int, judged: int) -> None:
        fade = 0.98**judged
        self.accepted, self.judged = self.accepted * fade + accepted, self.judged * fade + judged


class Pace:
    """Decides how many tokens to draft: as long as another draft is expected to gain more than it costs.

    The first draft is almost free, since its logits are part of the mixture. For each further one, the drafting lane
    must read the draft before it, which it would otherwise do only if all were accepted. This pays while the expected
    tokens, at the average cost of a token so far, are worth more (the marginal value theorem). The probability that a
    draft is accepted is learned, separately for confident and unconfident drafts.

    Nothing here reads a clock: the same seed gives the same drafts, and so the same samples.
    """

    PROBE_EVERY = 24  # after so many steps without drafts, one is tried again
    LEVELS = 8  # of confidence

    def __init__(self, speculate: Speculate, costs: Costs, n_batch: int) -> None:
        self.fixed = None if speculate == "auto" else int(speculate)
        self.costs, self.n_batch = costs, n_batch
        self.overall, self.by_lookup = Estimate(0.7), Estimate(0.6)
        self.by_confidence = [Estimate((level + 0.5) / self.LEVELS) for level in range(self.LEVELS)]
        self.earned = 10.0 * n_batch
        self.spent = 10 * costs.per_token(costs.best_drafts(0.7, n_batch), 0.7, n_batch)
        self.plain = costs.cycle(0, 0.0, n_batch)
        self.idle = 0

    def resize(self, n_batch: int) -> None:
        """Continue with fewer rows, whose tokens have other costs."""
        self.n_batch, self.plain = n_batch, self.costs.cycle(0, 0.0, n_batch)

    def chance(self, confidence: float) -> float:
        """How likely a draft of this confidence is to be accepted."""
        return self.by_confidence[self._level(confidence)].value

    def _level(self, confidence: float) -> int:
        return min(int(confidence * self.LEVELS), self.LEVELS - 1)

    def first(self, chances: Sequence[float]) -> bool:
        """Whether to draft at all, given each growing row's chance that its first draft is accepted."""
        if self.fixed is not None:
            return self.fixed > 0
        more = self.costs.verify(1, self.n_batch) - self.costs.verify(0, self.n_batch) + self.costs.moving(self.n_batch)
        more += self._some(chances) * self.costs.draft_step(self.n_batch)
        worth = self._price(len(chances)) * sum(chances) > more
        self.idle = 0 if worth or self.idle >= self.PROBE_EVERY else self.idle + 1
        return self.idle == 0

    def another(self, n_drafts: int, chances: Sequence[float]) -> bool:
        """Whether to draft one more, given each growing row's chance that all its drafts so far are accepted."""
        if self.fixed is not None:
            return n_drafts < self.fixed
        a = self.overall.value
        some = self._some(chances)
        more = self.costs.verify(n_drafts + 1, self.n_batch) - self.costs.verify(n_drafts, self.n_batch)
        more += (1 - some + some * a) * self.costs.draft_step(self.n_batch)
        return n_drafts < MAX_DRAFTS and self._price(len(chances)) * a * sum(chances) > more

    def _price(self, n_growing: int) -> float:
        """The average cost of a token so far, but at most its cost without drafts: bad drafts must not justify more
        drafts."""
        return min(self.spent / self.earned, self.plain / n_growing)

    @staticmethod
    def _some(chances: Sequence[float]) -> float:
        """The chance that at least one row accepts all."""
        none = 1.0
        for chance in chances:
            none *= 1 - chance
        return 1 - none

    def from_lookup(self, found: int) -> int:
        """How many of ``found`` copied tokens to use; 0 if the drafting lane is expected to gain more."""
        if self.fixed is not None or found == 0:
            return 0
        a = self.by_lookup.value
        price, n_drafts = min((self.costs.lookup_per_token(n, a, self.n_batch), n) for n in range(1, found + 1))
        return n_drafts if price < self._price(self.n_batch) * self.n_batch else 0

    def learn(self, draft: Draft, n_accepted: Sequence[int]) -> None:
        """Learn from the drafts of a step, and how many of them each growing row accepted."""
        if self.fixed is not None:
            return
        n_drafts = draft.tokens.shape[1]
        if draft.source == "lookup":  # they come and go with the text, so they do not set the price
            for n in n_accepted:
                self.by_lookup.saw(n, min(n + 1, n_drafts))
            return
        for row, n in zip(draft.confidences, n_accepted):
            for at, confidence in enumerate(row[: n + 1]):
                self.by_confidence[self._level(confidence)].saw(at < n, 1)
            self.overall.saw(n, min(n + 1, n_drafts))
        cost = draft.n_read * self.costs.draft_step(self.n_batch) + self.costs.verify(n_drafts, self.n_batch)
        cost += self.costs.moving(self.n_batch) if n_drafts else 0.0
        self.spent = 0.97 * self.spent + cost + self.costs.overhead
        self.earned = 0.97 * self.earned + sum(n_accepted) + len(n_accepted)
