"""Traces: why each token was chosen, what the base and the experts gave it, and what else could have been chosen.

All numbers cover the vocabulary that the members share, before logits processors, in float32. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor

from proxytune.decoding.conflict import Conflict, conflicts, lined_up
from proxytune.decoding.flips import best, contenders, flips, top
from proxytune.decoding.lane import Scores
from proxytune.decoding.mixing import Members, as_sum, joined, mix, opening
from proxytune.recipe.rules import LINEAR, Steering

__all__ = ["TOP_K", "Candidate", "TokenTrace", "Tracer", "as_json"]

Origin = Literal["plain", "drafted", "copied", "corrected"]
TOP_K = 5  # of each distribution, unless the caller says otherwise
DIGITS = 6  # after the point, in JSON
CPU_TOKENS = 4  # that are traced together on a CPU


@dataclass(frozen=True)
class Candidate:
    """A token that could have been chosen.

    Attributes:
        id: the token's id. base_logprob, mixture_logprob: its log-probability in the base and in the mixture.
        expert_logprob: expert name -> its log-probability in that expert. Experts that have only an anti-expert have no
            entry.
        delta: expert name -> the log-probability in the expert minus that in the anti-expert. A missing side counts as
            0.
        masked: whether the plausibility mask excluded it.
    """

    id: int
    base_logprob: float
    mixture_logprob: float
    expert_logprob: dict[str, float]
    delta: dict[str, float]
    masked: bool


@dataclass(frozen=True)
class TokenTrace:
    """Why one token was chosen.

    Attributes:
        id: the token's id. base_logprob, mixture_logprob: its log-probability in the base and in the mixture.
        base_rank: its rank in the base; 1 is the most probable.
        base_entropy, entropy: the entropy of the base and of the mixture, in nats. kl: KL(mixture || base), in nats.
        changed: True if the mixture and the base have different most probable tokens.
        origin: ``drafted`` (an accepted draft of an expert), ``copied`` (an accepted draft that was copied from the
            text), ``corrected`` (chosen where a draft was rejected) or ``plain`` (chosen without a draft).
        offsets: expert name -> alpha times its ``delta`` for this token.
        candidates: the most probable tokens of the base, of the mixture, and of every expert and anti-expert, sorted by
            their probability in the mixture.
        flips: expert name -> what greedy decoding would choose here at any alpha of that expert from 0 to 3, with the
            other experts unchanged: pairs (alpha, id), where the id is chosen from that alpha on. Empty for rules under
            which the mixture is no straight line in alpha, and with a gate.
        conflict: how far the experts disagree; None if there are fewer than two.
        opened: how far the gate is open, from 0 (the base alone) to 1; for ``bet``, the probability that the token is
            drawn from the mixture. None without a gate.
        certified: for a base behind an API, whether the token is certain to be the choice of the whole mixture; None
            for a base on this machine, and then not part of the JSON.

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
    conflict: Conflict | None = None
    opened: float | None = None
    certified: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, numbers with six digits after the point; an infinite or undefined one is None."""
        return {name: as_json(value) for name, value in vars(self).items() if value is not None}


def as_json(value: Any) -> Any:
    """A value of a trace as JSON: numbers have six digits after the point, and are None if infinite or undefined."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    if isinstance(value, (Candidate, Conflict)):
        value = vars(value)
    return {name: as_json(each) for name, each in value.items()} if isinstance(value, Mapping) else value


