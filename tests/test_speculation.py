"""Speculation changes the speed and nothing else: greedy tokens are the oracle's, samples have its distribution."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import product
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    generation,
)
from transformers.generation.streamers import BaseStreamer

from proxytune import Expert, MemberError, ProxyTunedForCausalLM, ProxyTuneError, generation_mixin
from proxytune.decoding import drafting, sampling
from proxytune.decoding import text as texts
from proxytune.decoding.acceptance import accept_greedy, accept_sampled
from proxytune.decoding.cost import QUICK_ROWS, Cost, Costs, cost_of_weights, expected_tokens
from proxytune.decoding.drafting import Draft
from proxytune.decoding.pace import Pace
from proxytune.decoding.text import Lookup
from proxytune.lanes import transformers
from proxytune.lanes.reading import rotations
from proxytune.lanes.transformers import TransformersState
from support import tiny
from support.adapters import load, oracle_of
from support.decoding import N_NEW, QUIET, ROWS, family_answers, family_oracle, near, new_tokens, partly
from support.oracle import Oracle, assert_same_tokens
from support.own_prompts import TEXTS, batch_of, compose, prompts_of


@pytest.fixture(scope="module")
def oracle():
    return family_oracle("llama")


@pytest.fixture(scope="module")
def model(oracle):
    return tiny.compose(oracle)


# -- the rule ---------------------------------------------------------------------------------------------------
def test_greedy_accepts_the_longest_agreeing_prefix():
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2], [0, 1, 2], [3, 0, 2]]), 4).float()
    drafts = torch.tensor([[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    n_accepted, tokens = accept_greedy(drafts, scores)
    assert n_accepted.tolist() == [3, 0, 1]
    assert tokens.tolist()[1:] == [0, 0]


P = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
Q = torch.tensor([0.2, 0.2, 0.2, 0.3, 0.1])
N_DRAWS = 200_000


def accept_everything(drafts, p, q):
    return torch.full((len(drafts),), drafts.shape[1]), drafts[:, 0]


def draw_from_p_on_rejection(drafts, p, q):
    n_accepted, _ = accept_sampled(drafts, p, q)
    return n_accepted, torch.multinomial(p[:, 0], 1).squeeze(1)


def swap_p_and_q(drafts, p, q):
    return accept_sampled(drafts, q, p)


def ignore_the_ratio(drafts, p, q):
    half = (torch.rand(drafts.shape[0], 1) < 0.5).long()
    return half.squeeze(1), accept_sampled(drafts, p, q)[1]


def first_tokens(rule, looked_up):
    torch.manual_seed(5)
    p = P.expand(N_DRAWS, 1, -1)
    if looked_up:
        drafts, q = torch.randint(0, 4, (N_DRAWS, 1)), None
    else:
        drafts, q = torch.multinomial(Q, N_DRAWS, replacement=True)[:, None], Q.expand(N_DRAWS, 1, -1)
    n_accepted, tokens = rule(drafts, p, q)
    return torch.where(n_accepted == 1, drafts[:, 0], tokens)


def chi_square(counts, expected):
    """The statistic over the outcomes that can happen; the others cost so much that any of them shows."""
    possible = expected > 0
    impossible = float(counts[~possible].sum())
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum()) + impossible * 1e6


@pytest.mark.parametrize("looked_up", [False, True])
def test_a_draft_or_what_replaces_it_is_distributed_as_the_mixture(looked_up):
    counts = torch.bincount(first_tokens(accept_sampled, looked_up), minlength=5).float()
    assert chi_square(counts, P * N_DRAWS) < 16.27  # 3 degrees of freedom, 99.9 %


@pytest.mark.parametrize("rule", [accept_everything, draw_from_p_on_rejection, swap_p_and_q, ignore_the_ratio])
def test_an_altered_rule_shows(rule):
    counts = torch.bincount(first_tokens(rule, looked_up=False), minlength=5).float()
    assert chi_square(counts, P * N_DRAWS) > 100


def test_where_p_and_q_agree_nothing_is_rejected():
    drafts = torch.multinomial(P, 1000, replacement=True)[:, None].repeat(1, 3)
    same = P.expand(1000, 3, -1)
    assert accept_sampled(drafts, same, same.clone())[0].tolist() == [3] * 1000


# -- the whole of generate: samples ------------------------------------------------------------------------------
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 3, "eos_token_id": None, "pad_token_id": tiny.PAD}


def joint(oracle, prompt, n_new, temperature, top_p):
    """The exact probability of every continuation of top-3 sampling, of which only ``top_p`` is left."""
    found = {}
    for choice in product(range(3), repeat=n_new):
        tokens, probability = [], 1.0
        for k in choice:
            best = (oracle.logits(prompt, tokens)[-1] / temperature).topk(3)
            p = best.values.softmax(-1)
            p = p * (p.cumsum(-1) - p < top_p)
            probability *= float(p[k] / p.sum())
            tokens.append(int(best.indices[k]))
        found[tuple(tokens)] = probability
    return found


def draws(model, prompt, n_new, n_draws, n_batch=2500, seeded=False, **kwargs):
    rows = torch.tensor([prompt] * n_batch)
    for at in range(n_draws // n_batch):
        given = {**kwargs, "seed": list(range(at * n_batch, (at + 1) * n_batch))} if seeded else kwargs
        out = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=n_new, **{**SAMPLED, **given})
        yield from map(tuple, out[:, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def alike():
    """Members so near each other that their best three tokens overlap, and differ in how likely they are."""
    base = tiny.llama("base", 1)
    oracle = Oracle(base, [("e", near(base, 2, 0.01), near(base, 3, 0.01), 1.0)])
    return oracle, tiny.compose(oracle)


def statistic(oracle, model, n_draws, n_new=4, **kwargs):
    """Chi-square of the joint distribution of ``n_new`` tokens against the exact one, and its degrees of freedom.

    It is infinite where a text was drawn that top-k and top-p forbid.
    """
    exact = joint(oracle, ROWS[1], n_new, kwargs.get("temperature", 1.5), kwargs.get("top_p", 1.0))
    seen = dict.fromkeys(exact, 0)
    torch.manual_seed(1)
    for tokens in draws(model, ROWS[1], n_new, n_draws, **kwargs):
        if exact.get(tokens, 0.0) == 0:
            return math.inf, 1
        seen[tokens] += 1
    counts = torch.tensor([float(seen[tokens]) for tokens in exact])
    expected = torch.tensor([exact[tokens] for tokens in exact]) * n_draws
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    return chi_square(counts[keep], expected[keep]), int(keep.sum()) - 1


@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, ("cycle", 1), ("unsure", 0.12)], ids=str)
def test_samples_have_the_mixtures_distribution(alike, gate):
    oracle, model = alike
    gated = Oracle(oracle.base, oracle.experts, gate=gate)
    value, degrees = statistic(
        gated, model, 10_000 if gate else 20_000, speculate=2, gate=dict([gate]) if gate else None
    )
    assert partly(model.speculation_stats)
    assert value < degrees + 4 * (2 * degrees) ** 0.5, "4 standard deviations of chi-square"


@pytest.fixture(scope="module")
def apart():
    """Members whose guess is so wrong that a policy which looked at a draw would show at once."""
    base = tiny.llama("mini", 1)
    oracle = Oracle(base, [("e", near(base, 2, 0.05), near(base, 3, 0.05), 1.0)])
    return oracle, tiny.compose(oracle)


def test_the_default_draws_from_the_mixture(monkeypatch):
    """One row, as generate() is called most often; what decides about drafts must not look at what was drawn."""
    base = tiny.llama("base", 4)
    oracle = Oracle(base, [("e", near(base, 2, 0.01), near(base, 3, 0.01), 1.0)])
    model = tiny.compose(oracle)
    # A draft is worth its costs where its chances are one in three: a likely token's is, an unlikely one's is not.
    monkeypatch.setattr(model, "costs", Costs(Cost(80, 30), Cost(5, 0.1), 1))
    watched = Watched(model)
    value, degrees = statistic(oracle, watched, 300, n_new=3, n_batch=1, temperature=1.2)
    assert watched.drafted > 100
    assert value < degrees + 4 * (2 * degrees) ** 0.5


class Watched:
    """A model whose calls are counted."""

    def __init__(self, model):
        self.model, self.drafted = model, 0

    def generate(self, *args, **kwargs):
        made = self.model.generate(*args, **kwargs)
        stats = self.model.speculation_stats
        self.drafted += stats.drafted + stats.looked_up
        return made


def at_random(*_):
    return bool(torch.rand(()) < 0.5)


POLICIES = {
    "always": {"first": lambda *_: True, "another": lambda _self, n, _chances: n < 3},
    "never": {"first": lambda *_: False},
    "at random": {"first": at_random, "another": lambda _self, n, _chances: n < 12 and at_random()},
    "by confidence": {"first": lambda _self, chances: sum(chances) / len(chances) > 0.4},
    "copies": {"from_lookup": lambda _self, found: found and 2},
    "copies at random": {"from_lookup": lambda _self, found: found and at_random() * 2},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, pytest.param({"top_p": 0.8}, marks=pytest.mark.slow)], ids=["", "top-p"])
def test_no_policy_of_drafting_changes_what_is_drawn(apart, policy, options, monkeypatch):
    """Every branch of the cost model, in batches of rows of which each accepts another number."""
    oracle, model = apart
    monkeypatch.setattr(Costs, "best_drafts", lambda *_: 1)
    for name, decide in POLICIES[policy].items():
        monkeypatch.setattr(Pace, name, decide)
    if policy.startswith("copies"):  # a text with something to copy
        monkeypatch.setattr(Lookup, "find", lambda _self, most: [77, 40, 9][:most])
    watched = Watched(model)
    value, degrees = statistic(oracle, watched, 5_000, **options)
    assert (watched.drafted > 0) == (policy != "never")
    assert value < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("rule", [accept_everything, draw_from_p_on_rejection, swap_p_and_q])
def test_samples_of_an_altered_rule_do_not(alike, rule, monkeypatch):
    oracle, model = alike
    monkeypatch.setattr(sampling, "accept_sampled", rule)
    value, degrees = statistic(oracle, model, 20_000, speculate=2)
    assert value > degrees + 40 * (2 * degrees) ** 0.5


# -- the whole of generate: greedy -------------------------------------------------------------------------------
@pytest.mark.parametrize("speculate", [1, 3, 8, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mistral", "gpt2"])
def test_greedy_tokens_are_the_plain_loops(family, speculate):
    """Beyond the sliding windows of Gemma and Mistral, in a ragged batch and row by row."""
    oracle, answers = family_answers(family)
    model = tiny.compose(oracle)
    model.costs = replace(model.costs, apart=0.0)  # or "auto" would not draft for a batch of models so small
    for tokens, answer in zip(new_tokens(model, speculate=speculate), answers):
        assert_same_tokens(tokens, answer)
    assert speculate == "auto" or partly(model.speculation_stats)
    for row, answer in zip(ROWS, answers):
        assert_same_tokens(new_tokens(model, [row], speculate=speculate)[0], answer)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.5, 2.0])
def test_alpha_of_a_call(oracle, model, alpha):
    for row, tokens in zip(ROWS, new_tokens(model, alpha=alpha, speculate=3)):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW, alpha=[alpha]))


def test_alpha_of_each_row(oracle, model):
    alphas = [0.0, 1.0, -0.5]
    for row, alpha, tokens in zip(ROWS, alphas, new_tokens(model, alpha=alphas, speculate=3)):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW, alpha=[alpha]))


def test_unequal_families_and_vocabularies():
    """The drafting member has ids that the base lacks, and the other way round."""
    for base_vocab, small_vocab in ((384, 400), (400, 384)):
        base = tiny.llama("base", 1, vocab_size=base_vocab)
        small = tiny.qwen2("small", 2, vocab_size=small_vocab), tiny.qwen2("small", 3, vocab_size=small_vocab)
        oracle = Oracle(base, [("e", *small, 1.0)])
        for row, tokens in zip(ROWS, new_tokens(tiny.compose(oracle), speculate=2)):
            assert_same_tokens(tokens, oracle.greedy(row, N_NEW))


def test_several_experts_and_sides_left_out(oracle):
    base = oracle.base
    for experts in (
        [("a", near(base, 2), near(base, 3), 0.7), ("b", near(base, 4), near(base, 5), -0.4)],
        [("a", near(base, 2), None, 0.5)],
        [("a", None, near(base, 3), 0.3)],
    ):
        several = Oracle(base, experts)
        model = tiny.compose(several)
        for row, tokens in zip(ROWS, new_tokens(model, speculate=3)):
            assert_same_tokens(tokens, several.greedy(row, N_NEW))
        assert partly(model.speculation_stats)


@pytest.mark.parametrize("share", [True, False])
def test_lora_experts_draft_with_the_anti_expert_beside_them(shelf, share):
    oracle, model = oracle_of(shelf), load(shelf, share=share)
    for row, tokens in zip(ROWS, new_tokens(model, speculate=3)):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW))
    if share:
        drafting = model.drafting
        assert len(model.lanes) == 2
        assert drafting.shifts, "M- stands in for M, and the expert shifts it"
        reads = []
        base = model.member("base")
        hook = base.register_forward_pre_hook(
            lambda _m, _a, kw: reads.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        new_tokens(model, [ROWS[0]], speculate=3)
        hook.remove()
        assert set(reads[1:-1]) <= {2, 3, 4}, "one pass of M alone verifies"


def test_own_prompts(oracle, tokenizer):
    model = compose(oracle, tokenizer)
    batch = batch_of(tokenizer)
    out = model.generate(**batch, **QUIET, max_new_tokens=N_NEW, speculate=3)
    assert partly(model.speculation_stats)
    for text, row in zip(TEXTS, out[:, batch["input_ids"].shape[1] :]):
        assert_same_tokens(row, oracle.greedy(prompts_of(text, tokenizer), N_NEW))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[77], [5, 6]]},
        {"suppress_tokens": [40, 41, 42]},
        {"eos_token_id": 2, "min_new_tokens": 9},
        {"eos_token_id": 2, "forced_eos_token_id": 2},
        {"eos_token_id": list(range(100, 180))},
        {"stop_strings": ["e", "th"]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "single"])
def test_processors_and_criteria_see_what_they_would_see(model, tokenizer, options, rows):
    if "stop_strings" in options:
        options = {**options, "tokenizer": tokenizer, "eos_token_id": tiny.EOS}
    plain = new_tokens(model, rows, **options, speculate=False)
    assert new_tokens(model, rows, **options, speculate=4) == plain
    assert new_tokens(model, rows, **options, speculate="auto") == plain


def test_a_processor_of_the_users_own(model, monkeypatch):
    class Even(LogitsProcessor):
        """Every other token is even: it depends on the length of the text."""

        row_by_row = True

        def __call__(self, input_ids, scores):
            kept = torch.arange(scores.shape[1]) % 2 == input_ids.shape[1] % 2
            return scores.masked_fill(~kept, -torch.inf)

    own = {"logits_processor": LogitsProcessorList([Even()])}
    plain = new_tokens(model, [ROWS[0]], **own, speculate=False)
    assert [token % 2 for token in plain[0]] == [(len(ROWS[0]) + at) % 2 for at in range(N_NEW)]
    assert new_tokens(model, [ROWS[0]], **own, speculate=3) == plain
    assert partly(model.speculation_stats)
    assert new_tokens(model, **own, speculate=3) == new_tokens(model, **own, speculate=False)
    monkeypatch.delattr(Even, "row_by_row")
    for rows in (ROWS[:1], ROWS):
        assert new_tokens(model, rows, **own) == new_tokens(model, rows, **own, speculate=False)
        assert model.speculation_stats.drafted == model.speculation_stats.looked_up == 0
        with pytest.raises(ProxyTuneError, match="because Even may depend on more than a row's text"):
            new_tokens(model, rows, **own, speculate=3)


class Counting(LogitsProcessor):
    """Keeps a state, as grammar matchers do: it must be called once per token, in order."""

    def __init__(self):
        self.n_calls = 0

    def __call__(self, input_ids, scores):
        self.n_calls += 1
        return scores.masked_fill(torch.arange(scores.shape[1]) % 3 != self.n_calls % 3, -torch.inf)


WATERMARK = {"keys": [11, 22, 33], "ngram_len": 3}
STATEFUL = {
    "the user's own": lambda: {"logits_processor": LogitsProcessorList([Counting()])},
    "guidance": lambda: {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 88, 15, 7]])},
    "SynthID": lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(**WATERMARK)},
    "prefixes": lambda: {"prefix_allowed_tokens_fn": lambda _row, ids: [5 + len(ids) % 7, 40]},
}


@pytest.mark.parametrize("options", STATEFUL.values(), ids=STATEFUL)
def test_processors_with_a_state_are_asked_once_a_token(model, options):
    rows, n_new = [ROWS[0]], 10
    plain = new_tokens(model, rows, n_new, **options(), speculate=False)
    assert plain != new_tokens(model, rows, n_new), "the processor matters"
    assert new_tokens(model, rows, n_new, **options()) == plain, "in the default settings"
    with pytest.raises(ProxyTuneError, match=r"because \w+Processor may depend on|because Counting may depend on"):
        new_tokens(model, rows, n_new, **options(), speculate=3)


def test_guidance_by_hand(oracle, model):
    negative, tokens = [1, 88, 15, 7], []
    for _ in range(10):
        shown, other = (oracle.logits(prompt, tokens)[-1].log_softmax(-1) for prompt in (ROWS[0], negative))
        tokens.append(int((other + 1.5 * (shown - other)).argmax()))
    assert new_tokens(model, [ROWS[0]], 10, **STATEFUL["guidance"]()) == [tokens]


PURE = {
    "EpsilonLogitsWarper": (0.01,),
    "EtaLogitsWarper": (0.01,),
    "ExponentialDecayLengthPenalty": ((2, 1.5), 2, 3),
    "ForcedEOSTokenLogitsProcessor": (9, 2),
    "InfNanRemoveLogitsProcessor": (),
    "LogitNormalization": (),
    "MinLengthLogitsProcessor": (9, 2),
    "MinNewTokensLengthLogitsProcessor": (3, 6, 2),
    "MinPLogitsWarper": (0.1,),
    "NoBadWordsLogitsProcessor": ([[7], [5, 6]],),
    "NoRepeatNGramLogitsProcessor": (2,),
    "RepetitionPenaltyLogitsProcessor": (1.5,),
    "SequenceBiasLogitsProcessor": ([[[5, 6], 2.0], [[8], -3.0]],),
    "SuppressTokensAtBeginLogitsProcessor": ([3], 8),
    "SuppressTokensLogitsProcessor": ([3, 4],),
    "TemperatureLogitsWarper": (0.7,),
    "TopKLogitsWarper": (4,),
    "TopPLogitsWarper": (0.8,),
    "TypicalLogitsWarper": (0.8,),
}


def test_what_may_be_drafted_under_depends_on_its_arguments_alone():
    """Whatever it was asked before, and whichever rows stand beside it."""
    names = {each.__name__ for each in generation_mixin.ROW_BY_ROW if issubclass(each, LogitsProcessor)}
    assert names == set(PURE)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 10, (3, n), generator=generator) for n in (8, 9, 12)]
    scores = [torch.randn(3, 10, generator=generator) for _ in texts]
    for name, given in PURE.items():
        make = lambda: getattr(generation, name)(*given)  # noqa: B023, E731
        fresh = [make()(text, one.clone()) for text, one in zip(texts, scores)]
        used = make()
        for at in (2, 0, 1, 0, 2):
            assert torch.equal(used(texts[at], scores[at].clone()), fresh[at]), name
            for row in (1, 0, 2):
                alone = used(texts[at][row : row + 1], scores[at][row : row + 1].clone())
                torch.testing.assert_close(alone[0], fresh[at][row], msg=name)


# -- positions that depend on the length ----------------------------------------------------------------------------
SHORT, LONG = [1.0] * 4, [3.0, 5.0, 7.0, 9.0]
BY_LENGTH = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rotations_that_depend_on_the_length_are_not_drafted_for(kind):
    """Beyond the trained length a token is read differently if drafts stand after it."""

    def make(size, seed):
        return tiny.llama(size, seed, max_position_embeddings=20, rope_parameters=dict(BY_LENGTH[kind]))

    def composed():
        return ProxyTunedForCausalLM.from_members(make("base", 1), make("small", 2), make("small", 3), alpha=0.0)

    row = ROWS[0]
    alone = make("base", 1).generate(torch.tensor([row]), **QUIET, max_new_tokens=40)[0, len(row) :].tolist()
    assert new_tokens(composed(), [row], 40) == [alone]
    with pytest.raises(ProxyTuneError, match=rf"base.* may rotate positions by the length of the text .*{kind}"):
        new_tokens(composed(), [row], 40, speculate=4)


def test_members_of_one_pass_with_prompts_of_unequal_lengths_and_such_a_rotation_are_refused():
    small = tiny.llama("small", 2, max_position_embeddings=20, rope_parameters=dict(BY_LENGTH["dynamic"]))
    sides = {"name": "e", "expert": small, "anti_expert": small}
    ProxyTunedForCausalLM.from_members(tiny.llama("base", 1), experts=[sides])
    with pytest.raises(MemberError, match=r"e.expert and e.anti_expert are computed together .*'dynamic'"):
        ProxyTunedForCausalLM.from_members(
            tiny.llama("base", 1), experts=[{**sides, "expert_prompt": "Answer: {prompt}"}], tokenizer=tiny.tokenizer()
        )


def test_rotations_are_found_wherever_they_are_set():
    assert rotations(tiny.llama("mini")) == {"default"}
    assert rotations(tiny.gpt2("mini")) == set()
    for said in (
        {"type": "new"},
        {"full_attention": {"rope_type": "new"}, "sliding_attention": {"rope_type": "default"}},
    ):
        model = tiny.llama("mini")
        model.config.rope_scaling = said
        assert "new" in rotations(model)


def test_code_that_is_not_transformers_is_not_drafted_for():
    class Foreign(type(tiny.llama("mini"))):
        pass

    Foreign.__module__ = "transformers_modules.somewhere"
    base = tiny.llama("base", 1)
    base.__class__ = Foreign
    model = ProxyTunedForCausalLM.from_members(base, tiny.llama("small", 2))
    new_tokens(model, [ROWS[0]])
    assert model.speculation_stats.drafted == model.speculation_stats.looked_up == 0
    with pytest.raises(ProxyTuneError, match=r"because base runs code that is not transformers' own \(Foreign\)"):
        new_tokens(model, [ROWS[0]], speculate=2)


# -- rows that have ended --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama", "dynamic"),
        pytest.param("llama", "static", marks=pytest.mark.slow),
        pytest.param("gemma3", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_rows_that_have_ended_leave(family, cache, monkeypatch):
    """Caches hold the text of rows that still grow, and no more."""
    model, runs, sizes = tiny.compose(family_oracle(family)), [], []
    make = TransformersState.__init__
    monkeypatch.setattr(TransformersState, "__init__", lambda run, *given: (make(run, *given), runs.append(run))[0])
    inputs = TransformersState._inputs
    monkeypatch.setattr(
        TransformersState, "_inputs", lambda run, ids, mask: (sizes.append(len(ids)), inputs(run, ids, mask))[1]
    )
    rows, n_new = ROWS[::-1], 150
    options = {"eos_token_id": 2, "suppress_tokens": [2], "cache_implementation": cache}
    plain = new_tokens(model, rows, n_new, **options, speculate=False)
    ends = plain[2][14]
    early = {**options, "eos_token_id": [2, ends]}
    plain = new_tokens(model, rows, n_new, **early, speculate=False)
    n_short = sum(len(set(row[20:])) == 1 for row in plain)
    assert 0 < n_short < 3, "some rows end early, and others go on"
    runs.clear()
    sizes.clear()
    assert new_tokens(model, rows, n_new, **early, speculate=8) == plain
    assert partly(model.speculation_stats)
    longest = max(map(len, rows)) + n_new
    assert all(run.n_columns <= longest for run in runs)
    assert (min(sizes) < 3) == (cache == "dynamic"), "static shapes stay; other rows leave the forward passes"


# -- seeds of rows ---------------------------------------------------------------------------------------------------
COUPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20}


def test_seeded_samples_are_the_same_with_and_without_drafts(model):
    found = {
        speculate: new_tokens(model, **COUPLED, seed=5, speculate=speculate) for speculate in (False, 1, 4, "auto")
    }
    assert found[False] == found[1] == found[4] == found["auto"]
    new_tokens(model, **COUPLED, seed=5, speculate=4)
    assert partly(model.speculation_stats)
    assert new_tokens(model, **COUPLED, seed=6, speculate=4) != found[4]


def test_a_seeded_row_is_the_same_in_any_batch(model):
    seeds = [11, 22, 33]
    together = new_tokens(model, **COUPLED, seed=seeds, speculate=3)
    assert together == [new_tokens(model, [row], **COUPLED, seed=[seed])[0] for row, seed in zip(ROWS, seeds)]
    assert together != new_tokens(model, **COUPLED, seed=seeds[::-1], speculate=3)
    uncached = new_tokens(model, **COUPLED, seed=seeds, use_cache=False, n_new=6)
    assert uncached == [row[:6] for row in together]


def test_seeds_of_several_samples_of_a_prompt(model):
    options = {**QUIET, **COUPLED, "max_new_tokens": 8, "num_return_sequences": 4}
    out = model.generate(torch.tensor([ROWS[0]]), **options, seed=3, speculate=3)
    assert torch.equal(out, model.generate(torch.tensor([ROWS[0]]), **options, seed=3, speculate=False))
    assert len({tuple(row) for row in out.tolist()}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1, 2]}, "2 seeds for 3 rows"),
        ({"seed": "7"}, "seed must be a number from 0"),
        ({"seed": -1}, "seed must be a number from 0"),
        ({"seed": 1, "do_sample": False}, "seed is for sampling; add do_sample=True"),
        ({"seed": 1, "num_beams": 2}, "seed is for sampling by generate"),
    ],
    ids=str,
)
def test_seeds_that_cannot_be_honoured(model, options, message):
    with pytest.raises(ProxyTuneError, match=message):
        new_tokens(model, **{**COUPLED, **options})


@pytest.mark.slow
def test_seeded_samples_have_the_mixtures_distribution(alike):
    oracle, model = alike
    value, degrees = statistic(oracle, model, 5_000, speculate=2, seeded=True)
    assert partly(model.speculation_stats)
    assert value < degrees + 4 * (2 * degrees) ** 0.5


def test_threads_have_statistics_of_their_own(model):
    new_tokens(model, [ROWS[0]], speculate=3)
    mine, theirs = model.speculation_stats, []
    thread = Thread(target=lambda: theirs.extend([model.speculation_stats, new_tokens(model), model.speculation_stats]))
    thread.start()
    thread.join()
    assert theirs[0] == generation_mixin.SpeculationStats()
    assert theirs[2].emitted == 3 * N_NEW
    assert model.speculation_stats is mine


def test_a_streamer_is_given_one_token_after_another(model):
    class Seen(BaseStreamer):
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value.tolist())

        def end(self):
            self.ended = True

    seen = Seen()
    tokens = new_tokens(model, [ROWS[0]], streamer=seen, speculate=4)[0]
    assert seen.values == [[ROWS[0]], *([token] for token in tokens)]
    assert seen.ended


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["single", "batch"])
def test_scores_and_logits_are_those_of_plain_decoding(model, rows):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {**QUIET, "repetition_penalty": 1.3, "max_new_tokens": N_NEW}
    batch = tiny.padded(rows)
    plain = model.generate(**batch, **options, speculate=False)
    drafted = model.generate(**batch, **options, speculate=4 if len(rows) == 1 else "auto")
    assert torch.equal(plain.sequences, drafted.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(drafted, name)) == N_NEW
        for one, other in zip(getattr(plain, name), getattr(drafted, name)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.equal(drafted.scores[-1], drafted.logits[-1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_works_after_drafts(family):
    """As a conversation does: the same cache, a longer prompt, other drafts."""
    oracle = family_oracle(family)
    model = tiny.compose(oracle)
    cache, ids = model.new_cache(), [1, 40, 77]
    for turn, speculate in enumerate((4, False, 2)):
        ids = [*ids, 50 + turn, 9]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        out = model.generate(**inputs, **QUIET, max_new_tokens=10, past_key_values=cache, speculate=speculate)[
            0
        ].tolist()
        assert cache.get_seq_length() == len(out) - 1
        assert_same_tokens(out[len(ids) :], oracle.greedy(ids, 10))
        ids = out


def test_several_samples_of_a_prompt(model):
    torch.manual_seed(0)
    out = model.generate(
        torch.tensor([ROWS[0]]), do_sample=True, eos_token_id=None, pad_token_id=0, max_new_tokens=8,
        num_return_sequences=5, speculate=3,
    )  # fmt: skip
    assert out.shape == (5, len(ROWS[0]) + 8)
    assert len({tuple(row) for row in out.tolist()}) > 1
    assert partly(model.speculation_stats)


def test_the_same_seed_gives_the_same_samples(model):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(new_tokens(model, do_sample=True, top_k=0))
    assert found[0] == found[1] != new_tokens(model, do_sample=True, top_k=0), "the next draw is another"


def test_the_end_of_the_context_is_not_overrun():
    """GPT-2's positions are a table: a draft beyond it would be an error."""
    oracle = family_oracle("gpt2", n_positions=32)
    model = tiny.compose(oracle)
    rows = [ROWS[0], ROWS[0][:4]]
    for row, tokens in zip(rows, new_tokens(model, rows, n_new=32 - len(ROWS[0]) + 1, speculate=8)):
        assert_same_tokens(tokens, oracle.greedy(row, len(tokens)))


