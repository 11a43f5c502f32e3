"""The arithmetic of steering, as pure functions of tensors.

Equation 1 of 2401.08565 (and 2 of 2105.03023), summed over experts k:

    logits = base + sum_k offset_k,    offset_k = alpha_k * (expert_k - anti_expert_k)

It is the rule ``sum``. The others join the K offsets in other ways; log p are log-probabilities::

    mean          base + 1/K sum_k offset_k
    convex        (1 - sum_k alpha_k) log p_base + sum_k alpha_k log p_expert_k
    union         log p_base + max_k offset_k, from log-probabilities
    intersection  log p_base + min_k offset_k, from log-probabilities
    dynamic       base + s sum_k offset_k, where s in [0, 2] solves
                  KL(mixture || base) = 1/K sum_k abs(alpha_k) KL(expert_k || anti_expert_k)

``mean`` is the geometric mean of the K models that one expert each steers. ``convex`` (MOD, 2406.18853) needs alphas of
0 or more that sum to at most 1, and reads no anti-expert. ``union`` and ``intersection`` are from 2311.14479.
``dynamic`` is from 2406.15480; for several experts that problem has many solutions, and this one keeps the alphas'
ratio.

Everything is float32: the difference of two nearly equal logits is what steers, and bfloat16 has eight bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from proxytune.errors import RecipeError
from proxytune.recipe.gates import Gate
from proxytune.recipe.rules import Rule

__all__ = ["Members", "Pairs", "as_sum", "bet", "each_side", "joined", "mix", "opening", "scale_to", "scheduled"]

LARGEST_SCALE = 2.0  # of the offsets, under "dynamic"
BISECTIONS = 18  # of the search for it: an error of 1e-5

# The base's logits, and of each expert those of its expert and anti-expert: what `mix` begins with.
Pairs = Sequence[tuple[Tensor | None, Tensor | None]]
Members = tuple[Tensor, Pairs]


def mix(
    base: Tensor,
    experts: Pairs,
    alpha: Tensor,
    *,
    rule: Rule = "sum",
    gate: Gate | None = None,
    opened: Tensor | None = None,
    plausibility: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Mix the members' logits.

    Args:
        base: the base's logits, shape = (n_batch, n_positions, n_vocab), any float dtype.
        experts: for each expert the logits of its expert and anti-expert, either of which may be None;
            same leading shape as ``base``, possibly another vocabulary width.
        alpha: shape = (n_batch or 1, n_experts), float32.
        rule: how several experts are joined, see the equations above. The caller has checked that it fits the experts
            (:func:`proxytune.recipe.rules.check_rule`).
        gate: where and how far steering applies, see :class:`proxytune.recipe.gates.Gate`. Where it is closed, the
            mixture is the base.
        opened: how far the gate is open, from 0 to 1, (n_batch or 1, n_positions), where the caller knows. By default
            it is found here; for a schedule the first position is then the first token of the answer.
        plausibility: keep only tokens with ``p_base >= plausibility * max p_base`` (2210.15097, eq. 3).
        vocab_size: the ids below it are in every member's vocabulary; by default the narrowest width.

    Returns:
        float32 logits, shape = (n_batch, n_positions, n_vocab of the base). Ids that not every member has are
        -inf: nothing says how to steer them, and a member that lacks an id could not read it back.

    A logit of -inf excludes its token. What the base excludes stays excluded. Where ``alpha_k * (expert_k -
    anti_expert_k)`` is -inf (the expert excludes the token; for a negative alpha, the anti-expert does), so is the
    offset. Where it is +inf or undefined (only the other side excludes the token, or both do, or alpha is 0),
    expert k says nothing about that token, and its offset is 0. So no -inf gives a NaN; a member's own NaN is kept.

    The difference is taken first: two equal sides then cancel to the last bit, and large logits lose no digits.
    """
    sides = [side for pair in experts for side in pair if side is not None]
    shared = min(logits.shape[-1] for logits in (base, *sides)) if vocab_size is None else vocab_size
    # Whatever is changed in place was made here. Nothing asks the device for a value: that would wait for it.
    steered = base[..., :shared].to(torch.float32, copy=True)
    experts = each_side(experts, lambda side: side[..., :shared].to(base.device, torch.float32))
    experts, weights = as_sum(rule, steered, experts, alpha.to(base.device))
    if rule in ("union", "intersection"):
        experts = each_side(experts, lambda side: side.log_softmax(dim=-1))
    if experts:
        added = joined(rule, steered, experts, weights)
        if gate is not None and gate.kind == "bet":
            steered = bet(steered, added, gate.number)
        else:
            steered += added if gate is None else _times(added, opening(gate, steered, added, opened))
    if plausibility is not None:
        scores = base[..., :shared].float()  # the threshold is taken over the ids that can be chosen at all
        implausible = scores < scores.amax(dim=-1, keepdim=True) + math.log(plausibility)
        steered = steered.masked_fill(implausible, -torch.inf)
    if shared < base.shape[-1]:
        steered = torch.nn.functional.pad(steered, (0, base.shape[-1] - shared), value=-torch.inf)
    return steered