class Tracer:
    """Traces the tokens of one call: it gets the members' logits at each step, and the tokens that were chosen."""

    def __init__(
        self,
        prompt: Members,
        mixed: Tensor,
        members: Callable[[Sequence[Scores]], Members],
        names: Sequence[str],
        *,
        top_k: int,
        steering: Steering,
        plausibility: float | None,
        n_shared: int,
    ) -> None:
        """
        Args:
            prompt: the members' logits after the prompt, and ``mixed``, their mixture, (n_batch, 1, n_vocab) each.
            members: gives the members' logits from all lanes' scores. names: the experts' names.
            top_k: candidates per distribution.
            steering, plausibility: see :func:`proxytune.decoding.mixing.mix`. Flips are found where the mixture is a
                straight line in each alpha: for some rules, and without a gate.
            n_shared: ids below it are in every member's vocabulary.
        """
        self.members, self.names, self.top_k = members, list(names), min(top_k, n_shared)
        self.rule, self.gate, self.plausibility, self.n_shared = steering.rule, steering.gate, plausibility, n_shared
        # This step's, position after position: members, mixture, and how far the gate is open, if that is known.
        self.seen: list[tuple[Members, Tensor, Tensor | None]] = [(prompt, mixed.clone(), None)]

    def see(self, scores: Sequence[Scores], mixed: Tensor, opened: Tensor | None) -> None:
        """Record all lanes' scores at the next positions of this step, their mixture, and how far the gate is open,
        if that is known."""
        self.seen.append((self.members(scores), mixed.clone(), opened))  # logits processors may write on it

    def settle(
        self,
        tokens: Sequence[Sequence[int]],
        counts: Sequence[int],
        n_drafts: int,
        source: Literal["lane", "lookup"] | None,
        alpha: Tensor,
    ) -> list[list[TokenTrace]]:
        """End a step; return the traces of the tokens that each row took.

        Args:
            tokens: the tokens of each row in the batch; empty if it had ended before. counts: how many drafts each
                accepted.
            n_drafts, source: see :class:`proxytune.decoding.loop.Step`.
            alpha: shape = (n_batch, n_experts).
        """
        seen, self.seen = self.seen, []
        places = [(row, at) for row, taken in enumerate(tokens) for at in range(len(taken))]
        members, mixtures, openings = zip(*seen)
        bases, pairs = zip(*members)
        device = mixtures[0].device

        def columns(parts: Sequence[Tensor | None]) -> list[Tensor]:  # of each position, (n_batch, n_vocab)
            return [column for part in parts if part is not None for column in part.unbind(dim=1)]

        def chosen(of: Sequence[Tensor], few: Sequence[tuple[int, int]]) -> Tensor | None:  # (n_tokens, n_shared)
            if not of:
                return None
            return torch.stack([of[at][row, : self.n_shared] for row, at in few]).to(device, torch.float32)

        base, mixed = columns(bases), columns(mixtures)
        experts = [(columns([e for e, _ in each]), columns([a for _, a in each])) for each in zip(*pairs)]
        alpha = alpha.to(device)
        told = None if None in openings else torch.cat([each.expand(len(tokens), -1).cpu() for each in openings], dim=1)
        # On a CPU a few tokens at a time: what is computed of them stays in its caches, which halves the time.
        step = CPU_TOKENS if device.type == "cpu" else max(1, len(places))
        traced: list[TokenTrace] = []
        for start in range(0, len(places), step):
            few = places[start : start + step]
            traced += self._trace(
                cast(Tensor, chosen(base, few)),
                cast(Tensor, chosen(mixed, few)),
                [(chosen(expert, few), chosen(anti_expert, few)) for expert, anti_expert in experts],
                alpha[torch.tensor([row for row, _ in few], device=device)],
                torch.tensor([tokens[row][at] for row, at in few], device=device),
                [_origin(at, counts[row], n_drafts, source) for row, at in few],
                None if told is None else torch.stack([told[row, at] for row, at in few])[:, None],
            )
        rest = iter(traced)
        return [list(islice(rest, len(taken))) for taken in tokens]

    def _trace(
        self,
        base: Tensor,
        mixed: Tensor,
        experts: Sequence[tuple[Tensor | None, Tensor | None]],
        alpha: Tensor,
        ids: Tensor,
        origins: Sequence[Origin],
        opened: Tensor | None,
    ) -> list[TokenTrace]:
        """The traces of n_tokens tokens, of any rows and positions.

        Only float operations run over the whole vocabulary. PyTorch's boolean comparisons, and operations on their
        results, cost several times as much on a CPU.

        Args:
            base, mixed, experts: logits, shape = (n_tokens, n_shared) each, float32.
            alpha: shape = (n_tokens, n_experts). ids: shape = (n_tokens,). opened: (n_tokens, 1), if it is known.
        """
        of_base, of_mixed = _Distribution(base), _Distribution(mixed)
        experts, weights = as_sum(self.rule, base, experts, alpha)

        # The top k of each distribution; filled with -1 if fewer tokens are possible.
        tops = [
            top(each, self.top_k) for each in (base, mixed, *(s for pair in experts for s in pair if s is not None))
        ]
        candidates = torch.cat([ids_.where(values > -torch.inf, -1) for values, ids_ in tops], dim=1)
        known = ids < self.n_shared  # a logits processor may force one that not every member has
        spots = torch.cat([ids.where(known, 0)[:, None], candidates.clamp(min=0)], dim=1)  # the written token's first
        nothing = torch.zeros_like(spots, dtype=torch.float32)
        sides_at = [[nothing if side is None else _log_p(side, spots) for side in pair] for pair in experts]
        deltas = [expert - anti_expert for expert, anti_expert in sides_at]
        base_logs, mixed_logs = of_base.log_p(spots), of_mixed.log_p(spots)
        for values in (base_logs, mixed_logs, *deltas):
            values[:, 0].masked_fill_(~known, -torch.inf)

        columns = [
            base_logs[:, 0],
            mixed_logs[:, 0],
            torch.gt(base, base.gather(1, spots[:, :1]), out=torch.empty_like(base)).sum(dim=-1) + 1,
            of_base.entropy(),
            of_mixed.entropy(),
            of_mixed.divergence(of_base),
            (best(base) != best(mixed))[:, 0],
            *(weights[:, k] * delta[:, 0] for k, delta in enumerate(deltas)),
        ]
        blocks = [torch.stack([column.float() for column in columns], dim=1), candidates]
        blocks += [each[:, 1:] for each in (base_logs, mixed_logs, self._implausible(base, spots), *deltas)]
        blocks += [expert[:, 1:] for expert, _ in sides_at]
        for k, (expert, anti_expert) in enumerate(experts if self.rule in LINEAR and self.gate is None else ()):
            others = [at for at in range(len(experts)) if at != k]
            start = self._mix(base, [experts[at] for at in others], weights[:, others])
            up, down = (torch.zeros_like(base) if side is None else side for side in (expert, anti_expert))
            slope = (up - down).nan_to_num_(0.0, posinf=0.0, neginf=-torch.inf)  # as `mix` takes it
            slope = slope / len(experts) if self.rule == "mean" else slope
            blocks += contenders(start, slope)

        apart: Sequence[Conflict | None] = [None] * len(ids)
        if len(experts) > 1:
            apart = conflicts(base, experts, alpha, plausibility=self.plausibility)
        shares: Sequence[float | None] = [None] * len(ids)
        if self.gate is not None:
            added = joined(self.rule, base[:, None], lined_up(experts), weights)
            shares = opening(self.gate, base[:, None], added, opened)[:, 0].tolist()

        # One transfer: float32 holds every id and rank below 2^24.
        lines = iter(torch.cat([block.float() for block in blocks], dim=1).split([b.shape[1] for b in blocks], dim=1))
        told = [line.tolist() for line in lines]
        present = [expert is not None for expert, _ in experts]
        return [
            self._record(token, [block[row] for block in told], origins[row], present, apart[row], shares[row])
            for row, token in enumerate(ids.tolist())
        ]

    def _mix(self, base: Tensor, experts: Sequence[tuple[Tensor | None, Tensor | None]], alpha: Tensor) -> Tensor:
        """The mixture of each token by itself, (n_tokens, n_shared)."""
        return mix(base[:, None], lined_up(experts), alpha, plausibility=self.plausibility)[:, 0]

    def _implausible(self, base: Tensor, spots: Tensor) -> Tensor:
        """Whether the plausibility mask cuts tokens, of shape ``spots``."""
        if self.plausibility is None:
            return torch.zeros_like(spots)
        at, least = base.gather(1, spots), base.amax(dim=-1, keepdim=True) + math.log(self.plausibility)
        return (at < least) & (at > -torch.inf)

    def _record(
        self,
        token: int,
        blocks: list[list[float]],
        origin: Origin,
        present: Sequence[bool],
        conflict: Conflict | None,
        opened: float | None,
    ) -> TokenTrace:
        """One token's numbers, in the order in which :meth:`_trace` puts them; ``present``: who is an expert at all."""
        n_experts = len(self.names)
        base, mixed, rank, base_entropy, entropy, kl, changed, *offsets = blocks[0]
        ids, base_logs, mixed_logs, masked, *rest = blocks[1:]
        deltas, expert_logs, lines = rest[:n_experts], rest[n_experts : 2 * n_experts], rest[2 * n_experts :]
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
                name: flips(ids_, starts, slopes)
                for name, ids_, starts, slopes in zip(self.names, lines[::3], lines[1::3], lines[2::3])
            },
            conflict=conflict,
            opened=opened,
        )


