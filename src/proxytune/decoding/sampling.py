"""From the mixture's logits to tokens: processors, draws, and the acceptance of drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from proxytune.decoding.acceptance import accept_greedy, accept_sampled
from proxytune.decoding.noise import Noise
from proxytune.decoding.text import Text

__all__ = ["Sampler"]


class Sampler:
    """Chooses the tokens of one call.

    Rejection sampling judges drafts by the distribution that they were drawn from. Greedy decoding and given noise
    compare them with the token that would be chosen without them.
    """

    def __init__(
        self,
        text: Text,
        processors: LogitsProcessorList,
        *,
        sample: bool,
        noise: Noise | None,
        context_free: bool,
        remember: bool,
        show_scores: bool,
    ) -> None:
        """
        Args:
            processors: transformers' logits processors. context_free: whether they look at one row's scores alone.
            sample: draw, instead of taking the best token. noise: the source of draws; None: torch's generator.
            remember: keep the logits and scores of each step, for callers that ask for them.
            show_scores: give stopping criteria the scores of all new tokens; needs ``remember``.
        """
        self.text, self.context_free, self.plain = text, context_free, not processors
        self.processors = cast(Callable[[Tensor, Tensor], Tensor], processors)  # theirs takes narrower types
        self.noise, self.rejecting = noise, sample and noise is None
        self.remember, self.show_scores = remember, show_scores
        self.weighed: list[tuple[Tensor, Tensor]] = []  # this step's logits and scores
        self.before: list[Tensor] = []  # the scores of the tokens before this step

    def process(self, scores: Tensor, offset: int) -> Tensor:
        """Put scores, (n_batch, k, n_vocab), through the logits processors.

        Position j of a row follows its text and ``offset + j`` drafts, which have been written after the text.
        """
        if self.plain:
            return scores
        ids = self.text.ids
        if self.context_free:
            flat = self.processors(ids[:, :1].repeat(scores.shape[1], 1), scores.flatten(0, 1))
            return flat.view_as(scores)
        result = scores.clone()
        for j in range(scores.shape[1]):
            for rows, length in self.text.by_length():
                result[rows, j] = self.processors(ids[rows, : length + offset + j], scores[rows, j])
        return result

    def draw(self, scores: Tensor, offset: int = 0) -> Tensor:
        """One token of each row from its processed scores at one position, (n_batch, 1, n_vocab) -> (n_batch,)."""
        if self.rejecting:
            return torch.multinomial(scores[:, 0].softmax(dim=-1), num_samples=1).squeeze(1)
        return self._race(scores, offset)[:, 0].argmax(dim=-1)

    def choose(self, mixed: Tensor, offset: int = 0) -> Tensor:
        """One token from the mixture at one position, (n_batch, 1, n_vocab) -> (n_batch,)."""
        return self.draw(self._weigh(mixed, offset), offset)

    def accept(self, drafts: Tensor, q: Tensor | None, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts each row accepts, and the token that replaces the first rejected one; both (n_batch,).

        Args:
            drafts: shape = (n_batch, γ). q: what they were drawn from, see :func:`accept_sampled`.
            mixed: the mixture at their positions, (n_batch, γ, n_vocab).
        """
        scores = self._weigh(mixed, offset=0)
        if self.rejecting:
            return accept_sampled(drafts, scores.softmax(dim=-1), q)
        return accept_greedy(drafts, self._race(scores, offset=0))

    def _race(self, scores: Tensor, offset: int) -> Tensor:
        """Scores whose argmax is the choice; each row's first position lies ``offset`` after its text."""
        if self.noise is None:
            return scores
        starts = [length - self.text.n_prompt + offset for length in self.text.length]
        return self.noise.race(scores.softmax(dim=-1), starts)

    def _weigh(self, mixed: Tensor, offset: int) -> Tensor:
        """The mixture after all processors, kept if the caller of ``generate`` asks for it."""
        if not self.remember:
            return self.process(mixed, offset)
        self.weighed.append((mixed, self.process(mixed.clone(), offset)))
        return self.weighed[-1][1]

    def scores_so_far(self, n_tokens: int) -> tuple[Tensor, ...] | None:
        """The scores that criteria get: those of each new token, (n_batch, n_vocab), including ``n_tokens`` of this
        step."""
        if not self.show_scores:
            return None
        newest = torch.cat([scores for _, scores in self.weighed], dim=1)[:, :n_tokens]
        return (*self.before, *newest.unbind(dim=1))

    def settle(self, n_tokens: int) -> tuple[Tensor, Tensor] | None:
        """End a step; return its logits and scores at the positions that became text, (n_batch, n_tokens, n_vocab)."""
        if not self.remember:
            return None
        logits, scores = (torch.cat(parts, dim=1)[:, :n_tokens] for parts in zip(*self.weighed))
        if self.show_scores:
            self.before += scores.unbind(dim=1)
        self.weighed = []
        return logits, scores

    def select(self, rows: Tensor) -> None:
        """Continue with only some rows of the batch."""
        if self.noise is not None:
            self.noise.select(rows.tolist())