# -- drafts of a head that is not quite right ---------------------------------------------------------------------
def with_a_poor_quick_head(model, noise=25):
    """Its drafts are no longer those that the lane's own head would choose."""
    quick = model.lanes[model.drafting.lane].quick_head
    generator = torch.Generator().manual_seed(7)
    shift = torch.randint(-noise, noise + 1, quick.rounded.shape, generator=generator)
    quick.rounded.copy_((quick.rounded.int() + shift).clamp(-127, 127).to(torch.int8))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_greedy_tokens_do_not_depend_on_the_quick_head(family):
    answers = [family_oracle(family).greedy(row, N_NEW) for row in ROWS]
    model = with_a_poor_quick_head(tiny.compose(family_oracle(family), pack=True))
    for tokens, answer in zip(new_tokens(model, speculate=3), answers):
        assert_same_tokens(tokens, answer)
    assert partly(model.speculation_stats)
    for row, answer in zip(ROWS, answers):
        for speculate in (3, "auto"):
            assert_same_tokens(new_tokens(model, [row], speculate=speculate)[0], answer)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_lora_experts_are_drafted_for_with_a_quick_head(shelf, alpha):
    oracle, model = oracle_of(shelf), load(shelf, pack=True)
    lane = model.lanes[model.drafting.lane]
    seen = []
    hook = lane.quick_head.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape))
    for row, tokens in zip(ROWS, new_tokens(model, alpha=alpha, speculate=3)):
        assert_same_tokens(tokens, oracle.greedy(row, N_NEW, alpha=[alpha]))
    n_seen = len(seen)
    assert set(seen) == {(len(ROWS), 1, 16)}, "M- and M+ are mixed before the head, not after it"
    drafted = model.speculation_stats
    many = [ROWS[1]] * (QUICK_ROWS + 1)
    assert len({tuple(row) for row in new_tokens(model, many, alpha=alpha, speculate=3)}) == 1
    assert len(seen) == n_seen, "many rows are drafted for with the lane's own head"
    hook.remove()
    lane.quick_head = None
    new_tokens(model, alpha=alpha, speculate=3)
    assert abs(model.speculation_stats.acceptance - drafted.acceptance) < 0.1, "its guesses are nearly as good"


