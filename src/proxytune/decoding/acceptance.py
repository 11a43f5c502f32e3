"""The rule by which drafts are accepted, greedy and sampled."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accept_greedy", "accept_sampled"]


def accept_greedy(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix of drafts that greedy decoding would have chosen itself.

    Args:
        drafts: shape = (n_batch, γ). scores: the mixture's, at the positions of the drafts, (n_batch, γ, n_vocab).

    Returns:
        How many drafts each row accepts, and the token in place of the first rejected one (meaningless where all
        were accepted); both shape = (n_batch,).
    """
    best = scores.argmax(dim=-1)
    n_accepted = (best == drafts).long().cumprod(dim=1).sum(dim=1)
    at = n_accepted.clamp(max=drafts.shape[1] - 1)
    return n_accepted, best.gather(1, at[:, None]).squeeze(1)


def accept_sampled(drafts: Tensor, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Accept drafts so that the outcome is distributed as ``p``, whatever ``q`` is (2211.17192, section 2.3).

    A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)); the first rejected one is replaced by a
    draw from norm(max(0, p − q)).

    Args:
        drafts: shape = (n_batch, γ).
        p: the mixture's distribution at the positions of the drafts, after all logits processors,
            (n_batch, γ, n_vocab), float32.
        q: the distributions that the drafts were drawn from, of p's shape; None if they were copied from the text,
            which counts as a distribution with all its mass on the draft.

    Returns:
        As :func:`accept_greedy`.
    """
    p_draft = p.gather(2, drafts[:, :, None]).squeeze(2)
    q_draft = torch.ones_like(p_draft) if q is None else q.gather(2, drafts[:, :, None]).squeeze(2)
    accepted = torch.rand_like(p_draft) * q_draft < p_draft
    n_accepted = accepted.long().cumprod(dim=1).sum(dim=1)

    at = n_accepted.clamp(max=drafts.shape[1] - 1)[:, None]  # (n_batch, 1): the first rejected
    p_at = p.take_along_dim(at[:, :, None], dim=1).squeeze(1)  # (n_batch, n_vocab)
    if q is None:
        rest = p_at.scatter(1, drafts.gather(1, at), 0.0)
    else:
        rest = (p_at - q.take_along_dim(at[:, :, None], dim=1).squeeze(1)).clamp_(min=0)
    # Nothing is left only if p and q agree to the last bit. Then only rounding can reject anything.
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p_at)
    return n_accepted, torch.multinomial(rest, num_samples=1).squeeze(1)
