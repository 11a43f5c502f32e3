"""The decoding loop of greedy search and sampling, and exact speculation in it: the experts draft, M verifies.

M+ must be run at every token anyway, and it resembles the mixture. So it runs ahead (2310.12962, section 4.2;
2211.17192): it drafts γ tokens and keeps its logits; M reads all of them in one pass, and so do the members that did
not draft; drafts are accepted by the rule of 2211.17192 held against the *mixture*, so that greedy output is the same
tokens, and sampled output has the same distribution, as without drafts.

Top to bottom: what is counted, the rule (:func:`accept_greedy`, :func:`accept_sampled`), where drafts come from, how
many (:class:`Pace`), one lane in mid-generation (:class:`LaneRun`), and the loop (:func:`decode`).

Rows of a batch accept different numbers of drafts. What a row rejected is dropped from its caches, and the row is
moved to the right, so that a batch stays what it was: left-padded, its newest tokens in one column.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import generation
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from proxytune.decoding.cost import APART_BYTES, MAX_DRAFTS, QUICK_HEAD, QUICK_ROWS, Cost, Costs, cost_of_weights
from proxytune.decoding.mixing import mix
from proxytune.decoding.noise import Noise
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.lanes.buffers import BufferLayer, can_roll_back

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Speculate", "SpeculationStats", "accept_greedy", "accept_sampled", "decode", "last_call", "parse_speculate"]

Speculate = Literal["auto"] | bool | int


HOPED_FOR = 0.75  # the acceptance, the demo's, at which drafting must pay for "auto" to try it
GROWTH = 512  # columns by which buffers grow: seldom enough to cost nothing


def parse_speculate(value: Any) -> Speculate:
    """``"auto"``, False (off), or a number of drafts from 1 to 12, as it was given; else :class:`ProxyTuneError`."""
    if value == "auto" or value is False or (value == 0 and isinstance(value, int)):
        return "auto" if value == "auto" else False
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_DRAFTS:
        return value
    raise ProxyTuneError(
        f"speculate must be 'auto', False, or a number of drafts from 1 to {MAX_DRAFTS}, not {value!r}"
    )


class _LastCalls(threading.local):
    """The statistics of each model's last call, in each thread."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Any, SpeculationStats] = weakref.WeakKeyDictionary()


_LAST_CALLS = _LastCalls()


def last_call(model: ProxyTunedForCausalLM) -> SpeculationStats:
    """What the model's last greedy or sampling call in this thread drafted; of all zeros before the first."""
    return _LAST_CALLS.of.get(model) or SpeculationStats()


@dataclass
class SpeculationStats:
    """What one call of ``generate`` drafted. Counts are of tokens, summed over the rows that were not yet finished.

    Attributes:
        cycles: passes of M after the prompt's. emitted: new tokens, the prompt's own pass included.
        drafted, accepted: tokens that a member drafted, and how many of them were accepted.
        looked_up, lookups_accepted: the same of drafts copied from the text so far, in ``lookup_cycles`` of the cycles.
        judged: drafts of both kinds that were held against the mixture: all but those behind a rejected one.
    """

    cycles: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    lookups_accepted: int = 0
    lookup_cycles: int = 0
    judged: int = 0

    @property
    def acceptance(self) -> float | None:
        """The share of judged drafts that was accepted (the α of 2211.17192), or None where nothing was drafted."""
        return (self.accepted + self.lookups_accepted) / self.judged if self.judged else None


# ---- the rule ------------------------------------------------------------------------------------------------
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

    A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)); in place of the first one rejected
    stands a draw from norm(max(0, p − q)).

    Args:
        drafts: shape = (n_batch, γ).
        p: the mixture's distribution at the positions of the drafts, after all logits processors,
            (n_batch, γ, n_vocab), float32.
        q: the distributions that the drafts were drawn from, of p's shape; None where they were not drawn but
            looked up, which is a distribution with all its mass on the draft.

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
    # Nothing is left only where p and q agree to the last bit, and then nothing is rejected but by rounding.
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p_at)
    return n_accepted, torch.multinomial(rest, num_samples=1).squeeze(1)


# ---- who drafts, how many, or from where ---------------------------------------------------------------------------
@dataclass
class Draft:
    """The drafts of one cycle.

    Attributes:
        tokens: shape = (n_batch, γ).
        q: what they were drawn from, (n_batch, γ, n_vocab), for rejection sampling; None where they were looked up,
            and elsewhere.
        logits: the drafting lane's, of the positions it has read, (n_rows, γ or more, n_vocab of the lane); None
            where it has read nothing.
        confidences: of each row that grows, the largest probability in q at each draft. Not the probability of the
            draft itself: what decides how far to draft must not look at a draw that it may discard, or it biases what
            is drawn.
    """

    tokens: Tensor
    q: Tensor | None = None
    logits: Tensor | None = None
    confidences: list[list[float]] = field(default_factory=list)
    looked_up: bool = False


@dataclass(frozen=True)
class Drafting:
    """The lane that drafts, and how its members' logits become a guess at the mixture.

    Attributes:
        stand_in: the block of rows that stands in for the base.
        shifts: for each expert with all its sides in the lane: its column of alpha, and the blocks of its sides.
    """

    lane: int
    stand_in: int
    shifts: tuple[tuple[int, int | None, int | None], ...]