@pytest.mark.slow
def test_samples_of_a_poor_quick_head_have_the_mixtures_distribution(alike, monkeypatch):
    monkeypatch.setattr(drafting, "QUICK_ROWS", 10**6)  # the draws are rows of large batches
    oracle, _ = alike
    model = with_a_poor_quick_head(tiny.compose(copy.deepcopy(oracle), pack=True))
    value, degrees = statistic(oracle, model, 100_000, speculate=2)
    assert partly(model.speculation_stats)
    assert value < degrees + 4 * (2 * degrees) ** 0.5, "4 standard deviations of chi-square"


# -- how many drafts, and from where -----------------------------------------------------------------------------
def test_lookup_copies_what_followed_before():
    lookup = Lookup([5, 6, 7, 8, 9, 5, 6, 7])
    assert lookup.find(2) == [8, 9]
    assert lookup.find(10) == [8, 9, 5, 6, 7, 8, 9, 5, 6, 7], "the copy goes on with itself"
    lookup.tokens += [1, 2]
    assert lookup.find(3) == []
    lookup.tokens += [8, 9]
    assert lookup.find(1) == [5], "two tokens are enough"
    assert Lookup([4, 7, 7, 7, 7]).find(4) == [7, 7, 7, 7]
    assert Lookup([]).find(3) == Lookup([4]).find(3) == []


