"""Drafts: what they are, and those that are copied from the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["Draft", "Lookup"]


@dataclass
class Draft:
    """The drafts of one step.

    Attributes:
        tokens: shape = (n_batch, γ).
        source: where they come from; None where there are none.
        q: what they were drawn from, (n_batch, γ, n_vocab), for rejection sampling; None where they were looked up,
            and elsewhere.
        scores: the drafting lane's, of the ``n_read`` positions it has read, which are γ, or 1 where it read the newest
            token and nothing was drafted; None where it has read nothing.
        confidences: of each row that grows, the largest probability in q at each draft. Not the probability of the
            draft itself: what decides how far to draft must not look at a draw that it may discard, or it biases what
            is drawn.
    """

    tokens: Tensor
    source: Literal["lane", "lookup"] | None = None
    q: Tensor | None = None
    scores: Tensor | None = None
    n_read: int = 0
    confidences: list[list[float]] = field(default_factory=list)


@dataclass
class Lookup:
    """Drafts copied from the text so far: what followed the last tokens when they stood there before (2304.04487)."""

    tokens: list[int]
    sizes: tuple[int, ...] = (3, 2)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> where it last ended
    indexed: int = 0

    def find(self, most: int) -> list[int]:
        """``most`` tokens that may come next, or none. A copy that reaches the end of the text goes on with itself."""
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
