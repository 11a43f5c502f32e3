"""Gates in the decoding loop: how far they are open, and experts that read later where they are closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from proxytune.decoding.lane import LaneState, QuickState, Scores
from proxytune.decoding.mixing import opening, scheduled
from proxytune.decoding.text import Text
from proxytune.errors import ProxyTuneError
from proxytune.recipe.gates import Gate

__all__ = ["Gating", "Later"]


class Gating:
    """How far a gate is open at the next tokens of each row of a call.

    Attributes:
        waits: whether experts' lanes need not read where it is closed.
    """

    def __init__(
        self, gate: Gate, text: Text, tokenizer: Any, base_logits: Callable[[Scores], Tensor], *, waits: bool
    ) -> None:
        """
        Args:
            tokenizer: reads the answer so far, for ``between``.
            base_logits: the base's logits, (n_batch, n_positions, n_shared), float32, in its lane's scores.

        Raises:
            ProxyTuneError: for ``between`` without a tokenizer.
        """
        if gate.kind == "between" and tokenizer is None:
            raise ProxyTuneError(f"the gate {gate} needs a tokenizer, and the recipe's base has none; give one")
        self.gate, self.text, self.tokenizer = gate, text, tokenizer
        self.base_logits, self.waits = base_logits, waits and gate.early

    def before(self, drafts: Tensor) -> Tensor | None:
        """How far it is open after each row's text and after each of its drafts, (n_batch, γ), if that is known before
        any lane has read them: (n_batch, γ + 1). None otherwise."""
        if not self.gate.scheduled:
            return None
        starts = torch.tensor(self.text.length)[:, None] - self.text.n_prompt
        if self.gate.kind != "between":
            return scheduled(self.gate, starts + torch.arange(drafts.shape[1] + 1))
        told = drafts.tolist()
        return torch.tensor([self._inside(row, told[row]) for row in range(self.text.n_batch)])

    def _inside(self, row: int, drafts: Sequence[int]) -> list[float]:
        """Whether a row's text, and the text with each of its drafts, is between the gate's two texts: 0 or 1."""
        answer = self.text.lookups[row].tokens[self.text.n_prompt :]
        found = []
        for n in range(len(drafts) + 1):
            written = self.tokenizer.decode([*answer, *drafts[:n]], clean_up_tokenization_spaces=False)
            found.append(float(between(written, *self.gate.texts)))
        return found

    def after_base(self, scores: Scores) -> Tensor | None:
        """How far it is open at positions that the base has read, (n_batch, n_positions); None where the experts read
        them too, so that mixing finds it."""
        return opening(self.gate, self.base_logits(scores), None) if self.waits else None

    def closed(self, opened: Tensor | None) -> bool:
        """Whether experts need not read: nothing is open in any row that has not ended. This waits for the device."""
        if opened is None or not self.waits:
            return False
        return not any(some and not done for some, done in zip((opened > 0).any(dim=1).tolist(), self.text.done))


def between(written: str, start: str, end: str) -> bool:
    """Whether a text ends between ``start`` and the next ``end``. An empty ``start`` is before the text; an empty
    ``end`` never comes."""
    at, inside = 0, False
    while True:
        wanted = end if inside else start
        if inside and not end:
            return True
        found = written.find(wanted, at) if wanted or at == 0 else -1
        if found < 0:
            return inside
        at, inside = found + len(wanted), not inside


class Later:
    """A lane's state that reads only when it must, and then makes up for all columns before in the same pass.

    What :meth:`skip` was given and :meth:`keep` keeps is owed, row by row.
    """

    def __init__(self, state: LaneState) -> None:
        self.state = state
        self.owed: list[list[int]] = [[] for _ in range(state.n_batch)]
        self.skipped: list[Tensor] = []  # since the last `keep`, (n_batch, k) each
        self.n_read = self.n_made_up = 0  # columns since the last `keep`

    def read(self, ids: Tensor) -> Scores:
        """Read columns, (n_batch, k), as :meth:`LaneState.read` does; the scores are theirs alone."""
        return self.state.read(self._due(ids), positions=ids.shape[1])

    def read_hidden(self, ids: Tensor) -> Tensor:
        """As :meth:`QuickState.read_hidden`."""
        return cast(QuickState, self.state).read_hidden(self._due(ids))[:, -ids.shape[1] :]

    def skip(self, ids: Tensor) -> None:
        """Read these columns, (n_batch, k), later."""
        self.skipped.append(ids)

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts`` columns of each row that were read or skipped since the last call."""
        if self.n_read:
            self.state.keep([self.n_made_up + min(count, self.n_read) for count in counts])
        if self.skipped:
            for owed, skipped, count in zip(self.owed, torch.cat(self.skipped, dim=1).tolist(), counts):
                owed.extend(skipped[: max(count - self.n_read, 0)])
        self.skipped, self.n_read, self.n_made_up = [], 0, 0

    def select(self, rows: Tensor) -> None:
        """As :meth:`LaneState.select`."""
        self.state.select(rows)
        self.owed = [list(self.owed[row]) for row in rows.tolist()]

    def catch_up(self) -> None:
        """Read and keep everything that is owed."""
        if widest := max(map(len, self.owed)):
            rows = [row + [0] * (widest - len(row)) for row in self.owed]  # what stands behind is not kept
            self.state.read(torch.tensor(rows), positions=1)
            self.state.keep([len(row) for row in self.owed])
            self.owed = [[] for _ in self.owed]

    def _due(self, ids: Tensor) -> Tensor:
        """What must be read in a step, so that its last columns are ``ids``."""
        self.n_read += ids.shape[1]
        if len(set(map(len, self.owed))) > 1:
            self.catch_up()  # rows of different lengths would need padding between columns
        elif self.owed[0]:
            self.n_made_up = len(self.owed[0])
            ids = torch.cat([torch.tensor(self.owed, device=ids.device), ids], dim=1)
            self.owed = [[] for _ in self.owed]
        return ids