def test_repeated_text_is_copied():
    """A model that repeats itself is drafted for from its own text, and its tokens stay the same."""
    oracle = family_oracle("llama")
    model = tiny.compose(oracle)

    class Cycle(LogitsProcessor):
        row_by_row = True

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -50.0)
            forced[:, 10 + input_ids.shape[1] % 4] = 0
            return scores + 100 * forced

    own = {"logits_processor": LogitsProcessorList([Cycle()]), "n_new": 60}
    plain = new_tokens(model, [ROWS[0]], **own, speculate=False)
    assert new_tokens(model, [ROWS[0]], **own, speculate="auto") == plain
    assert model.speculation_stats.lookups_accepted > 10
    assert model.speculation_stats.cycles < 40


def drafts(confidences):
    """What a lane has drafted, that sure of it."""
    tokens = torch.zeros(len(confidences), len(confidences[0]), dtype=torch.long)
    return Draft(tokens, "lane", n_read=tokens.shape[1], confidences=confidences)


def test_pace_drafts_further_the_surer_and_the_cheaper():
    cheap = Costs(Cost(100, 1), Cost(5, 0.1), 1, ((Cost(5, 0.1), 1),))
    dear = Costs(Cost(100, 1), Cost(90, 1), 1, ((Cost(90, 1), 1),))

    def reach(costs, accepted):
        """How far it drafts, having seen ``accepted`` of every 10 drafts of a confidence accepted."""
        pace = Pace("auto", costs, 1)
        for at in range(100):
            pace.learn(drafts([[0.6]]), [int(at % 10 < accepted)])
        chance, n_drafts = pace.chance(0.6), 1
        if not pace.first([chance]):
            return 0
        while pace.another(n_drafts, [chance]):
            n_drafts, chance = n_drafts + 1, chance * pace.chance(0.6)
        return n_drafts

    assert reach(cheap, 10) > reach(cheap, 7) > reach(cheap, 4) >= 1
    assert reach(cheap, 7) > reach(dear, 7)
    assert reach(cheap, 0) <= 1
    rows_cost = Costs(Cost(1, 100), Cost(1, 100), 1)  # verifying is as expensive as decoding
    assert reach(rows_cost, 4) == 0