def choose_drafting(model: ProxyTunedForCausalLM) -> Drafting | None:
    """The cheapest lane besides the base's, of equals the one with more members; None where there is none.

    M- stands in for M where it sits in the lane: the guess is M- + alpha (M+ - M-), which is M+ at alpha 1 and M- at
    alpha 0, and holds for several experts on one M-. Otherwise the expert speaks for itself.
    """
    base_lane = model.seats["base"][0]
    rivals = []
    for at, lane in enumerate(cast(Sequence[Any], model.lanes)):
        if at == base_lane:
            continue
        block = {name: seat for name, (where, seat) in model.seats.items() if where == at}
        antis = [name for name in block if name.endswith(".anti_expert")]
        experts = [name for name in block if not name.endswith(".anti_expert")]
        shifts = []
        for column, expert in enumerate(model.experts):
            sides = (f"{expert.name}.expert", f"{expert.name}.anti_expert")
            if all(side in block for side in sides if side in model.seats):
                shifts.append((column, block.get(sides[0]), block.get(sides[1])))
        chosen = Drafting(at, block[antis[0]], tuple(shifts)) if antis else Drafting(at, block[experts[0]], ())
        rivals.append(((lane.read_bytes, -len(block), not experts), chosen))
    return min(rivals, key=lambda rival: rival[0])[1] if rivals else None


def costs_of(model: ProxyTunedForCausalLM) -> Costs:
    """What the lanes cost, from their sizes; see :func:`proxytune.decoding.cost.cost_of_weights`."""
    costs, head = [], None
    for lane in cast(Sequence[Any], model.lanes):
        fast = lane.packed or lane.model.dtype != torch.float32
        layers = getattr(lane.config, "num_hidden_layers", 1)
        n_bytes = lane.read_bytes
        if lane.quick_head is not None:
            head = cost_of_weights(lane.head_bytes, 0, lane.device.type)
            n_bytes -= (1 - QUICK_HEAD) * lane.head_bytes
        costs.append(cost_of_weights(n_bytes, layers, lane.device.type, packed=fast))
    return replace(costs_by_role(model, costs, head), apart=APART_BYTES.get(model.device.type, APART_BYTES["cuda"]))


def costs_by_role(model: Any, lane_costs: Sequence[Cost], head: Cost | None = None) -> Costs:
    """The lanes' costs in their roles.

    Args:
        model: one, or what stands for its lanes, seats and experts.
        lane_costs: of each lane; the drafting one's with its quick head, where it has one.
        head: of that lane's own head, which then reads all drafts once a cycle.
    """
    base = model.seats["base"][0]
    drafting = choose_drafting(model)
    n_seats = [len(lane.seats) for lane in model.lanes]
    draft = None if drafting is None else drafting.lane
    others = [(lane_costs[at], n_seats[at]) for at in range(len(n_seats)) if at not in (base, draft)]
    if head is not None and draft is not None:
        others.append((head, n_seats[draft]))
    return Costs(
        lane_costs[base],
        None if draft is None else lane_costs[draft],
        1 if draft is None else n_seats[draft],
        tuple(others),
        base_seats=n_seats[base],
    )


@dataclass
class Estimate:
    """A running estimate of acceptance: begins at ``prior``, and forgets with a horizon of about 50 drafts."""

    prior: float
    weight: float = 4.0
    accepted: float = 0.0
    judged: float = 0.0

    @property
    def value(self) -> float:
        return (self.prior * self.weight + self.accepted) / (self.weight + self.judged)

    def saw(self, accepted: int, judged: int) -> None:
        fade = 0.98**judged
        self.accepted, self.judged = self.accepted * fade + accepted, self.judged * fade + judged


