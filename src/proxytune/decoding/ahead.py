"""An expert's lane that reads a guess of the next token while the base is asked for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.decoding.lane import LaneState, Scores

__all__ = ["Ahead"]


class Ahead:
    """A lane's state that can read a guess of the column that comes next. A wrong one is taken back.

    Its state must be one that drafts can be taken back from.
    """

    def __init__(self, state: LaneState) -> None:
        self.state = state
        self.guessed: tuple[Tensor, Scores] | None = None

    def guess(self, ids: Tensor) -> None:
        """Read a guess of the next column, (n_batch, 1). All columns read before are kept."""
        self.state.keep([1] * self.state.n_batch)
        self.guessed = ids, self.state.read(ids)

    def read(self, ids: Tensor) -> Scores:
        """Read the next column, (n_batch, 1), as :meth:`LaneState.read` does, unless it was guessed."""
        if self.guessed is not None and torch.equal(ids, self.guessed[0]):
            scores, self.guessed = self.guessed[1], None
            return scores
        self.settle()
        return self.state.read(ids)

    def keep(self, counts: Sequence[int]) -> None:
        """As :meth:`LaneState.keep`; a guess is still open."""
        if self.guessed is None:
            self.state.keep(counts)

    def select(self, rows: Tensor) -> None:
        """As :meth:`LaneState.select`."""
        self.settle()
        self.state.select(rows)

    def settle(self) -> None:
        """Take back a guess that is still open."""
        if self.guessed is not None:
            self.state.keep([0] * self.state.n_batch)
            self.guessed = None