def test_drafts_that_fail_do_not_make_tokens_expensive():
    """What was spent on rejected drafts must not make the next draft look worth its cost."""
    costs = Costs(Cost(100, 10), Cost(40, 4), 1, apart=40)
    pace = Pace("auto", costs, 4)
    for _ in range(100):
        pace.learn(drafts([[0.6] * 3] * 4), [0] * 4)
    assert pace.spent / pace.earned > costs.cycle(0, 0.0, 4) / 4
    assert pace._price(4) == costs.cycle(0, 0.0, 4) / 4
    assert not pace.first([0.5] * 4)
    pace.plain = float("inf")
    pace.idle = 0
    assert pace.first([0.5] * 4), "without the bound it would draft"


def test_auto_leaves_a_batch_alone_where_no_acceptance_would_pay(model, monkeypatch):
    dear = replace(model.costs, apart=1e12)
    monkeypatch.setattr(model, "costs", dear)
    assert dear.best_drafts(0.9, 1) > 0 == dear.best_drafts(0.9, 3)
    paces = []
    monkeypatch.setattr(generation_mixin, "Pace", lambda *given: paces.append(Pace(*given)) or paces[-1])
    plain = new_tokens(model, speculate=False)
    for speculate, rows, fixed in (("auto", ROWS, 0), (2, ROWS, 2), ("auto", ROWS[:1], None)):
        assert new_tokens(model, rows, speculate=speculate)[0] == plain[0]
        assert paces[-1].fixed == fixed, "off from the start; a number is a number; one row is never moved"