class _Distribution:
    """The probabilities that logits, (n_tokens, n_shared), give each token.

    Attributes:
        p: probabilities. below: the logits minus the largest one, finite. rest: ``below`` minus the log-probabilities,
            (n_tokens, 1).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.largest = logits, logits.amax(dim=-1, keepdim=True)
        self.below = (logits - self.largest).clamp_(min=torch.finfo(torch.float32).min)  # 0 * -inf would be NaN
        self.p = self.below.softmax(dim=-1)
        self.rest = -self.p.amax(dim=-1, keepdim=True).log()

    def log_p(self, ids: Tensor) -> Tensor:
        """The log-probabilities of some ids, (n_tokens, n_ids)."""
        return self.logits.gather(1, ids) - self.largest - self.rest

    def entropy(self) -> Tensor:
        """In nats, (n_tokens,)."""
        return (self.rest[:, 0] - torch.linalg.vecdot(self.p, self.below)).clamp(min=0.0)

    def divergence(self, other: _Distribution) -> Tensor:
        """KL(this || other) in nats, (n_tokens,), at least 0 in spite of rounding."""
        mean, of_other = (torch.linalg.vecdot(self.p, each.below) - each.rest[:, 0] for each in (self, other))
        return (mean - of_other).clamp(min=0.0)


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some ids, (n_tokens, n_ids), of logits (n_tokens, n_shared)."""
    return logits.gather(1, ids) - logits.logsumexp(dim=-1, keepdim=True)


def _origin(at: int, n_accepted: int, n_drafts: int, source: Literal["lane", "lookup"] | None) -> Origin:
    """The origin of a row's token number ``at`` in a step."""
    if at < n_accepted:
        return "copied" if source == "lookup" else "drafted"
    return "corrected" if at < n_drafts else "plain"
