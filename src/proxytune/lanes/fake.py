"""A lane with known logits: a function of the text alone, in place of a model. For tests, and as an example.

It keeps the ids that it has read and computes nothing that a reader could not compute by hand, so whatever is built on
lanes can be held against it without a download.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxytune.decoding.cost import Cost
from proxytune.decoding.lane import Scores, stacked
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
    """A lane whose members' logits are given.

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
        self.n_computed = 0  # texts that were scored, so that tests can see what was not

    def open(self, n_batch: int, capacity: int | None = None) -> FakeState:
        return FakeState(self, n_batch)  # a list has room for any number of columns


class FakeState:
    """The texts that a :class:`FakeLane` has read, a list of ids for each row; see :mod:`proxytune.decoding.lane`."""

    forgets = True

    def __init__(self, lane: FakeLane, n_batch: int) -> None:
        self.lane, self.n_batch, self.n_columns = lane, n_batch, 0
        self.texts: list[list[int]] = [[] for _ in range(n_batch * len(lane.seats))]
        self.pending: list[list[list[int]]] = []  # columns read since the last `keep`: for each, what each row read

    def read(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: int = 0, want: Tensor | None = None
    ) -> Scores:
        """See :class:`proxytune.decoding.lane.LaneState`; all is scored, whatever is wanted."""
        ids = stacked(ids, len(self.texts))
        shown = torch.ones_like(ids) if mask is None else stacked(mask, len(self.texts))
        rows, k = ids.shape
        scores = []
        for column in range(k):
            self.pending.append([[int(ids[row, column])] if shown[row, column] else [] for row in range(rows)])
            if positions == 0 or column >= k - positions:
                scores.append(torch.stack([self._score(row) for row in range(rows)]))
        return Scores(torch.stack(scores, dim=1))

    def _score(self, row: int) -> Tensor:
        self.lane.n_computed += 1
        text = self.texts[row] + [token for column in self.pending for token in column[row]]
        return self.lane.logits_of[row // self.n_batch](text)

    def begin_drafts(self, room: int | None = None) -> None:
        """Nothing: a list can always be cut."""

    def end_drafts(self) -> None:
        """Nothing, too."""

    def keep(self, counts: Sequence[int] | None = None) -> None:
        counts = [len(self.pending)] * self.n_batch if counts is None else counts
        for row, text in enumerate(self.texts):
            text.extend(token for column in self.pending[: counts[row % len(counts)]] for token in column[row])
        self.pending = []
        self.n_columns += max(counts, default=0)

    def crop(self, n_columns: int) -> None:
        for text in self.texts:
            del text[max(len(text) - n_columns, 0) :]
        self.n_columns -= n_columns

    def select(self, rows: Tensor) -> None:
        n_seats = len(self.lane.seats)
        chosen = [seat * self.n_batch + row for seat in range(n_seats) for row in rows.tolist()]
        self.texts = [list(self.texts[row]) for row in chosen]
        self.n_batch = len(rows)
