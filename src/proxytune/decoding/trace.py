"""Why each token was chosen: what the base and the experts gave it, and what else could have been chosen.

All numbers are of the vocabulary that the members share, before logits processors, in float32. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from proxytune.decoding.lane import Scores
from proxytune.decoding.mixing import Members, mix

__all__ = ["TOP_K", "Candidate", "TokenTrace", "Tracer", "flips"]

Origin = Literal["plain", "drafted", "copied", "corrected"]
TOP_K = 5  # of each distribution, unless the caller says otherwise
MAX_ALPHA = 3.0  # up to where flips are looked for
DIGITS = 6  # after the point, in JSON


@dataclass(frozen=True)
class Candidate:
    """A token that could have been chosen.

    Attributes:
        id: of the token. base_logprob, mixture_logprob: its log-probability in the base and in the mixture.
        expert_logprob: by expert, its log-probability in the expert; an expert with an anti-expert alone has no entry.
        delta: by expert, the log-probability in the expert minus that in the anti-expert; a missing side counts as 0.
        masked: whether the plausibility mask cut it.
    """

    id: int
    base_logprob: float
    mixture_logprob: float
    expert_logprob: dict[str, float]
    delta: dict[str, float]
    masked: bool

    def to_json(self) -> dict[str, Any]:
        """The candidate as JSON; an infinite or undefined number is None."""
        return {
            "id": self.id,
            "base_logprob": _number(self.base_logprob),
            "mixture_logprob": _number(self.mixture_logprob),
            "expert_logprob": {name: _number(value) for name, value in self.expert_logprob.items()},
            "delta": {name: _number(value) for name, value in self.delta.items()},
            "masked": self.masked,
        }


@dataclass(frozen=True)
class TokenTrace:
    """Why one token was chosen.

    Attributes:
        id: of the token. base_logprob, mixture_logprob: its log-probability in the base and in the mixture.
        base_rank: its rank in the base; 1 is the most probable.
        base_entropy, entropy: of the base and of the mixture, in nats. kl: KL(mixture || base), in nats.
        changed: whether the most probable token of the mixture is not that of the base.
        origin: ``drafted`` by a member or ``copied`` from the text, and accepted; ``corrected``: chosen where a draft
            was rejected; ``plain``: chosen without a draft.
        offsets: by expert, alpha times its ``delta`` for this token.
        candidates: the most probable tokens of the base, of the mixture, and of every expert and anti-expert, those
            that the mixture likes best first.
        flips: by expert, what greedy decoding would choose here for each alpha of it from 0 to 3, with the other
            experts as they are: pairs of the alpha from which on an id is chosen, and the id.

    Example:
        >>> import torch
        >>> from proxytune import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe")
        >>> output = model.generate(torch.tensor([[1, 40, 41]]), max_new_tokens=3, return_trace=True)
        >>> [token.id for token in output.traces[0]] == output.sequences[0, 3:].tolist()
        True
        >>> sorted(output.traces[0][0].to_json())[:3]
        ['base_entropy', 'base_logprob', 'base_rank']
    """

    id: int
    base_logprob: float
    mixture_logprob: float
    base_rank: int
    base_entropy: float
    entropy: float
    kl: float
    changed: bool
    origin: Origin
    offsets: dict[str, float]
    candidates: tuple[Candidate, ...]
    flips: dict[str, tuple[tuple[float, int], ...]]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, numbers with six digits after the point; an infinite or undefined one is None."""
        return {
            "id": self.id,
            "base_logprob": _number(self.base_logprob),
            "mixture_logprob": _number(self.mixture_logprob),
            "base_rank": self.base_rank,
            "base_entropy": _number(self.base_entropy),
            "entropy": _number(self.entropy),
            "kl": _number(self.kl),
            "changed": self.changed,
            "origin": self.origin,
            "offsets": {name: _number(value) for name, value in self.offsets.items()},
            "candidates": [each.to_json() for each in self.candidates],
            "flips": {name: [[_number(alpha), id_] for alpha, id_ in pairs] for name, pairs in self.flips.items()},
        }