class Pace:
    """Decides how far to draft: as long as another draft is expected to bring more than its cost.

    A first draft is all but free, since its logits are part of the mixture. For each further one the drafting lane
    must read the last, which it would otherwise do only if all were accepted. That is worth it while the tokens to
    be gained, at the price that a token has had so far, outweigh it (the marginal value theorem). How likely a draft
    is to be accepted is learnt, for sure and for unsure drafts separately.

    Nothing here reads a clock: the same seed gives the same drafts, and so the same samples.
    """

    PROBE_EVERY = 24  # steps without drafts after which one is tried again
    LEVELS = 8  # of confidence

    def __init__(self, speculate: Speculate, costs: Costs, n_batch: int) -> None:
        self.fixed = None if speculate == "auto" else int(speculate)
        self.costs, self.n_batch = costs, n_batch
        self.overall, self.by_lookup = Estimate(0.7), Estimate(0.6)
        self.by_confidence = [Estimate((level + 0.5) / self.LEVELS) for level in range(self.LEVELS)]
        self.earned = 10.0 * n_batch
        self.spent = 10 * costs.per_token(costs.best_drafts(0.7, n_batch), 0.7, n_batch)
        self.plain = costs.cycle(0, 0.0, n_batch)
        self.idle = 0

    def resize(self, n_batch: int) -> None:
        """Go on with fewer rows: what a token costs is theirs."""
        self.n_batch, self.plain = n_batch, self.costs.cycle(0, 0.0, n_batch)

    def chance(self, confidence: float) -> float:
        """How likely a draft of this confidence is to be accepted."""
        return self.by_confidence[self._level(confidence)].value

    def _level(self, confidence: float) -> int:
        return min(int(confidence * self.LEVELS), self.LEVELS - 1)

    def first(self, chances: Sequence[float]) -> bool:
        """Whether to draft at all, given each growing row's chance that its first draft is accepted."""
        if self.fixed is not None:
            return self.fixed > 0
        more = self.costs.verify(1, self.n_batch) - self.costs.verify(0, self.n_batch) + self.costs.moving(self.n_batch)
        more += self._some(chances) * self.costs.draft_step(self.n_batch)
        worth = self._price(len(chances)) * sum(chances) > more
        self.idle = 0 if worth or self.idle >= self.PROBE_EVERY else self.idle + 1
        return self.idle == 0

    def another(self, n_drafts: int, chances: Sequence[float]) -> bool:
        """Whether to draft one more, given each growing row's chance that all its drafts so far are accepted."""
        if self.fixed is not None:
            return n_drafts < self.fixed
        a = self.overall.value
        some = self._some(chances)
        more = self.costs.verify(n_drafts + 1, self.n_batch) - self.costs.verify(n_drafts, self.n_batch)
        more += (1 - some + some * a) * self.costs.draft_step(self.n_batch)
        return n_drafts < MAX_DRAFTS and self._price(len(chances)) * a * sum(chances) > more

    def _price(self, n_growing: int) -> float:
        """What a token has cost so far, or costs without drafts where that is less: bad drafts make none dear."""
        return min(self.spent / self.earned, self.plain / n_growing)

    @staticmethod
    def _some(chances: Sequence[float]) -> float:
        """The chance that at least one row accepts all."""
        none = 1.0
        for chance in chances:
            none *= 1 - chance
        return 1 - none

    def from_lookup(self, found: int) -> int:
        """How many of ``found`` looked-up tokens to use: 0 where the drafting lane promises more."""
        if self.fixed is not None or found == 0:
            return 0
        a = self.by_lookup.value
        price, n_drafts = min((self.costs.lookup_per_token(n, a, self.n_batch), n) for n in range(1, found + 1))
        return n_drafts if price < self._price(self.n_batch) * self.n_batch else 0

    def drafted(self, confidences: Sequence[Sequence[float]], n_accepted: Sequence[int], n_steps: int) -> None:
        """Learn from a cycle: of each growing row its drafts' confidences, and how many were accepted."""
        n_drafts = len(confidences[0]) if confidences else 0
        for row, n in zip(confidences, n_accepted):
            for at, confidence in enumerate(row[: n + 1]):
                self.by_confidence[self._level(confidence)].saw(at < n, 1)
            self.overall.saw(n, min(n + 1, n_drafts))
        cost = n_steps * self.costs.draft_step(self.n_batch) + self.costs.verify(n_drafts, self.n_batch)
        cost += self.costs.moving(self.n_batch) if n_drafts else 0.0
        self._account(cost + self.costs.overhead, sum(n_accepted) + len(n_accepted))

    def looked_up(self, n_drafts: int, n_accepted: Sequence[int]) -> None:
        """Learn from a cycle of looked-up drafts. They come and go with the text, so they do not set the price."""
        for n in n_accepted:
            self.by_lookup.saw(n, min(n + 1, n_drafts))

    def _account(self, cost: float, tokens: int) -> None:
        self.spent, self.earned = 0.97 * self.spent + cost, 0.97 * self.earned + tokens


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


