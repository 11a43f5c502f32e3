"""The lane contract: everything that the decoding loop and the composite know about the place where members run.

A lane is one set of weights and the members that are computed with it. Its *state* is what it has read for the rows of
one call. Rows are stacked by seat: a lane of ``n_seats`` seats holds ``n_seats * n_batch`` rows, seat by seat. Every
runtime keeps the laws in ``tests/test_laws.py``; :mod:`proxytune.lanes.fake` is the smallest one.

Whatever needs no gradients is read through a state: the loop, and a forward with a cache or without. Training, and
position ids that do not count a row's tokens, call a transformers lane itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from proxytune.decoding.cost import Cost
from proxytune.recipe.layout import Seat

__all__ = ["AskedState", "Lane", "LaneState", "QuickLane", "QuickState", "Scores", "stacked"]


@dataclass(frozen=True)
class Scores:
    """A lane's scores of the token that follows each position.

    Attributes:
        values: logits of the whole vocabulary, shape = (n_rows, n_positions, n_vocab); or, if ``ids`` are given,
            log-probabilities of these ids only, (n_rows, n_positions, n_known).
        ids: the tokens that ``values`` belong to, (n_rows, n_positions, n_known), -1 where a position has fewer; None:
            all, in order.
        bound: no token outside ``ids`` has a larger log-probability, (n_rows, n_positions); None if all are given.
    """

    values: Tensor
    ids: Tensor | None = None
    bound: Tensor | None = None

    def part(self, start: int, stop: int | None) -> Scores:
        """The scores of some positions."""
        at = slice(start, stop)
        return Scores(self.values[:, at], *(None if each is None else each[:, at] for each in (self.ids, self.bound)))


class LaneState(Protocol):
    """What a lane has read for the rows of one call, column by column.

    Columns are read first and kept afterwards, so that drafts can be taken back.

    Attributes:
        n_batch: rows of each seat. n_columns: columns that are kept.
        forgets: whether :meth:`keep` can drop columns that were read, for each row separately.
    """

    n_batch: int
    n_columns: int

    @property
    def forgets(self) -> bool: ...

    def begin_drafts(self, room: int | None = None) -> None:
        """From now on, columns that are read may be taken back, even columns that have left a sliding window.

        ``room``: how many more columns can be kept. Columns that are read beyond them need no positions of their own.
        """
        ...

    def end_drafts(self) -> None:
        """From now on, all columns that are read are kept."""
        ...

    def read(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: int = 0, want: Tensor | None = None
    ) -> Scores:
        """Read the next columns of every row.

        Args:
            ids: shape = (n_batch, k) if all seats read the same, otherwise (n_rows, k).
            mask: same shape as ``ids``, 0 at padding, which is on the left; None if there is no padding.
            positions: how many of the last columns to score; 0: all k.
            want: ids that must be scored, (n_wanted,); for lanes that do not score all ids.
        """
        ...

    def keep(self, counts: Sequence[int] | None = None) -> None:
        """Keep the first ``counts`` columns of each row that were read since the last call, and drop the rest.

        ``counts`` has one number per batch row, or one for each of the ``n_rows`` if seats keep different numbers. None
        keeps all columns. Rows that keep less than the longest are moved to the right, after padding.
        """
        ...

    def crop(self, n_columns: int) -> None:
        """Drop the last ``n_columns`` of the kept columns, in all rows."""
        ...

    def select(self, rows: Tensor) -> None:
        """Continue with these batch rows, (n_selected,), in any number and order: reorder, repeat or drop."""
        ...


class Lane(Protocol):
    """One set of weights and the members computed with it.

    Attributes:
        seats: the blocks of rows; each has ``names``, the members that it serves.
        n_vocab: how many ids it scores. context: how many columns it can read; None if nothing limits them.
        complete: whether it scores the whole vocabulary.
        tolerance: how far logits may differ if one text is read in two ways, as a share of the largest.
        cost: the cost of a pass. head_cost: the cost of its own head, if it has a quick one.
        quick_head: guesses logits from hidden states at less cost, for drafts only; None if there is none. A lane that
            has one is a :class:`QuickLane`, and its states are :class:`QuickState`.
    """

    @property
    def seats(self) -> Sequence[Seat]: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    @property
    def complete(self) -> bool: ...

    @property
    def tolerance(self) -> float: ...

    @property
    def quick_head(self) -> Callable[[Tensor], Tensor] | None: ...

    @property
    def cost(self) -> Cost: ...

    @property
    def head_cost(self) -> Cost | None: ...

    @property
    def device(self) -> torch.device: ...

    def open(self, n_batch: int, capacity: int | None = None) -> LaneState:
        """A state that has read nothing, for ``n_batch`` rows of each seat.

        ``capacity``: the state has room for that many columns from the start, and its shape never changes. None: it
        grows. 0: it reads once and keeps nothing, which costs no memory beyond the pass itself.
        """
        ...


class QuickLane(Lane, Protocol):
    """A lane that can guess logits at less cost than its own."""

    def head(self, hidden: Tensor) -> Tensor:
        """The logits of its own head for hidden states, (n_rows, k, n_hidden) -> (n_rows, k, n_vocab)."""
        ...


class QuickState(LaneState, Protocol):
    """A state of such a lane."""

    def read_hidden(self, ids: Tensor) -> Tensor:
        """Like :meth:`read`, but returns the hidden states that the lane's head turns into logits, (n_rows, k,
        n_hidden)."""
        ...


class AskedState(LaneState, Protocol):
    """A state of a lane that does not score all tokens. It can be asked for more."""

    def draw(self, start: int, offsets: Tensor, likely: Tensor) -> Callable[[], list[int | None]]:
        """For each row, the token that the lane itself chooses if ``offsets`` are added; None if that is not sure.

        The requests are on their way when this returns. What it returns waits for them.

        Args:
            start: as in :meth:`ask`. offsets: shape = (n_batch, n_vocab). likely: larger for tokens that are thought to
                be more probable, of that shape. It changes what is asked, and never the choice.
        """
        ...

    def behind(self, start: int, n_positions: int) -> Tensor:
        """The draft after each position, (n_batch, n_positions); -1 if there is none. ``start``: as in :meth:`ask`."""
        ...

    def ask(self, start: int, rivals: Tensor) -> Scores | None:
        """Ask for more at positions at which some tokens must be known; None if nothing more is returned.

        Args:
            start: how many of the columns read since the last ``keep`` precede the first position, it included.
            rivals: these tokens, (n_batch, n_positions, n_vocab), bool.
        """
        ...


def stacked(tensor: Tensor, n_rows: int) -> Tensor:
    """Rows for every seat: (n_batch, k), shared by all seats, becomes (n_rows, k); (n_rows, k) stays as it is."""
    return tensor if tensor.shape[0] == n_rows else tensor.repeat(n_rows // tensor.shape[0], 1)
