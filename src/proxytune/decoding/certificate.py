"""Which greedy choices are certain if the base's probabilities are known only for some tokens.

Let S be the tokens whose base log-probability is known, and u a bound on that of all others. The offsets, δ, are known
for every token. So u + δ(v) bounds the mixture of each v outside S, and x in S is the choice over the whole vocabulary
if

    base(x) + δ(x) > u + max over v outside S of δ(v)

It holds for the mixture itself. Changes by logits processors are not covered.

If the server itself chooses, it needs to be told δ of only some tokens M. With c the largest δ outside M, it adds
δ(v) - c to each v in M and nothing to the others, which then count as if their δ were c. If its choice x is in M,

    base(x) + δ(x) - c ≥ base(v)   gives   base(x) + δ(x) ≥ base(v) + c ≥ base(v) + δ(v)   for all v outside M

and x is the choice of the mixture.

If tokens are drawn from S alone, at temperature T, the distribution differs from the one over the whole vocabulary by
the mass that the latter has outside S. With m the base's probability that is left outside S, D the largest δ there, n
the number of tokens there and a = 1/T, the total variation distance is at most

    R / (Z + R),   Z = sum over S of (p_base e^δ)^a,   R = n^max(0, 1 - a) (m e^D)^a

because the sum over n tokens of (p_base e^δ)^a is largest if one of them has all of m (a > 1) or all have one share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxytune.decoding.lane import AskedState, Scores
from proxytune.decoding.loop import Step
from proxytune.errors import ProxyTuneError

__all__ = ["MARGIN", "Certifier", "biases", "bounded", "drawn_from_known", "judge", "known_ids", "most_probable"]

MARGIN = 1e-4  # the margin by which a choice must win: rounding in float32, here and at the server
ROUNDING = 1e-4  # how far the probabilities that a server names may be off, all together


def known_ids(scores: Scores, n_vocab: int) -> Tensor:
    """Which tokens are known in scores, (n_rows, n_positions, n_vocab), bool."""
    assert scores.ids is not None
    known = torch.zeros(*scores.ids.shape[:2], n_vocab + 1, dtype=torch.bool, device=scores.ids.device)
    return known.scatter_(2, scores.ids.where(scores.ids >= 0, n_vocab), True)[..., :n_vocab]


def bounded(scores: Scores, n_vocab: int) -> Tensor:
    """The log-probabilities of the known tokens, and the bound for all others, (n_rows, n_positions, n_vocab)."""
    assert scores.ids is not None
    assert scores.bound is not None
    values = scores.bound[..., None].expand(-1, -1, n_vocab + 1).clone()
    return values.scatter_(2, scores.ids.where(scores.ids >= 0, n_vocab), scores.values)[..., :n_vocab]


def judge(upper: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Which choices are certain, and which unknown tokens could win instead of the others.

    Args:
        upper: the mixture of known tokens, and an upper bound for each other one, (n_rows, n_positions, n_vocab).
        known: which are which, of that shape.

    Returns:
        (n_rows, n_positions), bool; and the unknown tokens that could win, of ``upper``'s shape, bool.
    """
    inside = upper.masked_fill(~known, -torch.inf).topk(min(2, upper.shape[-1]), dim=-1).values
    best, second = inside[..., :1], inside[..., -1:]
    rivals = ~known & (upper + MARGIN >= best) & (upper > -torch.inf)
    clear = (best - MARGIN > second) | (second == -torch.inf)
    return ((best > -torch.inf) & clear)[..., 0] & ~rivals.any(dim=-1), rivals