# ---- one lane in mid-generation --------------------------------------------------------------------------------
class LaneRun:
    """A lane, its cache, and where its rows stand. Rows are the seats' blocks, n_rows = n_seats * n_batch."""

    def __init__(
        self,
        model: ProxyTunedForCausalLM,
        index: int,
        view: Cache,
        mask: Tensor | None,
        position: Tensor,
        room: int,
        rolls_back: bool,
    ) -> None:
        """
        Args:
            mask: (n_rows, n_read), 0 at padding; None where nothing is masked.
            position: (n_rows, 1), of the next token to read.
            room: how many more tokens can be read at all, before the text is full.
            rolls_back: whether tokens that were read will have to be forgotten.
        """
        self.rolls_back = rolls_back
        if rolls_back:
            view.activate_past_recording()
        self.lane = cast(Any, model.lanes[index])
        self.view = view
        self.n_seats = len(self.lane.seats)
        self.clamp = self.lane.config.vocab_size - 1 if self.lane.config.vocab_size < model.widest_vocab else None
        self.position = position.to(self.lane.device)
        # Drafts beyond the end of the text are thrown away, but they must be readable where positions are a table.
        self.last_position = self.position + max(room - 2, 0)
        self.steps = torch.arange(MAX_DRAFTS + 1, device=self.lane.device)
        self.n_read = 0 if mask is None else mask.shape[1]
        self.mask = None if mask is None else mask.to(self.lane.device)
        first = view.layers[0]
        # A static cache has a mask of one width, so that no shape changes from step to step.
        self.capacity = first.max_cache_len if isinstance(first, BufferLayer) else None
        self.pending = 0  # columns read since the last `keep`

    def read(self, ids: Tensor, hidden: bool = False) -> Tensor:
        """Read the next tokens, shape = (n_batch, k); the logits after each, (n_rows, k, n_vocab of the lane).

        ``hidden``: instead of the logits the hidden states that the lane's head makes them of.
        """
        k = ids.shape[1]
        ids = ids if self.clamp is None else ids.clamp(max=self.clamp)
        position = self.position + self.pending
        n_columns = self.n_read + self.pending + k
        width = self.capacity or n_columns
        if self.mask is not None and self.mask.shape[1] < width:  # what comes is never padding
            self.mask = torch.nn.functional.pad(self.mask, (0, max(GROWTH, width - self.mask.shape[1])), value=1)
        rows = (ids.repeat(self.n_seats, 1) if self.n_seats > 1 else ids).to(self.lane.device)
        inputs = {
            "attention_mask": None if self.mask is None else self.mask[:, :width],
            "position_ids": torch.minimum(position + self.steps[:k], self.last_position),
            "past_key_values": self.view,
            "use_cache": True,
        }
        self.pending += k
        return cast(Tensor, self.lane.hidden(rows, **inputs) if hidden else self.lane(rows, **inputs, logits_to_keep=0))

    def keep(self, kept: Sequence[int]) -> None:
        """Of what was read since the last call keep each batch row's first ``kept`` columns, and forget the rest."""
        longest = max(kept)
        unequal = min(kept) < longest
        if unequal:
            self._shift(torch.tensor([longest - k for k in kept], device=self.lane.device).repeat(self.n_seats))
        if self.rolls_back:
            self.view.crop(longest - self.pending)  # crop(0) still lets sliding windows forget what lies behind them
        self.n_read += longest
        self.pending = 0
        if unequal:
            self.position = self.position + torch.tensor(kept, device=self.lane.device).repeat(self.n_seats)[:, None]
            self._trim()
        else:
            self.position = self.position + longest

    def select(self, rows: Tensor, n_batch: int) -> None:
        """Go on with some ``rows`` of the ``n_batch`` alone."""
        at = torch.cat([rows.to(self.lane.device) + block * n_batch for block in range(self.n_seats)])
        self.view.batch_select_indices(at)
        self.position, self.last_position = self.position[at], self.last_position[at]
        if self.mask is not None:
            self.mask = self.mask[at]
            self._trim()

    def _shift(self, by: Tensor) -> None:
        """Move each row ``by`` columns to the right; what falls out at the right was rejected, the left is padding."""
        assert self.mask is not None
        for layer in cast(Sequence[Any], self.view.layers):
            n_heads, width, n_values = layer.keys.shape[1:]
            source = (torch.arange(width, device=by.device) - by[:, None]).clamp_(min=0)[:, None, :, None]
            source = source.to(layer.keys.device)  # a lane may be spread over devices
            keys = layer.keys.gather(2, source.expand(-1, n_heads, -1, n_values))
            values = layer.values.gather(2, source.expand(-1, n_heads, -1, layer.values.shape[-1]))
            if isinstance(layer, BufferLayer):
                layer.put(keys, values)
            else:
                layer.keys, layer.values = keys, values
        columns = torch.arange(self.n_read + self.pending, device=by.device)
        source = columns - by[:, None]
        moved = self.mask[:, : len(columns)].gather(1, source.clamp(min=0))
        self.mask[:, : len(columns)] = moved.masked_fill(source < 0, 0)

    def _trim(self) -> None:
        """Drop the columns at the left that have become padding in every row."""
        assert self.mask is not None
        if (surplus := int(self.mask.any(dim=0).long().argmax())) == 0:
            return
        self.mask = self.mask[:, surplus:]
        self.n_read -= surplus
        for layer in cast(Sequence[Any], self.view.layers):
            if isinstance(layer, BufferLayer):
                layer.drop_left(surplus)
                continue
            # A sliding window holds the last columns only, and counts the others.
            n_held = min(layer.keys.shape[2], self.n_read)
            layer.keys, layer.values = layer.keys[:, :, -n_held:], layer.values[:, :, -n_held:]
            if layer.is_sliding:
                layer.cumulative_length = self.n_read