def test_a_fixed_number_is_kept_and_off_is_off(model):
    new_tokens(model, [ROWS[0]], speculate=5)
    stats = model.speculation_stats
    assert stats.drafted >= 5 * (stats.cycles - 5) > 0, "fewer only at the end"
    assert stats.looked_up == 0
    new_tokens(model, [ROWS[0]], speculate=False)
    assert model.speculation_stats.cycles == N_NEW - 1
    assert model.speculation_stats.drafted == model.speculation_stats.looked_up == 0
    assert model.speculation_stats.acceptance is None
    assert model.speculation_stats.emitted == N_NEW


def test_what_was_given_at_load_is_the_default(oracle):
    model = tiny.compose(oracle, speculate=2)
    new_tokens(model, [ROWS[0]])
    assert model.speculation_stats.drafted > N_NEW
    new_tokens(model, [ROWS[0]], speculate=False)
    assert model.speculation_stats.drafted == 0


# -- bad input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [-1, 13, True, 2.0, "yes"])
def test_a_number_of_drafts_that_is_none(model, oracle, value):
    with pytest.raises(ProxyTuneError, match=r"must be .auto., False, or a number of drafts from 1 to 12, not"):
        new_tokens(model, speculate=value)
    with pytest.raises(ProxyTuneError, match="speculate must be"):
        tiny.compose(oracle, speculate=value)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str)