def _number(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


class Tracer:
    """Traces the tokens of one call: it sees what the members gave at each step, and which tokens came of it."""

    def __init__(
        self,
        prompt: Members,
        members: Callable[[Sequence[Scores]], Members],
        names: Sequence[str],
        *,
        top_k: int,
        plausibility: float | None,
        n_shared: int,
    ) -> None:
        """
        Args:
            prompt: the members' logits behind the prompt, (n_batch, 1, n_vocab) each.
            members: from all lanes' scores to the members' logits. names: of the experts.
            top_k: candidates of each distribution. plausibility: see :func:`proxytune.decoding.mixing.mix`.
            n_shared: ids below it are in every member's vocabulary.
        """
        self.members, self.names, self.top_k = members, list(names), min(top_k, n_shared)
        self.plausibility, self.n_shared = plausibility, n_shared
        self.seen = [prompt]  # this step's, position behind position

    def see(self, scores: Sequence[Scores]) -> None:
        """Take all lanes' scores at the next positions of this step."""
        self.seen.append(self.members(scores))

    def settle(
        self,
        tokens: Sequence[Sequence[int]],
        counts: Sequence[int],
        n_drafts: int,
        source: Literal["lane", "lookup"] | None,
        alpha: Tensor,
    ) -> list[list[TokenTrace]]:
        """End a step: the traces of the tokens that each row took.

        Args:
            tokens: of each row in the batch, none where it had ended before. counts: how many drafts each accepted.
            n_drafts, source: of the drafts, see :class:`proxytune.decoding.loop.Step`.
            alpha: shape = (n_batch, n_experts).
        """
        seen, self.seen = self.seen, []
        places = [(row, at) for row, taken in enumerate(tokens) for at in range(len(taken))]
        rows, positions = (torch.tensor(part) for part in zip(*places))
        base, pairs = zip(*seen)
        device = base[0].device

        def chosen(parts: Sequence[Tensor | None]) -> Tensor | None:  # (n_tokens, n_shared)
            logits = [part for part in parts if part is not None]
            if not logits:
                return None
            at = logits[0].device
            return torch.cat(logits, dim=1)[rows.to(at), positions.to(at), : self.n_shared].to(device, torch.float32)

        experts = [(chosen([e for e, _ in each]), chosen([a for _, a in each])) for each in zip(*pairs)]
        at_base = chosen(base)
        assert at_base is not None
        ids = torch.tensor([tokens[row][at] for row, at in places], device=device)
        origins = [_origin(at, counts[row], n_drafts, source) for row, at in places]
        traced = iter(self._trace(at_base, experts, alpha.to(device)[rows.to(device)], ids, origins))
        return [list(islice(traced, len(taken))) for taken in tokens]

    def _trace(
        self,
        base: Tensor,
        experts: Sequence[tuple[Tensor | None, Tensor | None]],
        alpha: Tensor,
        ids: Tensor,
        origins: Sequence[Origin],
    ) -> list[TokenTrace]:
        """The traces of n_tokens tokens, of any rows and positions.

        Args:
            base: logits, shape = (n_tokens, n_shared), float32; experts: of that shape each.
            alpha: shape = (n_tokens, n_experts). ids: shape = (n_tokens,).
        """
        sides = [[None if side is None else side.log_softmax(dim=-1) for side in pair] for pair in experts]
        base_log = base.log_softmax(dim=-1)
        mixed_log = self._mix(base, experts, alpha).log_softmax(dim=-1)
        implausible = (self._mix(base, [], alpha[:, :0]) == -torch.inf) & (base > -torch.inf)
        nothing = torch.zeros_like(base)
        deltas = [(nothing if e is None else e) - (nothing if a is None else a) for e, a in sides]
        base_at = _at(base_log, ids)

        # Of each distribution the top k; where fewer tokens are possible at all, -1 fills up.
        tops = [
            each.topk(self.top_k, dim=-1)
            for each in (base_log, mixed_log, *(s for pair in sides for s in pair if s is not None))
        ]
        candidates = torch.cat([top.indices.where(top.values > -torch.inf, -1) for top in tops], dim=1)
        spots = candidates.clamp(min=0)

        columns = [
            base_at,
            _at(mixed_log, ids),
            (base_log > base_at[:, None]).sum(dim=-1) + 1,
            _entropy(base_log),
            _entropy(mixed_log),
            _divergence(mixed_log, base_log),
            base_log.argmax(dim=-1) != mixed_log.argmax(dim=-1),
            *(alpha[:, k] * _at(delta, ids) for k, delta in enumerate(deltas)),
        ]
        blocks = [torch.stack([column.float() for column in columns], dim=1), candidates]
        blocks += [each.gather(1, spots) for each in (base_log, mixed_log, implausible, *deltas)]
        blocks += [(nothing if expert is None else expert).gather(1, spots) for expert, _ in sides]
        for k, pair in enumerate(experts):
            others = alpha.clone()
            others[:, k] = 0.0
            slope = self._mix(nothing, [pair], torch.ones_like(alpha[:, :1]))
            blocks += flips(self._mix(base, experts, others), slope)

        # One transfer: float32 holds every id and rank below 2^24.
        lines = iter(torch.cat([block.float() for block in blocks], dim=1).split([b.shape[1] for b in blocks], dim=1))
        told = [line.tolist() for line in lines]
        present = [expert is not None for expert, _ in sides]
        return [
            self._record(token, [block[row] for block in told], origins[row], present)
            for row, token in enumerate(ids.tolist())
        ]

    def _mix(self, base: Tensor, experts: Sequence[tuple[Tensor | None, Tensor | None]], alpha: Tensor) -> Tensor:
        """The mixture of each token by itself, (n_tokens, n_shared)."""

        def alone(side: Tensor | None) -> Tensor | None:
            return None if side is None else side[:, None]

        pairs = [(alone(expert), alone(anti_expert)) for expert, anti_expert in experts]
        return mix(base[:, None], pairs, alpha, plausibility=self.plausibility)[:, 0]

    def _record(self, token: int, blocks: list[list[float]], origin: Origin, present: Sequence[bool]) -> TokenTrace:
        """One token's numbers, in the order in which :meth:`_trace` puts them; ``present``: who is an expert at all."""
        n_experts = len(self.names)
        base, mixed, rank, base_entropy, entropy, kl, changed, *offsets = blocks[0]
        ids, base_logs, mixed_logs, masked, *rest = blocks[1:]
        deltas, expert_logs, steps = rest[:n_experts], rest[n_experts : 2 * n_experts], rest[2 * n_experts :]
        experts = [(name, logs) for name, logs, there in zip(self.names, expert_logs, present) if there]
        spots = {int(id_): spot for spot, id_ in enumerate(ids) if id_ >= 0}
        best_first = sorted(spots.items(), key=lambda item: (-mixed_logs[item[1]], -base_logs[item[1]], item[0]))
        return TokenTrace(
            id=token,
            base_logprob=base,
            mixture_logprob=mixed,
            base_rank=int(rank),
            base_entropy=base_entropy,
            entropy=entropy,
            kl=kl,
            changed=bool(changed),
            origin=origin,
            offsets=dict(zip(self.names, offsets)),
            candidates=tuple(
                Candidate(
                    id_,
                    base_logs[spot],
                    mixed_logs[spot],
                    {name: logs[spot] for name, logs in experts},
                    {name: delta[spot] for name, delta in zip(self.names, deltas)},
                    bool(masked[spot]),
                )
                for id_, spot in best_first
            ),
            flips={
                name: tuple((a, int(i)) for a, i in zip(alphas, chosen) if i >= 0)
                for name, alphas, chosen in zip(self.names, steps[::2], steps[1::2])
            },
        )


def flips(start: Tensor, slope: Tensor, end: float = MAX_ALPHA) -> tuple[Tensor, Tensor]:
    """Which line is highest for each alpha from 0 to ``end``: the upper envelope of ``start + alpha * slope``.

    Args:
        start: each token's logit at alpha 0, (n_rows, n_vocab), -inf where it can't be chosen.
        slope: what alpha 1 adds to it, of that shape; -inf where every alpha above 0 excludes the token.

    Returns:
        The alphas from which on another token is highest, ascending from 0, and the tokens' ids, both
        (n_rows, n_steps). An id of -1 is no step. A token that leads at 0 alone is followed by another one at 0.
    """
    at = start.new_zeros(start.shape[0], 1)
    leader = start.argmax(dim=-1, keepdim=True)  # of equals the lowest id, as in greedy decoding
    start = start.masked_fill(slope == -torch.inf, -torch.inf)
    best = start.argmax(dim=-1, keepdim=True)
    other = (best != leader) & (start.amax(dim=-1, keepdim=True) > -torch.inf)
    alphas, ids = [at, at], [leader, best.where(other, -1)]
    while True:
        # Line j overtakes line i, which leads at alpha, where start_i + alpha slope_i = start_j + alpha slope_j.
        rise = slope - slope.gather(1, best)
        meets = (start.gather(1, best) - start) / rise
        meets = meets.where((rise > 0) & (start > -torch.inf), torch.inf).maximum(at)  # rounding may go below
        at = meets.amin(dim=-1, keepdim=True)
        best = slope.where(meets == at, -torch.inf).argmax(dim=-1, keepdim=True)  # of several the steepest leads on
        overtaken = at <= end
        if not bool(overtaken.any()):
            return torch.cat(alphas, dim=1), torch.cat(ids, dim=1)
        alphas.append(at)
        ids.append(best.where(overtaken, -1))


def _origin(at: int, n_accepted: int, n_drafts: int, source: Literal["lane", "lookup"] | None) -> Origin:
    """Of a row's token number ``at`` in a step."""
    if at < n_accepted:
        return "copied" if source == "lookup" else "drafted"
    return "corrected" if at < n_drafts else "plain"


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """The values of some ids, (n_tokens, n_shared) -> (n_tokens,); -inf for ids that not every member has."""
    known = ids < values.shape[-1]
    return values.gather(1, ids.where(known, 0)[:, None])[:, 0].where(known, -torch.inf)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0).sum(dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), at least 0 in spite of rounding."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(dim=-1).clamp(min=0.0)