# ---- what the drafts may be held against -------------------------------------------------------------------------
# Processors that look at one row's scores alone: all positions of all rows go through them in one call.
CONTEXT_FREE = tuple(
    getattr(generation, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
# Those, and processors and criteria that are functions of one row's text and scores: drafts may ask them about texts
# that are thrown away, and rows of unequal lengths can be given to them one by one. Anything else (a class of the
# user's, one with a state, one that counts rows) sees each token once and the whole batch, undrafted.
ROW_BY_ROW = CONTEXT_FREE + tuple(
    getattr(generation, name)
    for name in (
        "ExponentialDecayLengthPenalty",
        "ForcedEOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
    )
)


# Rotations of positions (rope_type) that depend on the position alone. Others ("dynamic", "longrope") depend on the
# longest position of the call as well, so that a token behind drafts is read differently from one read alone.
ROTATIONS = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


def unlike_in_pieces(lanes: Iterable[Any]) -> str | None:
    """Why some lane may read several tokens at once differently from one by one; None where all are known not to."""
    for lane in lanes:
        names = ", ".join(name for seat in lane.seats for name in seat.names)
        if not type(lane.model).__module__.startswith("transformers."):
            return f"{names} runs code that is not transformers' own ({type(lane.model).__name__})"
        if kinds := sorted(rotations(lane.model) - ROTATIONS):
            return f"{names} may rotate positions by the length of the text (rope_type {kinds[0]!r})"
    return None


def refuse_unequal_lengths(lane: Any) -> None:
    """Raise :class:`MemberError` where one pass reads prompts of several lengths with a rotation that depends on it."""
    if len({seat.prompt for seat in lane.seats}) == 1:
        return
    if kinds := sorted(rotations(lane.model) - ROTATIONS):
        names = " and ".join(name for seat in lane.seats for name in seat.names)
        raise MemberError(
            f"{names} are computed together and read prompts of their own, but how positions are rotated may depend "
            f"on the longest (rope_type {kinds[0]!r}); give them one prompt, or each a copy of the model"
        )


def rotations(model: Any) -> set[str]:
    """The rope types that a model's modules and config name."""
    found: set[str] = set()
    for source in (*model.modules(), model.config.get_text_config(decoder=True)):
        for name in ("rope_type", "rope_parameters", "rope_scaling"):
            found |= _rope_types(getattr(source, name, None))
    return found


def _rope_types(value: Any) -> set[str]:
    """Those in a rope type, in rope parameters, or in a mapping from kinds of layers to either."""
    if isinstance(value, str):
        return {value}
    if not isinstance(value, Mapping):
        return set()
    kind = value.get("rope_type", value.get("type"))
    if isinstance(kind, str):
        return {kind}
    return set().union(*(_rope_types(each) for each in value.values() if isinstance(each, (str, Mapping))))


def decode(
    model: ProxyTunedForCausalLM,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
    speculate: Speculate,
    noise: Noise | None = None,
) -> Any:
    """Greedy decoding or sampling, with drafts where they pay; what ``generate`` returns.

    Args:
        input_ids: the prompt, (n_batch, n_columns), left-padded.
        model_kwargs: what ``generate`` has prepared: the cache, mask, positions, alpha, own prompts.
        noise: where samples are to depend on each row's seed alone, see decoding.noise; otherwise they are
            drawn from torch's generator, and drafts are accepted by rejection sampling.
        The others are those of transformers' ``_sample``.

    Raises:
        ProxyTuneError: if a number of drafts was asked for that this call cannot have.
    """
    run = _Decoding(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, noise)
    outputs = cast(Any, model)._prefill(input_ids, generation_config, model_kwargs)
    run.start(outputs.past_key_values, model_kwargs, speculate)
    first = run.choose(outputs.logits[:, -1:])
    del outputs  # the prompt's logits are large
    run.emit(first[:, None].tolist())
    while not all(run.done):
        run.cycle()
    return run.finish()


class _Decoding:
    """One call of :func:`decode`: the text of each row so far, and the lanes that read it.

    Rows that are drafted for grow unequally, and finished ones leave. Where that cannot be (``aligned``), all
    rows grow by one token a step, and finished ones by padding, as in transformers' own loop.
    """

    def __init__(
        self,
        model: ProxyTunedForCausalLM,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        noise: Noise | None,
    ) -> None:
        self.model, self.config, self.streamer = model, generation_config, streamer
        self.processors, self.criteria = logits_processor, stopping_criteria
        self.context_free = all(type(each) in CONTEXT_FREE for each in logits_processor)
        self.noise = noise
        # By rejection, drafts are judged by what they were drawn from; in greedy decoding, and from given noise, by
        # what would stand in their place.
        self.rejecting = bool(generation_config.do_sample) and noise is None
        self.has_eos = any(hasattr(each, "eos_token_id") for each in stopping_criteria)
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.stats = _LAST_CALLS.of[model] = SpeculationStats()

        self.n_batch, self.n_prompt = input_ids.shape
        self.rows = list(range(self.n_batch))  # those that still grow, as the caller counts them
        self.texts: dict[int, Tensor] = {}  # of those that have ended
        self.length = [self.n_prompt] * self.n_batch
        self.done = [False] * self.n_batch
        self.ids = input_ids
        self._make_room()
        self.lookups = [Lookup(row) for row in input_ids.tolist()]
        wanted = generation_config.return_dict_in_generate
        self.kept_scores: list[Tensor] | None = [] if wanted and generation_config.output_scores else None
        self.kept_logits: list[Tensor] | None = [] if wanted and generation_config.output_logits else None
        self.weighed: list[tuple[Tensor, Tensor]] = []  # this cycle's logits and scores, where they are wanted

    def start(self, cache: Any, model_kwargs: dict[str, Any], speculate: Speculate) -> None:
        """Take over the caches, which have read the prompt."""
        self.cache = cache
        # On the device of the logits: a copy to it at each step would wait for all that the device has still to do.
        self.alpha = self.model.alpha_rows(model_kwargs.get("alpha"), self.n_batch).to(self.model.device)
        obstacle = self._obstacle()
        if obstacle is not None and speculate not in ("auto", False):
            raise ProxyTuneError(f"speculate={speculate} is not possible here, because {obstacle}; leave it out")
        hopeless = speculate == "auto" and self.model.costs.best_drafts(HOPED_FOR, self.n_batch) == 0
        if hopeless:
            speculate = False  # and the rows stay side by side
        self.drafting = self.model.drafting if obstacle is None else None
        self.pace = Pace(speculate if obstacle is None else False, self.model.costs, self.n_batch)
        self.aligned = self.n_batch == 1 or self.pace.fixed == 0

        room = self.criteria.max_length - self.n_prompt
        mask, position = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
        self.runs: list[LaneRun] = []
        rows: Tensor | None
        for at, (view, own) in enumerate(zip(cache.views, cache.prompts)):
            n_seats = len(cast(Any, self.model.lanes[at]).seats)
            if own is not None:
                shared = cache.n_columns - cache.prompt_length  # columns of a conversation that is carried on
                rows = torch.nn.functional.pad(own.mask, (0, shared), value=1)
                next_position = rows.sum(dim=1, keepdim=True)
            else:
                rows = None if mask is None else mask.repeat(n_seats, 1)
                next_position = position[:, -1:].expand(self.n_batch, -1).repeat(n_seats, 1) + 1
            if rows is None and not self.aligned:  # the rows will be moved apart
                rows = self.ids.new_ones(self.n_batch * n_seats, cache.n_columns)
            elif rows is not None and self.aligned and bool(rows.all()):
                rows = None  # nothing is padding, nor will be: a mask would only be looked at in every forward
            self.runs.append(LaneRun(self.model, at, view, rows, next_position, room, self.pace.fixed != 0))

    def _obstacle(self) -> str | None:
        """Why nothing can be drafted in this call, or None."""
        if self.model.drafting is None:
            return "no member with weights of its own can draft for the base"
        if not all(can_roll_back(view) for view in self.cache.views):
            return "a member's cache cannot forget rejected tokens"
        if self.model.unlike_in_pieces is not None:
            return self.model.unlike_in_pieces

        def unknown(each: Any) -> bool:
            return type(each) not in ROW_BY_ROW and not getattr(type(each), "row_by_row", False)

        for each in filter(unknown, self.processors):
            return (
                f"{type(each).__name__} is not known to depend on a row's text and scores alone, and drafts call it "
                "more than once a token (a class that does says so with `row_by_row = True`)"
            )
        if self.n_batch == 1:
            return None
        for each in filter(unknown, self.criteria):
            return f"{type(each).__name__} must see the rows of a batch side by side"
        if self.streamer is not None:
            return "a streamer takes the rows of a batch side by side"
        if self.config.return_dict_in_generate or self.cache._is_user_defined:
            return "the scores and the cache of a batch are returned row beside row"
        if not self.has_eos and len(self.criteria) > 1:
            return "without an end token the rows of a batch stop together"
        return None

    # -- the loop's body ------------------------------------------------------------------------------------------
    def cycle(self) -> None:
        """Draft, verify, accept, and take back what was rejected."""
        self._make_room()
        growing = [row for row, done in enumerate(self.done) if self.aligned or not done]
        room = self.criteria.max_length - min(self.length[row] for row in growing) - 1
        last = self._newest()
        draft = self._draft(last, growing, room)
        n_drafts = draft.tokens.shape[1]

        # Every lane but the one that drafted reads all drafts in one pass.
        drafting_lane = None if draft.logits is None or self.drafting is None else self.drafting.lane
        read = torch.cat([last, draft.tokens], dim=1)
        lanes = [
            cast(Tensor, draft.logits) if lane == drafting_lane else run.read(read)
            for lane, run in enumerate(self.runs)
        ]
        n_accepted, tokens = self._judge([each[:, :n_drafts] for each in lanes], draft)
        complete = n_accepted == n_drafts
        n_steps = 0 if draft.logits is None else draft.logits.shape[1]
        if bool(complete.any()):
            # The position behind the last draft is of use only here, so the drafting lane has not read it yet.
            if drafting_lane is not None and n_steps == n_drafts:
                lanes[drafting_lane] = self.runs[drafting_lane].read(draft.tokens[:, -1:])
                n_steps += 1
            behind = self.choose(self.model.mix_lanes([each[:, -1:] for each in lanes], self.alpha), offset=n_drafts)
            tokens = torch.where(complete, behind, tokens)

        counts = n_accepted.tolist()
        self._learn(draft, [counts[row] for row in growing], n_steps)
        rows = torch.cat([draft.tokens, tokens[:, None]], dim=1).tolist()
        kept = self.emit([[*row[:n], row[-1]] for row, n in zip(rows, counts)])
        for run in self.runs:
            run.keep(kept)
        if not self.aligned:
            self._let_go()

    def _let_go(self) -> None:
        """Take rows that have ended out of the forward passes.

        Static caches keep them, so that no shape changes under a compiled model: they stand still, and what they read
        is forgotten.
        """
        left = [row for row, done in enumerate(self.done) if not done]
        if len(left) in (0, self.n_batch) or any(run.capacity is not None for run in self.runs):
            return
        self._take_down(row for row, done in enumerate(self.done) if done)
        at = torch.tensor(left, device=self.ids.device)
        self.ids, self.alpha = self.ids[at], self.alpha[at.to(self.alpha.device)]
        for name in ("rows", "length", "done", "lookups"):
            setattr(self, name, [getattr(self, name)[row] for row in left])
        if self.noise is not None:
            self.noise.select(left)
        for run in self.runs:
            run.select(at, self.n_batch)
        self.n_batch = len(left)
        self.pace.resize(self.n_batch)

    def _take_down(self, rows: Iterable[int]) -> None:
        """Remember the text of rows that have ended."""
        for row in rows:
            self.texts[self.rows[row]] = self.ids[row, : self.length[row]]

    def _draft(self, last: Tensor, growing: Sequence[int], room: int) -> Draft:
        """At most ``room`` drafts behind the newest tokens ``last``, (n_batch, 1)."""
        none = last[:, :0]
        if self.drafting is None or self.pace.fixed == 0 or room <= 0:
            return Draft(none)
        if (copied := self._look_up(growing, room)) is not None:
            self._write(copied)
            return Draft(copied, looked_up=True)

        run = self.runs[self.drafting.lane]
        # A quick head chooses the drafts; the lane's own head then reads all of their hidden states at once.
        quick = run.lane.quick_head if self.n_batch <= QUICK_ROWS else None
        logits_of = run.lane.head if quick is not None else lambda logits: logits
        draft = Draft(none, confidences=[[] for _ in growing])
        outputs, distributions, chances = [], [], [1.0] * len(growing)
        newest = last
        while True:
            outputs.append(run.read(newest, hidden=quick is not None))
            n_drafts = draft.tokens.shape[1]
            scores = self.process(self._guess(outputs[-1], quick), offset=n_drafts)
            q = scores.softmax(dim=-1) if self.rejecting or self.pace.fixed is None else scores
            if self.pace.fixed is None:
                sure = q[:, 0].amax(dim=-1).tolist()
                for at, row in enumerate(growing):
                    draft.confidences[at].append(sure[row])
                    chances[at] *= self.pace.chance(sure[row])
                if n_drafts == 0 and not self.pace.first(chances):
                    return Draft(none, logits=logits_of(outputs[0]))
            newest = self._draw(scores, offset=n_drafts)[:, None]
            draft.tokens = torch.cat([draft.tokens, newest], dim=1)
            if self.rejecting:
                distributions.append(q)
            self._write(draft.tokens)
            if n_drafts + 1 == room or not self.pace.another(n_drafts + 1, chances):
                break
        draft.logits = logits_of(torch.cat(outputs, dim=1))
        if self.rejecting:
            draft.q = torch.cat(distributions, dim=1)
        return draft

    def _guess(self, output: Tensor, quick: Any) -> Tensor:
        """The drafting lane's guess at the mixture, (n_batch, 1, n_vocab of the base); see `choose_drafting`.

        ``output`` are its logits, or hidden states that ``quick`` is a head for: a head is linear, so that these are
        mixed in the same way.
        """
        assert self.drafting is not None
        blocks = output.split(self.n_batch)

        def block(at: int | None) -> Tensor | None:
            return None if at is None else blocks[at]

        shifts = self.drafting.shifts
        mixed = mix(
            blocks[self.drafting.stand_in],
            [(block(expert), block(anti)) for _, expert, anti in shifts],
            self.alpha[:, [column for column, _, _ in shifts]],
        )
        scores = (mixed if quick is None else quick(mixed)).to(self.ids.device)[..., : self.model.shared_vocab]
        missing = cast(int, self.model.config.vocab_size) - scores.shape[-1]
        return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores

    def _look_up(self, growing: Sequence[int], room: int) -> Tensor | None:
        """Drafts copied from each row's text, of one length, or None where some row has none or they do not pay."""
        if self.pace.fixed is not None:
            return None
        found = {row: self.lookups[row].find(min(room, MAX_DRAFTS)) for row in growing}
        n_drafts = self.pace.from_lookup(min(map(len, found.values())))
        if n_drafts == 0:
            return None
        ended = [self.pad] * n_drafts
        rows = [found.get(row, ended)[:n_drafts] for row in range(self.n_batch)]
        return torch.tensor(rows, device=self.ids.device)

    def _judge(self, lanes: Sequence[Tensor], draft: Draft) -> tuple[Tensor, Tensor]:
        """How many drafts each row accepts, and what stands in place of the first rejected; both (n_batch,)."""
        if draft.tokens.shape[1] == 0:
            none = draft.tokens.new_zeros(self.n_batch)
            return none, none
        scores = self._weigh(self.model.mix_lanes(lanes, self.alpha), offset=0)
        if self.rejecting:
            return accept_sampled(draft.tokens, scores.softmax(dim=-1), draft.q)
        return accept_greedy(draft.tokens, scores if self.noise is None else self._race(scores, offset=0))

    def choose(self, mixed: Tensor, offset: int = 0) -> Tensor:
        """One token from the mixture at one position, (n_batch, 1, n_vocab) -> (n_batch,)."""
        return self._draw(self._weigh(mixed, offset), offset)

    def _draw(self, scores: Tensor, offset: int) -> Tensor:
        """One token of each row from its scores at one position, (n_batch, 1, n_vocab) -> (n_batch,)."""
        if self.rejecting:
            return torch.multinomial(scores[:, 0].softmax(dim=-1), num_samples=1).squeeze(1)
        return (scores if self.noise is None else self._race(scores, offset))[:, 0].argmax(dim=-1)

    def _race(self, scores: Tensor, offset: int) -> Tensor:
        """Scores whose argmax is the draw; each row's first position lies ``offset`` behind its text."""
        assert self.noise is not None
        return self.noise.race(scores.softmax(dim=-1), [length - self.n_prompt + offset for length in self.length])

    def _weigh(self, mixed: Tensor, offset: int) -> Tensor:
        """The mixture after all processors, remembered where the caller of ``generate`` wants to see it."""
        if self.kept_logits is None and self.kept_scores is None:
            return self.process(mixed, offset)
        self.weighed.append((mixed, self.process(mixed.clone(), offset)))
        return self.weighed[-1][1]

    def process(self, scores: Tensor, offset: int) -> Tensor:
        """Put scores, (n_batch, k, n_vocab), through the logits processors.

        Position j of a row follows its text and ``offset + j`` drafts, which have been written behind the text.
        """
        if not self.processors:
            return scores
        if self.context_free:
            return self.processors(self.ids[:, :1].repeat(scores.shape[1], 1), scores.flatten(0, 1)).view_as(scores)  # type: ignore[no-any-return]
        result = scores.clone()
        for j in range(scores.shape[1]):
            for rows, length in self._by_length():
                result[rows, j] = self.processors(self.ids[rows, : length + offset + j], scores[rows, j])
        return result

    # -- the text -------------------------------------------------------------------------------------------------
    def _make_room(self) -> None:
        """Let the buffer of the text hold another cycle, and the drafts that stand in it before they are judged."""
        if self.ids.shape[1] < max(self.length) + MAX_DRAFTS + 1:
            self.ids = torch.nn.functional.pad(self.ids, (0, GROWTH), value=self.pad)

    def emit(self, proposed: Sequence[Sequence[int]]) -> list[int]:
        """Append tokens to each row until one of them ends it; how many each row took."""
        taken = [0] * self.n_batch
        for j in range(max(map(len, proposed))):
            if all(self.done):
                break
            growing = [
                row for row in range(self.n_batch) if j < len(proposed[row]) and (self.aligned or not self.done[row])
            ]
            for row in growing:
                token = self.pad if self.done[row] and self.has_eos else proposed[row][j]
                self.ids[row, self.length[row]] = token
                self.lookups[row].tokens.append(token)
                self.length[row] += 1
                taken[row] += 1
                self.stats.emitted += not self.done[row]
            for rows, length in self._by_length(growing):
                stops = self.criteria(self.ids[rows, :length], cast(Any, self._scores_so_far(j + 1)))
                for row, stop in zip(range(self.n_batch) if isinstance(rows, slice) else rows, stops.tolist()):
                    self.done[row] = self.done[row] or stop
            if self.streamer is not None:
                self.streamer.put(self.ids[:, self.length[0] - 1].cpu())
        if self.weighed:
            self._keep_weighed(taken[0])
        return taken

    def _scores_so_far(self, n_tokens: int) -> tuple[Tensor, ...] | None:
        """What ``generate`` hands to stopping criteria: where scores are kept, those of each new token."""
        if self.kept_scores is None:
            return None
        newest = torch.cat([scores for _, scores in self.weighed], dim=1)[:, :n_tokens]
        return (*self.kept_scores, *newest.unbind(dim=1))

    def _by_length(self, rows: Sequence[int] | None = None) -> list[tuple[Any, int]]:
        """Rows, all by default, grouped by the length of their text: (index into the batch, length)."""
        if self.aligned:
            return [(slice(None), self.length[0])]
        groups: dict[int, list[int]] = {}
        for row in range(self.n_batch) if rows is None else rows:
            groups.setdefault(self.length[row], []).append(row)
        return [(group, length) for length, group in groups.items()]

    def _newest(self) -> Tensor:
        """The last token of each row, which no lane has read, (n_batch, 1)."""
        if self.aligned:
            return self.ids[:, self.length[0] - 1 : self.length[0]]
        return self.ids.gather(1, torch.tensor(self.length, device=self.ids.device)[:, None] - 1)

    def _write(self, drafts: Tensor) -> None:
        """Write drafts behind the text, where processors will look for them."""
        if self.context_free:
            return
        for row, length in enumerate(self.length):
            self.ids[row, length : length + drafts.shape[1]] = drafts[row]

    def _learn(self, draft: Draft, n_accepted: Sequence[int], n_steps: int) -> None:
        """Count what was accepted of the rows that grow, and let the pace learn from it."""
        n_drafts = draft.tokens.shape[1]
        accepted, drafted = sum(n_accepted), n_drafts * len(n_accepted)
        self.stats.cycles += 1
        self.stats.judged += sum(min(n + 1, n_drafts) for n in n_accepted)
        if draft.looked_up:
            self.stats.looked_up += drafted
            self.stats.lookup_cycles += 1
            self.stats.lookups_accepted += accepted
            self.pace.looked_up(n_drafts, n_accepted)
        else:
            self.stats.drafted += drafted
            self.stats.accepted += accepted
            self.pace.drafted(draft.confidences, n_accepted, n_steps)

    def _keep_weighed(self, n_tokens: int) -> None:
        """Of what was weighed in this cycle, keep the positions that became text."""
        logits, scores = (torch.cat(parts, dim=1)[:, :n_tokens].unbind(dim=1) for parts in zip(*self.weighed))
        if self.kept_logits is not None:
            self.kept_logits += logits
        if self.kept_scores is not None:
            self.kept_scores += scores
        self.weighed = []

    # -- what generate returns ------------------------------------------------------------------------------------
    def finish(self) -> Any:
        """The rows side by side, padded on the right, with what else was asked for."""
        if self.streamer is not None:
            self.streamer.end()
        for view in self.cache.views:
            for layer in view.layers:
                if type(layer) is DynamicSlidingWindowLayer:
                    layer.record_past = False
        self.cache.n_columns += self.length[0] - self.n_prompt - 1  # the newest token is read by the next call
        self._take_down(range(self.n_batch))
        texts = [self.texts[row] for row in sorted(self.texts)]
        sequences = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, sequences),
            scores=None if self.kept_scores is None else cast(Any, tuple(self.kept_scores)),
            logits=None if self.kept_logits is None else cast(Any, tuple(self.kept_logits)),
            past_key_values=self.cache,
        )