def each_side(experts: Pairs, change: Callable[[Tensor], Tensor]) -> Pairs:
    """The experts with every side changed, but for those that are missing."""
    return [
        (None if expert is None else change(expert), None if anti_expert is None else change(anti_expert))
        for expert, anti_expert in experts
    ]


def as_sum(rule: Rule, base: Tensor, experts: Pairs, alpha: Tensor) -> tuple[Pairs, Tensor]:
    """Experts and alphas, (…, n_experts), with which "sum" does the same as "mean" or "convex"; else unchanged."""
    if rule == "convex":
        return [(expert, base) for expert, _ in experts], alpha
    return experts, alpha / len(experts) if rule == "mean" else alpha


def joined(rule: Rule, base: Tensor, experts: Pairs, alpha: Tensor) -> Tensor:
    """What steering adds to the base's logits, of their shape (n_batch, n_positions, n_shared)."""

    def offsets() -> Iterator[Tensor]:
        nothing = base.new_zeros(()).expand_as(base)
        for index, pair in enumerate(experts):
            weight = alpha[:, index, None, None]  # (n_batch or 1, 1, 1)
            expert, anti_expert = (nothing if side is None else side for side in pair)
            offset = expert - anti_expert
            excluded = ((offset == -torch.inf) & (weight > 0)) | ((offset == torch.inf) & (weight < 0))
            silent = offset.isinf() | ((expert == -torch.inf) & (anti_expert == -torch.inf))
            yield (offset.masked_fill_(silent, 0.0) * weight).masked_fill_(excluded, -torch.inf)

    if rule == "union":
        return reduce(torch.maximum, offsets())
    if rule == "intersection":
        return reduce(torch.minimum, offsets())
    added = reduce(torch.Tensor.add_, offsets())
    if rule != "dynamic":
        return added
    learned = sum(
        _divergence(expert, anti_expert) * alpha[:, index, None].abs()  # (n_batch, n_positions)
        for index, (expert, anti_expert) in enumerate(experts)
        if expert is not None and anti_expert is not None
    )
    return _times(added, scale_to(base, added, learned / len(experts), LARGEST_SCALE))


def _times(offset: Tensor, scale: Tensor) -> Tensor:
    """Offsets (..., n_vocab) by a factor of at least 0, (...,); 0 lifts the exclusion of tokens."""
    excluded = offset == -torch.inf
    return (offset.masked_fill(excluded, 0.0) * scale[..., None]).masked_fill(
        excluded & (scale[..., None] > 0), -torch.inf
    )


