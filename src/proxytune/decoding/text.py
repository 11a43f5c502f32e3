"""The rows of text that a call of generate writes: their tokens, how long they are, and whether they have ended.

With drafts, rows grow at different speeds, and finished rows leave. If that is not possible (``aligned``), all rows
grow by one token per step, finished ones by padding, as in transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from proxytune.decoding.cost import MAX_DRAFTS

__all__ = ["Lookup", "Text"]

ScoresSoFar = Callable[[int], tuple[Tensor, ...] | None]
GROWTH = 512  # columns by which the buffer grows: rarely enough to cost nothing


@dataclass
class Lookup:
    """Drafts copied from the text so far: what followed the last tokens at an earlier place (2304.04487)."""

    tokens: list[int]
    sizes: tuple[int, ...] = (3, 2)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> where it last ended
    indexed: int = 0

    def find(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next. A copy that reaches the end of the text continues with itself."""
        tokens = self.tokens
        for end in range(self.indexed + 1, len(tokens)):  # the n-gram that ends the text is no place to copy from
            for size in self.sizes:
                if end >= size:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)
        for size in self.sizes:
            if (end := self.ends.get(tuple(tokens[-size:]), 0)) and len(tokens) > size:
                return [tokens[end + at % (len(tokens) - end)] for at in range(most)]
        return []


class Text:
    """The rows of one call.

    Attributes:
        ids: shape = (n_batch, width or more): each row's text, its drafts, and free room.
        length: the length of each row's text, with the prompt. done: whether it has ended.
        rows: which of the caller's rows still grow. n_prompt: columns of the prompt.
        aligned: whether rows stay side by side.
    """

    def __init__(
        self, prompt: Tensor, criteria: StoppingCriteriaList, *, pad: int, has_eos: bool, aligned: bool, pure: bool
    ) -> None:
        """
        Args:
            prompt: shape = (n_batch, n_prompt), left-padded.
            criteria: transformers' stopping criteria, which say when a row has ended.
            pad: the token that fills rows that have ended; has_eos: whether they are filled.
            pure: whether the criteria may be asked about texts that are then discarded.
        """
        self.criteria, self.pad, self.has_eos, self.aligned, self.pure = criteria, pad, has_eos, aligned, pure
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
        """How many drafts the shortest growing row can take, and one token after them."""
        return cast(int, self.criteria.max_length) - min(self.length[row] for row in self.growing) - 1

    def make_room(self) -> None:
        """Make room in the buffer for another step, and for its drafts before they are judged."""
        if self.ids.shape[1] < max(self.length) + MAX_DRAFTS + 1:
            self.ids = torch.nn.functional.pad(self.ids, (0, GROWTH), value=self.pad)

    def newest(self) -> Tensor:
        """The last token of each row, which no lane has read, (n_batch, 1)."""
        if self.aligned:
            return self.ids[:, self.length[0] - 1 : self.length[0]]
        return self.ids.gather(1, torch.tensor(self.length, device=self.ids.device)[:, None] - 1)

    def write_drafts(self, drafts: Tensor) -> None:
        """Write drafts, (n_batch, γ), after the text, where processors will look for them."""
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

    def append(self, tokens: Tensor, counts: Sequence[int], scores_so_far: ScoresSoFar) -> tuple[list[list[int]], int]:
        """Append tokens to each row until one of them ends it. This waits for the device once, or for criteria that are
        not ``pure`` once per token.

        Args:
            tokens: shape = (n_batch, k), of which each row takes its first ``counts``.
            scores_so_far: gives the scores for the stopping criteria, for a number of the k tokens.

        Returns:
            The tokens that each row took, and how many tokens were written to rows that had not ended.
        """
        asked: list[int] = []  # the rows of all tokens, and below each token and whether it stops its row, (2, n_rows)
        told: list[Tensor] = []
        for j in range(max(counts)):
            for rows, length in self.by_length([row for row in self.growing if j < counts[row]]):
                column = tokens[rows, j]
                if self.aligned and self.has_eos and any(self.done):
                    column = column.masked_fill(torch.tensor(self.done, device=column.device), self.pad)
                self.ids[rows, length + j] = column
                stops = self.criteria(self.ids[rows, : length + j + 1], scores_so_far(j + 1))
                asked += range(self.n_batch) if isinstance(rows, slice) else rows
                told.append(torch.stack([column, stops.to(column)]))
            if not self.pure and j + 1 < max(counts) and bool(stops.all()):
                break
        taken: list[list[int]] = [[] for _ in counts]
        before, n_written = list(self.done), 0
        for row, token, stop in zip(asked, *torch.cat(told, dim=1).tolist()):
            if self.done[row] and not before[row]:
                continue  # after the end
            taken[row].append(token)
            self.lookups[row].tokens.append(token)
            self.length[row] += 1
            n_written += not before[row]
            self.done[row] = before[row] or bool(stop)
        return taken, n_written

    def let_go(self) -> Tensor | None:
        """Remove the rows that have ended; return the indices of the others, or None if nothing changes."""
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