def test_drafts_are_for_greedy_and_sampling(model, options):
    rows = ROWS[:1]
    with pytest.raises(ProxyTuneError, match="speculate=3 is for greedy decoding and sampling with a cache"):
        new_tokens(model, rows, speculate=3, **options)
    assert new_tokens(model, rows, n_new=4, speculate="auto", **options)


def test_a_recipe_without_a_second_set_of_weights_cannot_draft(oracle):
    alone = ProxyTunedForCausalLM.from_members(oracle.base, anti_expert=oracle.base, alpha=0.5)
    assert new_tokens(alone) == new_tokens(alone, speculate=False)
    with pytest.raises(ProxyTuneError, match="because no member with weights of its own can draft"):
        new_tokens(alone, speculate=2)


def test_a_batch_that_must_stay_side_by_side(model):
    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    plain = new_tokens(model, speculate=False)
    assert new_tokens(model, stopping_criteria=[Never()]) == plain
    for options, reason in (
        ({"stopping_criteria": [Never()]}, "Never needs all rows"),
        ({"return_dict_in_generate": True}, "returned scores and caches need all rows"),
        ({"streamer": SimpleNamespace(put=lambda _: None, end=lambda: None)}, "a streamer needs all rows"),
    ):
        with pytest.raises(ProxyTuneError, match=reason):
            new_tokens(model, speculate=2, **options)


