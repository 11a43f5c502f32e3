"""How far several experts disagree about one token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from proxytune.decoding.mixing import Pairs, each_side, mix

__all__ = ["Conflict", "conflicts", "lined_up"]


@dataclass(frozen=True)
class Conflict:
    """The disagreement of K experts about one token.

    Attributes:
        cosine: of their offsets, alpha * (expert - anti-expert) minus its mean over the vocabulary: the mean over all
            pairs of experts, in [-1, 1]. None if an offset is 0 everywhere.
        distance: between the K distributions that one expert each steers to: sqrt(JSD / log K), in [0, 1], where JSD is
            their Jensen-Shannon divergence with equal weights.
        disagree: whether their most probable tokens differ.
    """

    cosine: float | None
    distance: float
    disagree: bool


def lined_up(experts: Pairs) -> Pairs:
    """Logits of single tokens, (n_tokens, n_shared), as those of n_tokens rows with one position each."""
    return each_side(experts, lambda side: side[:, None])


def conflicts(base: Tensor, experts: Pairs, alpha: Tensor, *, plausibility: float | None = None) -> list[Conflict]:
    """The conflict of at least two experts at each of several positions.

    Args:
        base, experts: logits of the ids that all members share, (n_tokens, n_shared) each.
        alpha: shape = (n_tokens, n_experts). plausibility: see :func:`proxytune.decoding.mixing.mix`.
    """
    log_ps, offsets = [], []
    for at, pair in enumerate(lined_up(experts)):
        one, weight = [pair], alpha[:, at : at + 1]
        log_ps.append(mix(base[:, None], one, weight, plausibility=plausibility)[:, 0].log_softmax(dim=-1))
        offsets.append(mix(torch.zeros_like(base)[:, None], one, weight)[:, 0])
    columns = [_cosine(torch.stack(offsets)), _distance(torch.stack(log_ps)), _disagree(torch.stack(log_ps))]
    return [
        Conflict(None if math.isnan(cosine) else cosine, distance, bool(disagree))
        for cosine, distance, disagree in torch.stack(columns, dim=1).tolist()
    ]


def _cosine(offsets: Tensor) -> Tensor:
    """From (n_experts, n_tokens, n_shared) to (n_tokens,); NaN where an offset is the same for all tokens.

    Ids that some expert excludes are left out.
    """
    counted = offsets.isfinite().all(dim=0)
    offsets = offsets.masked_fill(~counted, 0.0)
    mean = offsets.sum(dim=-1, keepdim=True) / counted.sum(dim=-1, keepdim=True)
    centred = (offsets - mean).masked_fill(~counted, 0.0)
    lengths = centred.norm(dim=-1).masked_fill((centred == 0).all(dim=-1), torch.nan)
    pairs = combinations(range(len(centred)), 2)
    found = [torch.linalg.vecdot(centred[i], centred[j]) / (lengths[i] * lengths[j]) for i, j in pairs]
    return torch.stack(found).mean(dim=0).clamp(-1.0, 1.0)


def _distance(log_ps: Tensor) -> Tensor:
    """From (n_experts, n_tokens, n_shared) to (n_tokens,)."""
    middle = log_ps.logsumexp(dim=0) - math.log(len(log_ps))
    apart = (log_ps.exp() * (log_ps - middle)).masked_fill(log_ps == -torch.inf, 0.0).sum(dim=-1).mean(dim=0)
    return (apart.clamp(min=0.0) / math.log(len(log_ps))).sqrt().clamp(max=1.0)


def _disagree(log_ps: Tensor) -> Tensor:
    """From (n_experts, n_tokens, n_shared) to (n_tokens,): 1 where they do."""
    chosen = log_ps.argmax(dim=-1)
    return (chosen != chosen[:1]).any(dim=0).float()
