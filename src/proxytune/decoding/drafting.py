"""Where drafts come from: the text so far, or a lane whose guess replaces the mixture.

M+ must read every token anyway, and it resembles the mixture. So it runs ahead (2310.12962, section 4.2; 2211.17192):
it drafts γ tokens and keeps its scores, and M reads all of them in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from proxytune.decoding.cost import MAX_DRAFTS, QUICK_ROWS, Cost, Costs
from proxytune.decoding.lane import Lane, LaneState, QuickLane, QuickState, Scores
from proxytune.decoding.mixing import mix
from proxytune.decoding.pace import Pace
from proxytune.decoding.sampling import Sampler
from proxytune.decoding.text import Text

__all__ = ["Draft", "Drafter", "Drafting", "choose_drafting", "costs_by_role", "guess"]


@dataclass
class Draft:
    """The drafts of one step.

    Attributes:
        tokens: shape = (n_batch, γ).
        source: where they come from; None if there are none.
        q: the distributions that they were drawn from, (n_batch, γ, n_vocab), for rejection sampling; otherwise, and
            for copied drafts, None.
        scores: the drafting lane's scores at the ``n_read`` positions that it has read: γ, or 1 if it read the newest
            token and drafted nothing. None if it has read nothing.
        confidences: for each growing row, the largest probability in q at each draft. It is not the probability of the
            draft itself: a decision about drafting that looks at a draw and may discard it would bias the samples.
    """

    tokens: Tensor
    source: Literal["lane", "lookup"] | None = None
    q: Tensor | None = None
    scores: Scores | None = None
    n_read: int = 0
    confidences: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Drafting:
    """The lane that drafts, and how its members' logits give a guess of the mixture.

    Attributes:
        lane: its number.
        stand_in: the block of rows that is used in place of the base.
        shifts: for each expert whose sides are all in the lane: its column of alpha, and the blocks of its sides.
    """

    lane: int
    stand_in: int
    shifts: tuple[tuple[int, int | None, int | None], ...]


def choose_drafting(
    read_bytes: Sequence[int], seats: Mapping[str, tuple[int, int]], experts: Sequence[str]
) -> Drafting | None:
    """The cheapest lane besides the base's, of equals the one with more members; None if there is none.

    If M- is in the lane, it is used in place of M: the guess is M- + alpha (M+ - M-), which is M+ at alpha 1 and M- at
    alpha 0. This also works for several experts on one M-. Otherwise the guess is the expert itself.

    Args:
        read_bytes: for each lane, the bytes of weights that a forward reads.
        seats: member name -> (lane, block of rows in it).
        experts: their names, in the recipe's order.
    """
    rivals = []
    for at, n_bytes in enumerate(read_bytes):
        if at == seats["base"][0]:
            continue
        block = {name: seat for name, (where, seat) in seats.items() if where == at}
        antis = [name for name in block if name.endswith(".anti_expert")]
        towards = [name for name in block if not name.endswith(".anti_expert")]
        shifts = []
        for column, expert in enumerate(experts):
            sides = (f"{expert}.expert", f"{expert}.anti_expert")
            if all(side in block for side in sides if side in seats):
                shifts.append((column, block.get(sides[0]), block.get(sides[1])))
        chosen = Drafting(at, block[antis[0]], tuple(shifts)) if antis else Drafting(at, block[towards[0]], ())
        rivals.append(((n_bytes, -len(block), not towards), chosen))
    return min(rivals, key=lambda rival: rival[0])[1] if rivals else None


def costs_by_role(
    base: int, drafting: Drafting | None, lane_costs: Sequence[Cost], n_seats: Sequence[int], head: Cost | None = None
) -> Costs:
    """The lanes' costs in their roles.

    Args:
        base: the lane that holds the base.
        lane_costs, n_seats: one per lane; for the drafting lane the cost with its quick head, if it has one.
        head: the cost of that lane's own head, which then reads all drafts once per step.
    """
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


def guess(drafting: Drafting, blocks: Sequence[Tensor], alpha: Tensor) -> Tensor:
    """The drafting lane's guess of the mixture, (n_batch, n_positions, n_vocab of the lane).

    Args:
        blocks: the lane's logits by block of rows, (n_batch, n_positions, n_vocab of the lane) each.
        alpha: shape = (n_batch or 1, n_experts).
    """

    def block(at: int | None) -> Tensor | None:
        return None if at is None else blocks[at]

    sides = [(block(expert), block(anti_expert)) for _, expert, anti_expert in drafting.shifts]
    return mix(blocks[drafting.stand_in], sides, alpha[:, [column for column, _, _ in drafting.shifts]])


class Drafter:
    """Proposes the drafts of each step of one call."""

    def __init__(
        self,
        drafting: Drafting | None,
        lanes: Sequence[Lane],
        states: Sequence[LaneState],
        text: Text,
        sampler: Sampler,
        pace: Pace,
        *,
        n_vocab: int,
        n_shared: int,
    ) -> None:
        """
        Args:
            drafting: the lane that drafts, or None. lanes, states: all those of the call.
            sampler: draws the drafts, in the same way as tokens. pace: decides how many.
            n_vocab: of the base. n_shared: ids below it are in every member's vocabulary.
        """
        self.drafting, self.text, self.sampler, self.pace = drafting, text, sampler, pace
        self.n_vocab, self.n_shared = n_vocab, n_shared
        self.lane = 0 if drafting is None else drafting.lane
        self.runtime, self.state = lanes[self.lane], states[self.lane]

    def propose(self, newest: Tensor, alpha: Tensor, *, from_lane: bool = True) -> Draft:
        """Drafts after the newest tokens, (n_batch, 1): as many as are expected to pay, and as fit the text.

        Without ``from_lane`` they are only copied.
        """
        none = Draft(newest[:, :0])
        if self.pace.fixed == 0 or (room := self.text.room) <= 0:
            return none
        growing = self.text.growing
        if (copied := self._look_up(growing, room)) is not None:
            self._write(copied)
            return Draft(copied, "lookup")
        if self.drafting is None or not from_lane:
            return none

        # A quick head chooses the drafts; the lane's own head then reads all of their hidden states at once.
        quick = self.runtime.quick_head if self.text.n_batch <= QUICK_ROWS else None
        draft = Draft(none.tokens, confidences=[[] for _ in growing])
        outputs, distributions, chances = [], [], [1.0] * len(growing)
        while True:
            outputs.append(
                self.state.read(newest).values if quick is None else cast(QuickState, self.state).read_hidden(newest)
            )
            n_drafts = draft.tokens.shape[1]
            scores = self.sampler.process(self._guess(outputs[-1], quick, alpha), offset=n_drafts)
            q = scores.softmax(dim=-1) if self.sampler.rejecting or self.pace.fixed is None else scores
            if self.pace.fixed is None:
                sure = q[:, 0].amax(dim=-1).tolist()
                for at, row in enumerate(growing):
                    draft.confidences[at].append(sure[row])
                    chances[at] *= self.pace.chance(sure[row])
                if n_drafts == 0 and not self.pace.first(chances):
                    break
            newest = self.sampler.draw(scores, offset=n_drafts)[:, None]
            draft.tokens = torch.cat([draft.tokens, newest], dim=1)
            if self.sampler.rejecting:
                distributions.append(q)
            self._write(draft.tokens)
            if n_drafts + 1 == room or not self.pace.another(n_drafts + 1, chances):
                break
        read = torch.cat(outputs, dim=1)
        draft.scores = Scores(read if quick is None else cast(QuickLane, self.runtime).head(read))
        draft.n_read = len(outputs)
        if draft.tokens.shape[1] == 0:
            draft.confidences = []  # a draft that was never made teaches nothing
            return draft
        draft.source = "lane"
        if self.sampler.rejecting:
            draft.q = torch.cat(distributions, dim=1)
        return draft

    def likeliest(self, scores: Scores, alpha: Tensor) -> Tensor:
        """The drafting lane's guess of each row's next token, (n_batch, 1), from its scores at one position."""
        return self._guess(scores.values, None, alpha).argmax(dim=-1)

    def _guess(self, output: Tensor, quick: Callable[[Tensor], Tensor] | None, alpha: Tensor) -> Tensor:
        """The drafting lane's guess at the mixture, (n_batch, 1, n_vocab of the base); see :func:`choose_drafting`.

        ``output`` holds its logits, or the hidden states for the head ``quick``. A head is linear, so hidden states are
        mixed in the same way.
        """
        assert self.drafting is not None
        mixed = guess(self.drafting, output.split(self.text.n_batch), alpha)
        scores = (mixed if quick is None else quick(mixed)).to(self.text.ids.device)[..., : self.n_shared]
        missing = self.n_vocab - scores.shape[-1]
        return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores

    def _look_up(self, growing: Sequence[int], room: int) -> Tensor | None:
        """Drafts copied from each row's text, all of one length; None if some row has none, or if they do not pay."""
        if self.pace.fixed is not None:
            return None
        found = {row: self.text.lookups[row].find(min(room, MAX_DRAFTS)) for row in growing}
        n_drafts = self.pace.from_lookup(min(map(len, found.values())))
        if n_drafts == 0:
            return None
        ended = [self.text.pad] * n_drafts
        rows = [found.get(row, ended)[:n_drafts] for row in range(self.text.n_batch)]
        return torch.tensor(rows, device=self.text.ids.device)

    def _write(self, drafts: Tensor) -> None:
        if not self.sampler.context_free:
            self.text.write_drafts(drafts)