def drawn_from_known(scores: Scores, upper: Tensor, known: Tensor, temperature: float) -> Tensor:
    """How far the distribution over known tokens can be from the whole mixture's: a bound on the total variation.

    Args:
        scores: the base's. upper, known: as in :func:`judge`, where the mixture is the base's log-probabilities plus δ.

    Returns:
        (n_rows, n_positions), from 0 to 1; see the equation above.
    """
    assert scores.bound is not None
    a, outside = 1 / temperature, ~known & (upper > -torch.inf)
    rest = (1 - scores.values.double().exp().sum(dim=-1)).clamp(min=0) + ROUNDING
    largest = (upper - scores.bound[..., None]).masked_fill(~outside, -torch.inf).amax(dim=-1)
    spread = outside.sum(dim=-1).clamp(min=1).log() * max(0.0, 1 - a)
    inside = (a * upper.double()).masked_fill(~known, -torch.inf).logsumexp(dim=-1)
    bound = (spread + a * (rest.log() + largest) - inside).sigmoid()
    return bound.masked_fill(~outside.any(dim=-1), 0.0)


def biases(offsets: Tensor, likely: Tensor, n: int, most: float) -> tuple[Tensor, Tensor]:
    """Some tokens and what a server is to add to their logits, so that a choice among them is that of the mixture.

    Half of them are the tokens that ``likely`` has on top, the others those that steering lifts most.

    Args:
        offsets: what steering adds to each token, (n_vocab,); -inf where it excludes one, but not all.
        likely: how probable each token is thought to be, (n_vocab,). n: how many tokens.
        most: the largest bias. Where one would exceed it, c (see above) is raised.

    Returns:
        ids, (n,), int64, and their biases, (n,), at most ``most``. A token whose bias is smaller than servers take is
        counted for too much there, so it is not certain if it wins.
    """
    level, ids = offsets.max(), likely.topk(min(n // 2, len(likely))).indices
    if n < len(offsets):
        others = offsets.index_fill(0, ids, -torch.inf).topk(n - len(ids) + 1)
        ids = torch.cat([ids, others.indices[:-1]])
        level = others.values[-1].clamp(min=level - most)
    else:
        ids = torch.arange(len(offsets), device=offsets.device)
    return ids, (offsets[ids] - level).clamp(max=most)


def most_probable(logits: Sequence[Tensor], n_batch: int, n_vocab: int) -> Tensor:
    """The largest log-probability that some member gives each token, (n_batch, n_vocab), -inf where all lack it.

    Args:
        logits: of lanes, (n_rows, their vocabulary) each, seat by seat.
    """
    found = torch.full((n_batch, n_vocab), -torch.inf)
    for each in logits:
        largest = each.float().log_softmax(dim=-1).unflatten(0, (-1, n_batch)).amax(dim=0)[:, :n_vocab].to(found.device)
        found[:, : largest.shape[1]] = found[:, : largest.shape[1]].maximum(largest)
    return found


class Certifier:
    """Mixes the scores of an incomplete base, asks it for more if they do not decide the choice, and marks each token.

    Attributes:
        marks: for each of the caller's rows, whether each new token is certain.
        apart: for each of them, how far the distribution that each token was drawn from can be from the mixture, if
            tokens are drawn from those that the base names.
    """

    def __init__(
        self,
        lane: int,
        state: AskedState,
        n_vocab: int,
        n_batch: int,
        *,
        asks: bool,
        draws: bool,
        exact: bool,
        whole: bool,
        needs_best: bool,
        temperature: float | None = None,
    ) -> None:
        """
        Args:
            lane: the number of the base's lane; state: its state. n_vocab: the base's vocabulary.
            asks: whether the base is asked again. draws: whether it chooses by itself first, if it is sure.
            exact: whether the choice is the best of the mixture: no logits processors, no sampling.
            whole: whether the base knows all tokens, so that any choice is certain.
            needs_best: whether the mixture depends on the base's most probable token, as the plausibility mask does.
            temperature: of draws from the tokens that the base names; None: there are none.
        """
        self.lane, self.state, self.n_vocab = lane, state, n_vocab
        self.asks, self.draws = asks, draws
        self.exact, self.whole, self.needs_best = exact, whole, needs_best
        self.temperature = temperature
        self.marks: list[list[bool]] = [[] for _ in range(n_batch)]
        self.apart: list[list[float]] = [[] for _ in range(n_batch)]
        self.seen: list[Tensor] = []  # this step's, (n_batch, n_positions) each
        self.bounds: list[Tensor] = []
        self.start = 0  # columns before this step's first position, and in it

    def mix(
        self,
        scores: Sequence[Scores],
        mix: Callable[[Sequence[Tensor]], Tensor],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The mixture, (n_batch, n_positions, n_vocab), -inf where the base is not known.

        Args:
            mix: from the logits of all lanes to their mixture.
            meanwhile: what is to be done while the base chooses.

        Raises:
            ProxyTuneError: if no known token can be chosen.
        """
        values = [each.values for each in scores]
        base = scores[self.lane]
        start = self.start + sum(seen.shape[1] for seen in self.seen)
        drawn: dict[int, int] = {}  # row -> the token that the base itself chose
        if self.draws:
            members = [each[:, 0] for at, each in enumerate(values) if at != self.lane]
            likely = most_probable(members, base.values.shape[0], self.n_vocab)
            values[self.lane] = torch.zeros(*base.values.shape[:2], self.n_vocab)
            wait = self.state.draw(start, mix(values)[:, 0], likely)
            meanwhile()
            drawn = {row: token for row, token in enumerate(wait()) if token is not None}
            if len(drawn) == len(base.values):  # all is decided
                self.seen.append(torch.ones(len(drawn), 1, dtype=torch.bool))
                chosen = torch.tensor(list(drawn.values()))[:, None, None]
                return torch.full((len(drawn), 1, self.n_vocab), -torch.inf).scatter(2, chosen, 0.0)
        while True:
            values[self.lane] = bounded(base, self.n_vocab)
            known, upper = known_ids(base, self.n_vocab), mix(values)
            certain, rivals = judge(upper, known)
            if self.needs_best:
                assert base.bound is not None
                certain &= base.values.amax(dim=-1) >= base.bound
            if not self.asks:
                break
            # Nothing is written after a rejected draft, so nothing is asked. A draft that could win counts as accepted:
            # the places after it are then asked about at the same time.
            drafts = self.state.behind(start, upper.shape[1])
            kept = upper.masked_fill(~known, -torch.inf).argmax(dim=-1) == drafts
            kept |= rivals.gather(2, drafts.clamp(min=0)[..., None])[..., 0] & (drafts >= 0)
            reached = kept.cumprod(dim=1).bool().roll(1, dims=1).index_fill(1, torch.tensor([0]), True)
            rivals &= reached[..., None]
            rivals[list(drawn)] = False
            more = self.state.ask(start, rivals) if bool(rivals.any()) else None
            if more is None:
                break
            base = more
        mixed = upper.masked_fill(~known, -torch.inf)
        for row, token in drawn.items():
            mixed[row] = torch.full_like(mixed[row], -torch.inf).index_fill(1, torch.tensor([token]), 0.0)
            certain[row] = True
        if bool((mixed.amax(dim=-1) == -torch.inf).any()):
            raise ProxyTuneError(
                "none of the tokens that the base's server names can be chosen here; raise the recipe's top_logprobs"
            )
        if not self.exact:
            certain = ~(~known & (upper > -torch.inf)).any(dim=-1) & self.whole
        self.seen.append(certain)
        if self.temperature is not None:
            bounds = drawn_from_known(base, upper, known, self.temperature)
            if self.needs_best:  # a more probable token might mask others
                assert base.bound is not None
                bounds = bounds.masked_fill(base.values.amax(dim=-1) < base.bound, 1.0)
            self.bounds.append(bounds)
        return mixed

    def settle(self, step: Step) -> None:
        """Take the marks of the tokens that a step wrote."""
        certain = torch.cat(self.seen, dim=1).tolist()
        for row, taken, own in zip(step.rows, step.tokens, certain):
            self.marks[row] += own[: len(taken)]
        if self.bounds:
            for row, taken, bounds in zip(step.rows, step.tokens, torch.cat(self.bounds, dim=1).tolist()):
                self.apart[row] += bounds[: len(taken)]
        self.seen, self.bounds, self.start = [], [], 1
