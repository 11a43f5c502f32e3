"""The loop over lanes with known logits, compared with a reader that computes each token by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from proxytune import generation_mixin
from proxytune.decoding.cost import Cost, Costs
from proxytune.decoding.drafting import Drafter, choose_drafting
from proxytune.decoding.loop import decode
from proxytune.decoding.mixing import mix
from proxytune.decoding.pace import Pace
from proxytune.decoding.sampling import Sampler
from proxytune.decoding.text import Text
from proxytune.lanes.fake import FakeLane, hashed_logits
from support import tiny
from support.oracle import Oracle
from support.syncs import counted_syncs

N_VOCAB, N_NEW, END = 30, 12, 12
ROWS = [[3, 4, 5, 6], [8, 9, 8, 9], [20, 21, 22, 23]]


def near(seed):
    """Logits that resemble those of another seed, so that drafts are accepted now and then."""
    ours, theirs = hashed_logits(N_VOCAB, 1), hashed_logits(N_VOCAB, seed)
    return lambda text: ours(text) + 0.3 * theirs(text)


BASE, EXPERT, ANTI = hashed_logits(N_VOCAB, 1), near(2), near(3)


def by_hand(row, alpha, n_new=N_NEW):
    text = list(row)
    while len(text) < len(row) + n_new and (len(text) == len(row) or text[-1] != END):
        text.append(int((BASE(text) + alpha * (EXPERT(text) - ANTI(text))).argmax()))
    return text[len(row) :]


def run(rows, alphas, speculate, lanes=None):
    """The steps of a call, and the lanes."""
    seats = {"base": (0, 0), "e.expert": (1, 0), "e.anti_expert": (1, 1)}
    if lanes is None:
        lanes = [
            FakeLane([BASE], [("base",)], N_VOCAB),
            FakeLane([EXPERT, ANTI], [("e.expert",), ("e.anti_expert",)], N_VOCAB),
        ]
    prompt = torch.tensor(rows)
    alpha = torch.tensor(alphas)[:, None]
    states = [lane.open(len(rows)) for lane in lanes]

    def mixture(scores, weights, opened=None):
        base, (expert, anti) = scores[0].values, scores[1].values.chunk(2)
        return mix(base, [(expert, anti)], weights)

    first = mixture([state.read(prompt, positions=1) for state in states], alpha)
    for state in states:
        state.keep()
    criteria = StoppingCriteriaList(
        [MaxLengthCriteria(prompt.shape[1] + N_NEW), EosTokenCriteria(eos_token_id=END)],
    )
    text = Text(prompt, criteria, pad=0, has_eos=True, aligned=len(rows) == 1 or not speculate, pure=True)
    sampler = Sampler(text, [], sample=False, noise=None, context_free=True, remember=False, show_scores=False)
    costs = Costs(Cost(100, 1), Cost(5, 0.1), 2)
    drafting = choose_drafting([100, 5], seats, ["e"])
    drafter = Drafter(
        drafting, lanes, states, text, sampler, Pace(speculate, costs, len(rows)), n_vocab=N_VOCAB, n_shared=N_VOCAB
    )
    steps = list(decode(first, states, 0, mixture, alpha, text, sampler, drafter, leave=True))
    return steps, lanes


@pytest.mark.parametrize("speculate", [False, 1, 3, 12, "auto"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["alone", "batch"])
def test_the_steps_are_the_text(rows, speculate):
    alphas = [1.0, 0.0, 2.0][: len(rows)]
    steps, _ = run(rows, alphas, speculate)
    for row, (prompt, alpha) in enumerate(zip(rows, alphas)):
        written = [token for step in steps if row in step.rows for token in step.tokens[step.rows.index(row)]]
        expected = by_hand(prompt, alpha)
        assert written[: len(expected)] == expected
        assert set(written[len(expected) :]) <= {0}, "a row that has ended is padded"
    assert steps[0].of_prompt
    assert sum(step.n_written for step in steps) == sum(len(by_hand(*each)) for each in zip(rows, alphas))


def test_steps_say_what_was_drafted():
    steps, _ = run(ROWS[:1], [1.0], 3)
    assert {step.source for step in steps} == {None, "lane"}
    for step in steps[1:]:
        assert 0 <= step.n_accepted[0] <= step.n_drafts <= 3
        assert len(step.tokens[0]) <= step.n_accepted[0] + 1
    assert sum(step.n_accepted[0] for step in steps[1:]) > 0


def test_rows_that_have_ended_are_read_no_more():
    lengths = [len(by_hand(row, 1.0)) for row in ROWS]
    assert min(lengths) < max(lengths) == N_NEW, "some end early, and others go on"
    steps, (base, _) = run(ROWS, [1.0] * 3, 2)
    assert len(steps[-1].rows) < len(ROWS)
    computed = len(ROWS)  # texts of the prompt that were scored
    for step in steps[1:]:
        computed += len(step.rows) * (step.n_drafts + 1)
    assert base.n_computed == computed


# -- what waits for the device ------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [[[1, 20, 30, 40]], [[1, 20, 30, 40], [1, 50, 60, 70]]], ids=["alone", "batch"])
@pytest.mark.parametrize("sample", [False, True])
def test_a_plain_token_waits_for_the_device_once(rows, sample):
    model = tiny.compose(Oracle(tiny.llama("base", 1), [("e", tiny.llama("small", 2), tiny.llama("small", 3), 1.0)]))
    ids = torch.tensor(rows)
    options = {"do_sample": sample, "eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [2]}
    counts = {}
    for n_new in (5, 25):
        with counted_syncs() as seen:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, speculate=False, **options)
        counts[n_new] = len(seen)
    assert 0 < counts[25] - counts[5] <= 20


@pytest.mark.parametrize("speculate", [3, "auto"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "seed": 1}], ids=str)
def test_a_step_with_drafts_waits_twice(monkeypatch, speculate, options):
    """For how many drafts are accepted, and for the tokens with whether they end the text. ``"auto"`` also looks at
    how sure each draft is, before it decides on another one."""
    model = tiny.compose(Oracle(tiny.llama("base", 1), [("e", tiny.llama("small", 2), tiny.llama("small", 3), 1.0)]))
    steps, decode = [], generation_mixin.decode
    monkeypatch.setattr(generation_mixin, "decode", lambda *args, **kwargs: map(kept, decode(*args, **kwargs)))
    monkeypatch.setattr(Costs, "drafts_pay", lambda *args: True)

    def kept(step):
        steps.append(step)
        return step

    ids = torch.tensor([[1, 20, 30, 40]])
    waits = []
    for n_new in (5, 30):
        steps.clear()
        with counted_syncs() as seen:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, speculate=speculate, pad_token_id=0,
                suppress_tokens=[2], eos_token_id=2, **options,
            )  # fmt: skip
        drafted = [step for step in steps if step.n_drafts > 0]
        looks = 0 if speculate != "auto" else sum(step.n_drafts + 1 for step in steps if not step.of_prompt)
        waits.append((len(seen), len(steps) + len(drafted), len(steps) + len(drafted) + looks))
    found, least, most = (long - short for short, long in zip(*waits))
    assert 0 < least <= found <= most
