"""The rules by which experts are joined: their equations, their identities, and who takes them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, special

from proxytune import AlphaError, ProxyTuneConfig, ProxyTunedForCausalLM, RecipeError
from proxytune.analysis.explain import explain_prompt
from proxytune.analysis.terminal import totals_lines
from proxytune.answers.options import AnswerOptions, Sampling
from proxytune.decoding.conflict import conflicts
from proxytune.decoding.mixing import mix, scale_to
from proxytune.recipe.rules import RULES, check_rule
from support import tiny
from support.commands import fails, run
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens, divergence, joined

OTHERS = [rule for rule in RULES if rule != "sum"]
ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]


def drawn(seed, n_experts=2, n_vocab=50):
    generator = torch.Generator().manual_seed(seed)
    base, *sides = (3 * torch.randn(1, 2, n_vocab, generator=generator) for _ in range(1 + 2 * n_experts))
    return base, list(zip(sides[::2], sides[1::2]))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(OTHERS), st.integers(0, 10**6), st.integers(1, 3), st.floats(0.05, 0.33))
def test_each_rule_is_its_equation(rule, seed, n_experts, weight):
    base, pairs = drawn(seed, n_experts)
    alpha = [weight * (1 - 0.2 * at) for at in range(n_experts)]
    mixed = mix(base, pairs, torch.tensor([alpha]), rule=rule)[0].double().log_softmax(-1)
    for at in range(2):
        expected = joined(rule, base[0, at], [(e[0, at], a[0, at]) for e, a in pairs], alpha)
        torch.testing.assert_close(mixed[at], expected, atol=2e-3 if rule == "dynamic" else 1e-4, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_alpha_0_is_the_base(rule):
    base, pairs = drawn(1)
    assert torch.equal(mix(base, pairs, torch.zeros(1, 2), rule=rule), base)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "convex"])
def test_an_expert_like_its_anti_expert_is_the_base(rule):
    base, pairs = drawn(2)
    mixed = mix(base, [(e, e.clone()) for e, _ in pairs], torch.ones(1, 2), rule=rule)
    assert torch.equal(mixed, base)


@pytest.mark.parametrize("rule", ["mean", "union", "intersection"])
def test_two_like_experts_are_one(rule):
    base, pairs = drawn(3)
    one = mix(base, pairs[:1], torch.tensor([[0.7]]))
    two = mix(base, [pairs[0]] * 2, torch.tensor([[0.7, 0.7]]), rule=rule)
    torch.testing.assert_close(two.log_softmax(-1), one.log_softmax(-1), atol=1e-5, rtol=0)


def test_convex_with_all_weight_on_one_expert_is_that_expert():
    base, pairs = drawn(4)
    mixed = mix(base, pairs, torch.tensor([[0.0, 1.0]]), rule="convex")
    torch.testing.assert_close(mixed.log_softmax(-1), pairs[1][0].log_softmax(-1), atol=1e-5, rtol=0)


def test_union_is_above_intersection():
    base, pairs = drawn(5)
    union, intersection = (mix(base, pairs, torch.ones(1, 2), rule=rule) for rule in ("union", "intersection"))
    assert (union >= intersection).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_its_rows(rule):
    base, pairs = drawn(6)
    other_base, other_pairs = drawn(7)
    alpha = torch.tensor([[0.3, 0.4], [0.5, 0.1]])
    both = mix(
        torch.cat([base, other_base]),
        [tuple(map(torch.cat, zip(one, other))) for one, other in zip(pairs, other_pairs)],
        alpha,
        rule=rule,
    )
    rows = [mix(base, pairs, alpha[:1], rule=rule), mix(other_base, other_pairs, alpha[1:], rule=rule)]
    torch.testing.assert_close(both, torch.cat(rows), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_excluded_gives_no_nan(rule):
    base, pairs = drawn(8)
    base[..., 3] = -torch.inf
    pairs[0][0][..., 4] = -torch.inf  # its expert excludes it
    pairs[1][0][..., 4] = -torch.inf
    pairs[0][1][..., 5] = -torch.inf  # its anti-expert does
    for side in (*pairs[0], *pairs[1]):
        side[..., 6] = -torch.inf
    mixed = mix(base, pairs, torch.full((1, 2), 0.4), rule=rule)
    assert not mixed.isnan().any()
    assert (mixed[..., 3:5] == -torch.inf).all()
    assert mixed[..., 7:].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.001, 3.0))
def test_a_divergence_is_reached_or_out_of_reach(seed, wanted):
    base, ((one, other),) = drawn(seed, 1)
    s = scale_to(base, one - other, wanted, 2.0)
    for at in range(2):
        found = divergence(base[0, at] + float(s[0, at]) * (one - other)[0, at], base[0, at])
        assert found < wanted + 1e-5 if float(s[0, at]) == 2.0 else abs(found - wanted) < 1e-3


# -- models -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle():
    base = tiny.llama("base", 1)
    return Oracle(base, [("a", near(base, 2), near(base, 3), 0.6), ("b", near(base, 4), near(base, 5), 0.4)])


@pytest.fixture(scope="module")
def model(oracle):
    experts = [{"name": n, "expert": e, "anti_expert": a, "alpha": alpha} for n, e, a, alpha in oracle.experts]
    return ProxyTunedForCausalLM.from_members(oracle.base, experts=experts)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("speculate", [False, 3])
def test_greedy_decoding_is_the_plain_loop(oracle, model, rule, speculate):
    plain = Oracle(oracle.base, oracle.experts, rule=rule)
    tokens = new_tokens(model, ROWS, max_new_tokens=10, combine=rule, speculate=speculate)
    for row, own in zip(ROWS, tokens):
        assert_same_tokens(own, plain.greedy(row, 10))


@pytest.mark.parametrize("rule", OTHERS)
def test_a_recipe_names_its_rule(oracle, model, rule):
    experts = [{"name": n, "expert": e, "anti_expert": a, "alpha": alpha} for n, e, a, alpha in oracle.experts]
    own = ProxyTunedForCausalLM.from_members(oracle.base, experts=experts, combine=rule)
    ids = torch.tensor(ROWS[:1])
    assert torch.equal(own(ids).logits, model(ids, combine=rule).logits)
    assert torch.equal(own(ids, combine="sum").logits, model(ids).logits)
    assert json.loads(own.config.to_json_string())["combine"] == rule


def test_a_rule_in_a_generation_config(model):
    config = model.generation_config
    config.combine = "union"
    try:
        assert new_tokens(model, ROWS, max_new_tokens=8) == (
            wanted := new_tokens(model, ROWS, max_new_tokens=8, combine="union")
        )
        assert new_tokens(model, ROWS, max_new_tokens=8, combine="sum") != wanted
    finally:
        del config.combine


def test_beams_take_it(oracle, model):
    best = Oracle(oracle.base, oracle.experts, rule="mean").beams(ROWS[0], 4, 3)[0]
    ids = model.generate(torch.tensor(ROWS[:1]), num_beams=3, max_new_tokens=4, combine="mean", eos_token_id=None)
    assert ids[0, len(ROWS[0]) :].tolist() == best[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_trace_has_flips_only_where_they_are_exact(oracle, model, rule):
    plain = Oracle(oracle.base, oracle.experts, rule=rule)
    out = model.generate(torch.tensor(ROWS[:1]), max_new_tokens=3, combine=rule, return_trace=True, eos_token_id=None)
    tokens = out.sequences[0, len(ROWS[0]) :].tolist()
    for at, token in enumerate(out.traces[0]):
        log_p = plain.logits(ROWS[0], tokens[:at])[-1].log_softmax(-1)
        assert token.mixture_logprob == pytest.approx(float(log_p[token.id]), abs=2e-3)
        assert bool(token.flips) == (rule in ("sum", "mean", "convex"))
        for name, steps in token.flips.items():
            column = ["a", "b"].index(name)
            for (start, id_), (end, _) in zip(steps, [*steps[1:], (3.0, None)]):
                alpha = [0.6, 0.4]
                alpha[column] = (start + end) / 2
                if end - start > 1e-3 and start >= 0:
                    assert int(plain.logits(ROWS[0], tokens[:at], alpha)[-1].argmax()) == id_


def test_conflicts_of_a_trace(oracle, model):
    """Against their definitions, in numpy."""
    out = model.generate(torch.tensor(ROWS[:1]), max_new_tokens=4, return_trace=True, eos_token_id=None)
    tokens = out.sequences[0, len(ROWS[0]) :].tolist()
    logits = {name: each.double().numpy() for name, each in oracle.member_logits(ROWS[0], tokens[:-1]).items()}
    for at, token in enumerate(out.traces[0]):
        base = logits["base"][at]
        offsets = [
            alpha * (logits[f"{n}.expert"][at] - logits[f"{n}.anti_expert"][at]) for n, _, _, alpha in oracle.experts
        ]
        cosine = 1 - spatial.distance.correlation(*offsets)
        p, q = (special.softmax(base + offset) for offset in offsets)
        assert token.conflict.cosine == pytest.approx(cosine, abs=1e-4)
        assert token.conflict.distance == pytest.approx(spatial.distance.jensenshannon(p, q, base=2), abs=1e-3)
        assert token.conflict.disagree == (p.argmax() != q.argmax())
        assert set(token.to_json()["conflict"]) == {"cosine", "distance", "disagree"}


def test_conflicts_at_their_ends():
    base = torch.zeros(1, 4)
    push = torch.tensor([[5.0, -1.0, 2.0, 0.0]])
    none = torch.zeros(1, 4)
    same, against, still = (
        conflicts(base, [(push, none), (other, none)], torch.ones(1, 2))[0] for other in (push, -push, none)
    )
    assert (same.cosine, same.distance, same.disagree) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-3), False)
    assert against.cosine == pytest.approx(-1.0)
    assert against.disagree
    assert still.cosine is None
    far = [(100 * torch.eye(4)[at : at + 1], none) for at in range(3)]
    assert conflicts(base, far, torch.ones(1, 3))[0].distance == pytest.approx(1.0)
    cut = push.clone()
    cut[0, 1] = -torch.inf
    assert conflicts(base, [(push, none), (cut, none)], torch.ones(1, 2))[0].cosine == pytest.approx(1.0)


def test_an_explanation_says_how_far_experts_disagree(model):
    why = explain_prompt(model, tiny.tokenizer(), "The fox", (0.6, 0.4), AnswerOptions(max_new_tokens=6), Sampling(), 5)
    found = [token["conflict"] for token in why.tokens]
    n = sum(each["disagree"] for each in found)
    mean = sum(each["distance"] for each in found) / len(found)
    said = f"would choose different tokens at {n} of {len(found)} places; mean distance {mean:.2f}, mean cosine"
    assert said in totals_lines(why)
    assert said in why.html()


def test_one_expert_has_no_conflict(oracle):
    single = tiny.compose(Oracle(oracle.base, oracle.experts[:1]))
    out = single.generate(torch.tensor(ROWS[:1]), max_new_tokens=2, return_trace=True, eos_token_id=None)
    assert all(token.conflict is None and "conflict" not in token.to_json() for token in out.traces[0])


# -- what does not fit --------------------------------------------------------------------------------------------
PAIR = {"name": "a", "expert": "./e", "anti_expert": "./a", "alpha": 0.5}


@pytest.mark.parametrize(
    ("combine", "experts", "error", "said"),
    [
        ("product", [PAIR], RecipeError, "there is no rule 'product'"),
        (None, [PAIR], RecipeError, "there is no rule None"),
        ("convex", [PAIR, {**PAIR, "name": "b", "alpha": 0.6}], AlphaError, "at most 1, unlike 0.5, 0.6"),
        ("convex", [{**PAIR, "alpha": -0.5}], AlphaError, "0 or more"),
        (
            "convex",
            [{"name": "a", "anti_expert": "./a", "alpha": 0.5}],
            RecipeError,
            "an `expert`, and 'a' has only",
        ),
        ("union", [{"name": "a", "expert": "./e"}], RecipeError, "an `anti_expert`, and 'a' has only an expert"),
        ("dynamic", [{"name": "a", "anti_expert": "./e"}], RecipeError, "each entry needs an `expert`, and 'a'"),
    ],
)
def test_what_does_not_fit_is_refused(combine, experts, error, said):
    with pytest.raises(error, match=said):
        ProxyTuneConfig(base="./base", experts=experts, combine=combine)


def test_a_call_whose_alphas_do_not_fit_is_refused(model):
    with pytest.raises(AlphaError, match=r"unlike 0.9, 0.9"):
        model.generate(torch.tensor(ROWS[:1]), alpha=0.9, combine="convex", max_new_tokens=1)
    with pytest.raises(RecipeError, match="there is no rule 'best'"):
        model.generate(torch.tensor(ROWS[:1]), combine="best", max_new_tokens=1)
    with pytest.raises(RecipeError, match="there is no rule 'best'"):
        model(torch.tensor(ROWS[:1]), combine="best")


def test_alphas_that_sum_to_one_in_float_are_fine():
    experts = ProxyTuneConfig(
        base="./b", experts=[{**PAIR, "name": str(n), "alpha": 0.1} for n in range(10)]
    ).expert_list
    check_rule("convex", experts, [[0.1] * 10])


def test_the_commands(shelf, no_progress, tmp_path):
    parts = ("--base", shelf / "base", "--expert", shelf / "expert", "--anti-expert", shelf / "anti")
    more = ("--add-expert", f"other={shelf / 'anti'},anti={shelf / 'expert'},alpha=0.25")
    run("new", tmp_path / "mine", *parts, *more, "--combine", "mean")
    asked = ("generate", tmp_path / "mine", "The", "-n", "6", "--json")
    tokens = {rule: json.loads(run(*asked, "--combine", rule).stdout)["tokens"] for rule in ("sum", "mean", "union")}
    assert json.loads(run(*asked).stdout)["tokens"] == tokens["mean"]
    assert tokens["sum"] != tokens["union"]
    assert "combine" in run("check", tmp_path / "mine", "--json").stdout
    assert "there is no rule 'most'" in fails(*asked, "--combine", "most")
    assert "unlike" in fails(*asked, "--combine", "convex", "--alpha", "2")