def opening(gate: Gate, base: Tensor, offset: Tensor | None, opened: Tensor | None = None) -> Tensor:
    """How far a gate is open, from 0 (closed) to 1, (..., n_positions).

    Args:
        base, offset: logits of the base, and what steering would add, (..., n_positions, n_vocab), float32. The offset
            is needed only where the gate is not ``early``.
        opened: the result, where the caller knows it. A schedule is otherwise that of an answer's first tokens.
    """
    if opened is not None:
        return opened.to(base.device)
    if gate.scheduled:
        return scheduled(gate, torch.arange(base.shape[-2], device=base.device)).expand(base.shape[:-1])
    log_p = base.log_softmax(dim=-1)
    if gate.kind == "unsure":
        return (log_p.amax(dim=-1) < math.log(gate.number)).float()
    if gate.kind == "entropy":
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)
        return (entropy >= gate.number).float()
    assert offset is not None
    if gate.kind == "kl":
        return scale_to(base, offset, gate.number, 1.0)
    return _refused(log_p.exp(), (base + offset).softmax(dim=-1), gate.number)[1]


def scheduled(gate: Gate, t: Tensor) -> Tensor:
    """How far a schedule is open at the answer's tokens number ``t``, counted from 0; float32, of the shape of ``t``::

        warmup  min(1, (t + 1) / N)
        decay   max(0, 1 - t / N)
        cycle   1 if floor(t / N) is even, else 0

    Before the answer it is what it is at its first token.

    Raises:
        RecipeError: for ``between``, which needs the text, at any token but the first.
    """
    t = t.clamp(min=0)
    if gate.kind == "between":
        if bool((t > 0).any()):
            raise RecipeError(f"the gate {gate} is for greedy decoding and sampling by generate(); leave it out")
        return torch.full_like(t, float(not gate.texts[0]), dtype=torch.float32)
    n = gate.number
    if gate.kind == "warmup":
        return ((t + 1) / n).clamp(max=1.0)
    if gate.kind == "decay":
        return (1 - t / n).clamp(min=0.0)
    return (torch.div(t, n, rounding_mode="floor") % 2 == 0).float()


def bet(base: Tensor, offset: Tensor, margin: float) -> Tensor:
    """The distribution of a token that is drawn from the base, and where the base is too unsure of it, drawn again from
    the mixture (2604.16146), as log-probabilities, (..., n_vocab).

    With p the base's probabilities and q = softmax(base + offset), a token y stays if p(y) >= max q - margin. So::

        P(y) = p(y) [p(y) >= max q - margin] + q(y) * sum of p over the tokens that do not stay
    """
    log_p, log_q = base.log_softmax(dim=-1), (base + offset).log_softmax(dim=-1)
    refused, share = _refused(log_p.exp(), log_q.exp(), margin)
    return torch.logaddexp(log_p.masked_fill(refused, -torch.inf), log_q + share.log()[..., None])


def _refused(p: Tensor, q: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Which tokens of the base do not stay, (..., n_vocab), and their probability in all, (...,)."""
    refused = p < q.amax(dim=-1, keepdim=True) - margin
    return refused, (p * refused).sum(dim=-1)


def scale_to(base: Tensor, offset: Tensor, divergence: Tensor | float, largest: float) -> Tensor:
    """The factor s in [0, largest] at which KL(p_s || p_base) has a given value, p_s = softmax(base + s * offset).

    That divergence grows with s, because its derivative is s times the variance of the offset under p_s. So s is found
    by bisection, which takes more steps than other methods but no bad ones. If the divergence is below the value even
    at ``largest``, that is the result, exactly.

    Args:
        base: logits, (..., n_vocab), float32. offset: of that shape; -inf excludes a token at every s.
        divergence: the value, in nats, (...,) or one number.

    Returns:
        shape = (...,).
    """
    excluded = offset == -torch.inf
    start, slope = base.masked_fill(excluded, -torch.inf), offset.masked_fill(excluded, 0.0)
    whole = base.logsumexp(dim=-1)

    def reached(s: Tensor) -> Tensor:
        logits = torch.addcmul(start, slope, s[..., None])
        most = logits.amax(dim=-1, keepdim=True)
        weights = (logits - most).exp_()
        total = weights.sum(dim=-1)
        return s * torch.linalg.vecdot(weights, slope) / total - most[..., 0] - total.log() + whole

    low, high = torch.zeros_like(whole), torch.full_like(whole, largest)
    enough = reached(high) <= divergence
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = reached(middle) <= divergence
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(enough, largest, low)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of logits (..., n_vocab), in nats, (...,)."""
    log_p, log_q = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(dim=-1)
