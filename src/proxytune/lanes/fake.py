"""A lane with known logits: a function of the text alone, in place of a model. For tests, and as an example.

It keeps the ids that it has read, and its logits can be computed by hand. So code that uses lanes can be tested with
it, without a download.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxytune.decoding.cost import Cost
from proxytune.decoding.lane import Scores
from proxytune.lanes.texts import TextState
from proxytune.recipe.layout import Seat
from proxytune.recipe.parts import Prompt

__all__ = ["FakeLane", "hashed_logits"]

LogitsOf = Callable[[Sequence[int]], Tensor]


def hashed_logits(n_vocab: int, seed: int = 0, scale: float = 3.0) -> LogitsOf:
    """Logits that depend on every token of the text, and look random: (n_vocab,), float32."""

    def logits(text: Sequence[int]) -> Tensor:
        state = seed + 1
        for token in text:
            state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**63
        return torch.randn(n_vocab, generator=torch.Generator().manual_seed(state)) * scale

    return logits


class FakeLane:
    """A lane whose members' logits are given functions.

    Args:
        logits_of: for each seat the function from a text, as ids, to the logits of its next token, (n_vocab,).
        names: the members of each seat.
        n_vocab: the length of what the functions give.
    """

    complete = True
    context: int | None = None
    tolerance = 0.0
    device = torch.device("cpu")
    quick_head: Callable[[Tensor], Tensor] | None = None
    cost = Cost(1.0)
    head_cost: Cost | None = None

    def __init__(self, logits_of: Sequence[LogitsOf], names: Sequence[tuple[str, ...]], n_vocab: int) -> None:
        self.logits_of = list(logits_of)
        self.seats = tuple(Seat(own, Prompt()) for own in names)
        self.n_vocab = n_vocab
        self.n_computed = 0  # texts that were scored, for tests

    def open(self, n_batch: int, capacity: int | None = None) -> FakeState:
        return FakeState(self, n_batch)  # a list has room for any number of columns


class FakeState(TextState):
    """The texts that a :class:`FakeLane` has read, scored again at each position."""

    def __init__(self, lane: FakeLane, n_batch: int) -> None:
        super().__init__(len(lane.seats), n_batch)
        self.lane = lane

    def read(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: int = 0, want: Tensor | None = None
    ) -> Scores:
        """See :class:`proxytune.decoding.lane.LaneState`; all is scored, whatever is wanted."""
        self.take(ids, mask)
        k = ids.shape[1]
        ahead = range(len(self.pending) - (min(positions, k) or k) + 1, len(self.pending) + 1)
        rows = range(len(self.texts))
        return Scores(torch.stack([torch.stack([self._score(row, at) for row in rows]) for at in ahead], dim=1))

    def _score(self, row: int, ahead: int) -> Tensor:
        self.lane.n_computed += 1
        return self.lane.logits_of[row // self.n_batch](self.text(row, ahead))
