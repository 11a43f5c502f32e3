"""A state that holds the ids of each row, for lanes that score whole texts: the fake, and a base behind an API."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from proxytune.decoding.lane import stacked

__all__ = ["TextState"]


class TextState:
    """The texts that a lane has read, a list of ids for each row; see :mod:`proxytune.decoding.lane`.

    A subclass adds ``read``.

    Attributes:
        texts: the kept ids of each row.
        pending: columns read since the last :meth:`keep`: for each column the ids of each row, empty for padding.
    """

    forgets = True

    def __init__(self, n_seats: int, n_batch: int) -> None:
        self.n_seats, self.n_batch, self.n_columns = n_seats, n_batch, 0
        self.texts: list[list[int]] = [[] for _ in range(n_batch * n_seats)]
        self.pending: list[list[list[int]]] = []

    def take(self, ids: Tensor, mask: Tensor | None) -> None:
        """Add columns, (n_batch or n_rows, k), to the pending ones."""
        rows = stacked(ids, len(self.texts)).tolist()
        shown = [[1] * ids.shape[1]] * len(rows) if mask is None else stacked(mask, len(self.texts)).tolist()
        for column in range(ids.shape[1]):
            self.pending.append([[row[column]] if own[column] else [] for row, own in zip(rows, shown)])

    def text(self, row: int, ahead: int) -> list[int]:
        """The ids that a row has read, with the first ``ahead`` pending columns."""
        return self.texts[row] + [token for column in self.pending[:ahead] for token in column[row]]

    def begin_drafts(self, room: int | None = None) -> None:
        """Nothing: a list can always be cut."""

    def end_drafts(self) -> None:
        """Nothing: see :meth:`begin_drafts`."""

    def keep(self, counts: Sequence[int] | None = None) -> None:
        counts = [len(self.pending)] * self.n_batch if counts is None else counts
        self.texts = [self.text(row, counts[row % len(counts)]) for row in range(len(self.texts))]
        self.pending = []
        self.n_columns += max(counts, default=0)

    def crop(self, n_columns: int) -> None:
        for text in self.texts:
            del text[max(len(text) - n_columns, 0) :]
        self.n_columns -= n_columns

    def select(self, rows: Tensor) -> None:
        chosen = [seat * self.n_batch + row for seat in range(self.n_seats) for row in rows.tolist()]
        self.texts = [list(self.texts[row]) for row in chosen]
        self.n_batch = len(rows)
