"""The decoding loop: propose, read, mix, accept, keep, yield.

Exact speculation is part of it, and no drafts is its simplest case. Drafts are verified against the *mixture*
(2211.17192), so that greedy output has the same tokens, and sampled output the same distribution, as without drafts.

Rows of a batch accept different numbers of drafts. Rejected drafts are dropped from the states, and rows are moved to
the right, so that the batch stays left-padded with its newest tokens in one column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from proxytune.decoding.drafting import Draft, Drafter
from proxytune.decoding.gating import Gating, Later
from proxytune.decoding.lane import LaneState, Scores
from proxytune.decoding.sampling import Sampler
from proxytune.decoding.text import Text
from proxytune.decoding.trace import TokenTrace, Tracer

__all__ = ["Step", "decode"]

Mix = Callable[[Sequence[Scores | None], Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Step:
    """The result of one pass of the base.

    Attributes:
        tokens: the tokens appended to each row of the batch. rows: the caller's numbers of these rows.
        n_written: how many tokens went to rows that had not ended.
        n_drafts: drafts per row. source: where they came from; None if there were none.
        n_accepted: for each growing row, how many of its drafts were accepted.
        logits, scores: the mixture before and after the processors, at the positions of the tokens, (n_batch, n_tokens,
            n_vocab), if they are kept.
        of_prompt: whether it is the first step, which uses the prompt's logits.
        trace: for each row, why each of its tokens was chosen, if the call is traced; empty for rows that had ended.
    """

    tokens: list[list[int]]
    rows: list[int]
    n_written: int
    n_drafts: int = 0
    source: Literal["lane", "lookup"] | None = None
    n_accepted: Sequence[int] = ()
    logits: Tensor | None = None
    scores: Tensor | None = None
    of_prompt: bool = False
    trace: list[list[TokenTrace]] | None = None


def decode(
    prompt: Tensor,
    states: Sequence[LaneState | Later],
    base: int,
    mix: Mix,
    alpha: Tensor,
    text: Text,
    sampler: Sampler,
    drafter: Drafter,
    leave: bool,
    gating: Gating | None = None,
    tracer: Tracer | None = None,
) -> Iterator[Step]:
    """Write tokens after a prompt that all lanes have read, until every row has ended.

    Args:
        prompt: the mixture's logits after the prompt, (n_batch, 1, n_vocab).
        states: one per lane; ``base`` is the number of the base's. If the gate waits, the others are :class:`Later`.
        mix: computes the mixture, (n_batch, n_positions, n_vocab), float32, from all lanes' scores, alpha, and how far
            the gate is open, if that is known. Lanes that have not read, because it is closed, have None.
        alpha: shape = (n_batch, n_experts).
        leave: whether rows that have ended leave the states.
        gating: the gate, if there is one.
        tracer: records why each token was chosen; it already has the prompt's logits.
    """

    def mixture(scores: Sequence[Scores | None], opened: Tensor | None) -> Tensor:
        mixed = mix(scores, alpha, opened)
        if tracer is not None:
            tracer.see(cast("Sequence[Scores]", scores), mixed, opened)  # a traced call skips no lane
        return mixed

    def write(chosen: Tensor, counts: Sequence[int], draft: Draft, n_accepted: Sequence[int] = ()) -> Step:
        """Append the chosen tokens, (n_batch, γ + 1): for each row ``counts`` drafts and one token, unless the row ends
        before."""
        rows, ended, n_drafts = list(text.rows), list(text.done), draft.tokens.shape[1]
        tokens, n_written = text.append(chosen, [n + 1 for n in counts], sampler.scores_so_far)
        logits, scores = sampler.settle(len(tokens[0])) or (None, None)
        trace = None
        if tracer is not None:
            new = [[] if was_done else taken for taken, was_done in zip(tokens, ended)]  # behind an end is padding
            trace = tracer.settle(new, counts, n_drafts, draft.source, alpha)
        return Step(tokens, rows, n_written, n_drafts, draft.source, n_accepted, logits, scores, trace=trace)

    first = sampler.choose(prompt)[:, None]
    del prompt  # it is large
    yield replace(write(first, [0] * text.n_batch, Draft(first[:, :0])), of_prompt=True)

    while not text.finished:
        text.make_room()
        growing, newest = text.growing, text.newest()
        # An expert that need not read the newest token does not draft either.
        opened = None if gating is None else gating.before(newest[:, :0])
        draft = drafter.propose(newest, alpha, from_lane=gating is None or not gating.closed(opened))
        n_drafts = draft.tokens.shape[1]

        # Every lane but the one that drafted reads all drafts in one pass, the base first: where the gate is then
        # closed, the others read them later.
        drafted_by = drafter.lane if draft.scores is not None else None
        columns = torch.cat([newest, draft.tokens], dim=1)
        scores: list[Scores | None] = [None] * len(states)
        scores[base] = of_base = states[base].read(columns)
        if gating is not None and (opened is None or n_drafts > 0):
            opened = gating.before(draft.tokens) if gating.gate.scheduled else gating.after_base(of_base)
        closed = gating is not None and gating.closed(opened)
        for lane, state in enumerate(states):
            if lane == drafted_by:
                scores[lane] = draft.scores
            elif closed and lane != base:
                cast(Later, state).skip(columns)
            elif lane != base:
                scores[lane] = state.read(columns)
        if n_drafts == 0:
            chosen = sampler.choose(mixture(scores, opened))[:, None]
            counts = [0] * text.n_batch
        else:
            judged = mixture(
                [s and s.part(0, n_drafts) for s in scores], None if opened is None else opened[:, :n_drafts]
            )
            accepted, tokens = sampler.accept(draft.tokens, draft.q, judged)
            counts = accepted.tolist()
            if drafted_by is not None and closed:
                cast(Later, states[drafted_by]).skip(draft.tokens[:, -1:])
            if max(counts) == n_drafts:
                # The position after the last draft is of use only here: the drafting lane has not read it yet.
                if drafted_by is not None and not closed:
                    scores[drafted_by] = states[drafted_by].read(draft.tokens[:, -1:])
                    draft.n_read += 1
                behind = mixture([s and s.part(-1, None) for s in scores], None if opened is None else opened[:, -1:])
                tokens = torch.where(accepted == n_drafts, sampler.choose(behind, offset=n_drafts), tokens)
            chosen = torch.cat([draft.tokens, tokens[:, None]], dim=1).scatter(1, accepted[:, None], tokens[:, None])
        n_accepted = [counts[row] for row in growing]
        step = write(chosen, counts, draft, n_accepted)
        drafter.pace.learn(draft, n_accepted)
        kept = [len(row) for row in step.tokens]
        for state in states:
            state.keep(kept)
        yield step

        if leave and (left := text.let_go()) is not None:
            alpha = alpha[left.to(alpha.device)]
            sampler.select(left)
            for state in states:
                state.select(left)
            drafter.pace.resize(text.n_batch)