# -- cost ---------------------------------------------------------------------------------------------------------
def test_expected_tokens():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)


def test_costs_by_hand():
    costs = Costs(Cost(70), Cost(7), 1, ((Cost(7), 1),))
    assert costs.base.of(1) == 70
    assert costs.per_token(0, 0.8) == 84, "naive: all three"
    # 4 drafts, the last one read only where all were accepted: (4 + 0.8^4) * 7 + 77, over (1 - 0.8^5) / 0.2 tokens
    assert costs.per_token(4, 0.8) == pytest.approx(((4 + 0.4096) * 7 + 77) / 3.3616)
    assert costs.lookup_cycle(4) == 84
    assert Costs(Cost(13), None).best_drafts(0.9) == 0
    packed, plain = (cost_of_weights(1e6, 1, "cpu", packed=packed) for packed in (True, False))
    assert packed.of(1) == plain.of(1)
    assert packed.of(2) < plain.of(2)


def test_greedy_of_a_generation_config(model):
    """Options come in a config as well."""
    config = GenerationConfig(max_new_tokens=N_NEW, eos_token_id=None, pad_token_id=0, do_sample=False)
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(model.generate(ids, config, speculate=3), model.generate(ids, config, speculate=False))


def test_experts_of_the_config_class_are_taken():
    """`Expert` objects compose like mappings; the drafting lane is the cheapest one."""
    base, small = tiny.llama("base", 1), tiny.llama("mini", 2)
    model = ProxyTunedForCausalLM.from_members(
        base, experts=[{"name": "big", "expert": near(base, 3)}, {"name": "small", "expert": small}]
    )
    assert [expert.name for expert in model.experts if isinstance(expert, Expert)] == ["big", "small"]
    assert model.drafting.lane == model.seats["small.expert"][0]


def test_a_long_text_outgrows_its_buffers(monkeypatch):
    monkeypatch.setattr(texts, "GROWTH", 16)
    monkeypatch.setattr(transformers, "GROWTH", 16)
    model = tiny.compose(family_oracle("gemma3"))
    assert new_tokens(model, n_new=90, speculate=3) == new_tokens(model, n_new=90, speculate=False)
