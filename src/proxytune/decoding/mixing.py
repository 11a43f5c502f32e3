"""The arithmetic of steering, as pure functions of tensors.

Equation 1 of 2401.08565 (and 2 of 2105.03023), summed over experts k:

    logits = base + sum_k alpha_k * (expert_k - anti_expert_k)

Everything is float32: the difference of two nearly equal logits is what steers, and bfloat16 has eight bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Members", "mix"]

# The base's logits, and of each expert those of its expert and anti-expert: what `mix` begins with.
Members = tuple[Tensor, Sequence[tuple[Tensor | None, Tensor | None]]]


def mix(
    base: Tensor,
    experts: Sequence[tuple[Tensor | None, Tensor | None]],
    alpha: Tensor,
    *,
    plausibility: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Mix the members' logits.

    Args:
        base: the base's logits, shape = (n_batch, n_positions, n_vocab), any float dtype.
        experts: for each expert the logits of its expert and anti-expert, either of which may be None;
            same leading shape as ``base``, possibly another vocabulary width.
        alpha: shape = (n_batch or 1, n_experts), float32.
        plausibility: keep only tokens with ``p_base >= plausibility * max p_base`` (2210.15097, eq. 3).
        vocab_size: the ids below it are in every member's vocabulary; by default the narrowest width.

    Returns:
        float32 logits, shape = (n_batch, n_positions, n_vocab of the base). Ids that not every member has are
        -inf: nothing says how to steer them, and a member that lacks an id could not read it back.

    A logit of -inf excludes its token. What the base excludes stays excluded. Where ``alpha_k * (expert_k -
    anti_expert_k)`` is -inf (the expert excludes the token; for a negative alpha, the anti-expert does), so is the
    mixture. Where it is +inf or undefined (only the other side excludes the token, or both do, or alpha is 0),
    expert k says nothing about that token. So no -inf gives a NaN; a member's own NaN is kept.

    The difference is taken first: two equal sides then cancel to the last bit, and large logits lose no digits.
    """
    sides = [side for pair in experts for side in pair if side is not None]
    shared = min(logits.shape[-1] for logits in (base, *sides)) if vocab_size is None else vocab_size
    # Whatever is changed in place was made here. Nothing asks the device for a value: that would wait for it.
    steered = base[..., :shared].to(torch.float32, copy=True)
    nothing = steered.new_zeros(())
    for index, pair in enumerate(experts):
        weight = alpha[:, index, None, None].to(base.device)  # (n_batch or 1, 1, 1)
        expert, anti_expert = (
            nothing if side is None else side[..., :shared].to(base.device, torch.float32) for side in pair
        )
        offset = expert - anti_expert
        excluded = ((offset == -torch.inf) & (weight > 0)) | ((offset == torch.inf) & (weight < 0))
        silent = offset.isinf() | ((expert == -torch.inf) & (anti_expert == -torch.inf))
        steered.addcmul_(weight, offset.masked_fill_(silent, 0.0)).masked_fill_(excluded, -torch.inf)
    if plausibility is not None:
        scores = base[..., :shared].float()  # the threshold is taken over the ids that can be chosen at all
        implausible = scores < scores.amax(dim=-1, keepdim=True) + math.log(plausibility)
        steered = steered.masked_fill(implausible, -torch.inf)
    if shared < base.shape[-1]:
        steered = torch.nn.functional.pad(steered, (0, base.shape[-1] - shared), value=-torch.inf)
    return steered
