"""The rows of text that a call of generate writes: their tokens, how long they are, and whether they have ended.

Rows that are drafted for grow unequally, and finished ones leave. Where that cannot be (``aligned``), all rows grow by
one token a step, and finished ones by padding, as in transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from proxytune.decoding.cost import MAX_DRAFTS
from proxytune.decoding.draft import Lookup

__all__ = ["Text"]

ScoresSoFar = Callable[[int], tuple[Tensor, ...] | None]
GROWTH = 512  # columns by which the buffer grows: seldom enough to cost nothing


class Text:
    """The rows of one call.

    Attributes:
        ids: shape = (n_batch, width or more): each row's text, what drafts stand behind it, and room.
        length: of each row's text, the prompt included. done: whether it has ended.
        rows: which of the caller's rows still grow. n_prompt: columns of the prompt.
        aligned: whether rows stay side by side.
    """

    def __init__(
        self, prompt: Tensor, criteria: StoppingCriteriaList, *, pad: int, has_eos: bool, aligned: bool
    ) -> None:
        """
        Args:
            prompt: shape = (n_batch, n_prompt), left-padded.
            criteria: transformers' stopping criteria, which say when a row has ended.
            pad: what rows that have ended are filled with; has_eos: whether they are.
        """
        self.criteria, self.pad, self.has_eos, self.aligned = criteria, pad, has_eos, aligned
        self.n_batch, self.n_prompt = prompt.shape
        self.rows = list(range(self.n_batch))
        self.length = [self.n_prompt] * self.n_batch
        self.done = [False] * self.n_batch
        self.ids = prompt
        self.lookups = [Lookup(row) for row in prompt.tolist()]
        self.ended: dict[int, Tensor] = {}  # the caller's row -> its text, of those that have left
        self.make_room()

    @property
    def finished(self) -> bool:
        return all(self.done)

    @property
    def growing(self) -> list[int]:
        """The rows that a step may add to."""
        return [row for row, done in enumerate(self.done) if self.aligned or not done]

    @property
    def room(self) -> int:
        """How many drafts the shortest growing row can take, and one token behind them."""
        return cast(int, self.criteria.max_length) - min(self.length[row] for row in self.growing) - 1

    def make_room(self) -> None:
        """Let the buffer hold another step, and the drafts that stand in it before they are judged."""
        if self.ids.shape[1] < max(self.length) + MAX_DRAFTS + 1:
            self.ids = torch.nn.functional.pad(self.ids, (0, GROWTH), value=self.pad)

    def newest(self) -> Tensor:
        """The last token of each row, which no lane has read, (n_batch, 1)."""
        if self.aligned:
            return self.ids[:, self.length[0] - 1 : self.length[0]]
        return self.ids.gather(1, torch.tensor(self.length, device=self.ids.device)[:, None] - 1)

    def write_drafts(self, drafts: Tensor) -> None:
        """Write drafts, (n_batch, γ), behind the text, where processors will look for them."""
        for row, length in enumerate(self.length):
            self.ids[row, length : length + drafts.shape[1]] = drafts[row]

    def by_length(self, rows: Sequence[int] | None = None) -> list[tuple[slice | list[int], int]]:
        """Rows, all by default, grouped by the length of their text: (index into the batch, length)."""
        if self.aligned:
            return [(slice(None), self.length[0])]
        groups: dict[int, list[int]] = {}
        for row in range(self.n_batch) if rows is None else rows:
            groups.setdefault(self.length[row], []).append(row)
        return [(group, length) for length, group in groups.items()]

    def append(self, proposed: Sequence[Sequence[int]], scores_so_far: ScoresSoFar) -> tuple[list[list[int]], int]:
        """Append tokens to each row until one of them ends it.

        Args:
            proposed: tokens of each row.
            scores_so_far: what stopping criteria are shown besides the text, given how many tokens of ``proposed``
                there are.

        Returns:
            What each row took, and how many tokens were written to rows that had not ended.
        """
        taken: list[list[int]] = [[] for _ in range(self.n_batch)]
        n_written = 0
        for j in range(max(map(len, proposed))):
            if self.finished:
                break
            growing = [row for row in self.growing if j < len(proposed[row])]
            for row in growing:
                token = self.pad if self.done[row] and self.has_eos else proposed[row][j]
                self.ids[row, self.length[row]] = token
                taken[row].append(token)
                n_written += not self.done[row]
            self._grew(taken, growing)
            for rows, length in self.by_length(growing):
                stops = self.criteria(self.ids[rows, :length], scores_so_far(j + 1))
                for row, stop in zip(range(self.n_batch) if isinstance(rows, slice) else rows, stops.tolist()):
                    self.done[row] = self.done[row] or stop
        return taken, n_written

    def append_column(self, tokens: Tensor, scores_so_far: ScoresSoFar) -> tuple[list[list[int]], int]:
        """One token, (n_batch,), for each of rows that stay side by side; see :meth:`append`.

        The device is waited for once.
        """
        if self.has_eos and any(self.done):
            tokens = tokens.masked_fill(torch.tensor(self.done, device=tokens.device), self.pad)
        at = self.length[0]
        self.ids[:, at] = tokens
        stops = self.criteria(self.ids[:, : at + 1], scores_so_far(1))
        column, ended = torch.stack([tokens, stops.to(tokens)]).tolist()
        taken = [[token] for token in column]
        self._grew(taken, range(self.n_batch))
        n_written = self.done.count(False)
        self.done = [done or bool(stop) for done, stop in zip(self.done, ended)]
        return taken, n_written

    def _grew(self, taken: Sequence[Sequence[int]], rows: Iterable[int]) -> None:
        for row in rows:
            self.lookups[row].tokens.append(taken[row][-1])
            self.length[row] += 1

    def let_go(self) -> Tensor | None:
        """Take out the rows that have ended; the indices of those that are left, or None where nothing changes."""
        left = [row for row, done in enumerate(self.done) if not done]
        if len(left) in (0, self.n_batch):
            return None
        self._take_down(row for row, done in enumerate(self.done) if done)
        at = torch.tensor(left, device=self.ids.device)
        self.ids = self.ids[at]
        for name in ("rows", "length", "done", "lookups"):
            setattr(self, name, [getattr(self, name)[row] for row in left])
        self.n_batch = len(left)
        return at

    def _take_down(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.ended[self.rows[row]] = self.ids[row, : self.length[row]]

    def sequences(self) -> Tensor:
        """All rows side by side in the caller's order, padded on the right."""
        self._take_down(range(self.n_batch))
        texts = [self.ended[row] for row in sorted(self.ended)]
        return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad)
