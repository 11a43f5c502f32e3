"""Gates: where steering applies, against the plain loop, and who takes them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM, RecipeError
from proxytune.decoding.mixing import mix
from proxytune.recipe.gates import Gate, gate_of
from proxytune.recipe.rules import RULES
from support import tiny
from support.commands import fails, run
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens, divergence, gated

ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]
GATES = [("unsure", 0.12), ("entropy", 4.2), ("kl", 0.2)]


def drawn(seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(1, 3, 50, generator=generator) for _ in range(3))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["unsure", "entropy", "kl"]), st.floats(0.05, 1.0), st.integers(0, 10**6), st.floats(0.1, 6.0))
def test_each_gate_is_its_definition(kind, value, seed, spread):
    base, expert, anti = drawn(seed, spread)
    value = 3 * value if kind == "entropy" else value
    whole = mix(base, [(expert, anti)], torch.ones(1, 1))
    mixed = mix(base, [(expert, anti)], torch.ones(1, 1), gate=Gate(kind, value))
    for at in range(3):
        expected = gated(kind, value, base[0, at], whole[0, at]).double().log_softmax(-1)
        torch.testing.assert_close(mixed[0, at].double().log_softmax(-1), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("gate", [Gate("unsure", 1e-6), Gate("entropy", 100.0)])
def test_a_closed_gate_is_the_base_to_the_last_bit(gate):
    base, expert, anti = drawn(1)
    expert[..., 4] = -torch.inf  # what the expert excludes comes back
    assert torch.equal(mix(base, [(expert, anti)], torch.ones(1, 1), gate=gate), base)


@pytest.mark.parametrize("gate", [Gate("unsure", 1.0), Gate("entropy", 1e-9), Gate("kl", 1e6)])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dynamic"])
def test_an_open_gate_is_no_gate(gate, rule):
    base, expert, anti = drawn(2)
    alpha = torch.full((1, 1), 0.7)
    expert[..., 4] = -torch.inf
    assert torch.equal(
        mix(base, [(expert, anti)], alpha, rule=rule, gate=gate), mix(base, [(expert, anti)], alpha, rule=rule)
    )


def test_a_budget_is_kept():
    base, expert, anti = drawn(3)
    mixed = mix(base, [(expert, anti)], torch.ones(1, 1), gate=Gate("kl", 0.3))
    assert all(divergence(mixed[0, at], base[0, at]) < 0.3 + 1e-3 for at in range(3))


# -- models -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle():
    base = tiny.llama("base", 1)
    return Oracle(base, [("a", near(base, 2), near(base, 3), 1.0)])


@pytest.fixture(scope="module")
def model(oracle):
    return tiny.compose(oracle)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("speculate", [False, 3])
def test_greedy_decoding_is_the_plain_loop(oracle, model, gate, speculate):
    plain = Oracle(oracle.base, oracle.experts, gate=gate)
    tokens = new_tokens(model, ROWS, max_new_tokens=12, gate=dict([gate]), speculate=speculate)
    for row, own in zip(ROWS, tokens):
        assert_same_tokens(own, plain.greedy(row, 12))


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_trace_says_how_far_the_gate_is_open(oracle, model, gate):
    """And the gates of this test are open at some tokens and closed at others."""
    out = model.generate(
        torch.tensor(ROWS[:1]), max_new_tokens=12, gate=dict([gate]), return_trace=True, eos_token_id=None
    )
    tokens = out.sequences[0, len(ROWS[0]) :].tolist()
    logits = oracle.member_logits(ROWS[0], tokens[:-1])
    whole = oracle.mix(logits)
    for at, token in enumerate(out.traces[0]):
        base, added = logits["base"][at], whole[at] - logits["base"][at]
        moved = gated(*gate, base, whole[at])
        moved = (moved - moved.mean()) - (base - base.mean())
        share = float(moved.norm() / (added - added.mean()).norm())
        assert token.opened == pytest.approx(share, abs=2e-3)
        assert not token.flips
        assert token.to_json()["opened"] == pytest.approx(token.opened, abs=1e-6)
    openings = [token.opened for token in out.traces[0]]
    assert min(openings) < 1.0
    assert max(openings) > 0.0


def test_without_a_gate_a_trace_says_nothing_of_it(model):
    out = model.generate(torch.tensor(ROWS[:1]), max_new_tokens=2, return_trace=True)
    assert all(token.opened is None and "opened" not in token.to_json() for token in out.traces[0])


@pytest.mark.parametrize("spelling", ["unsure=0.12", {"unsure": 0.12}, Gate("unsure", 0.12)], ids=repr)
def test_spellings(oracle, model, spelling):
    wanted = new_tokens(model, ROWS, max_new_tokens=8, gate={"unsure": 0.12})
    assert new_tokens(model, ROWS, max_new_tokens=8, gate=spelling) == wanted
    config = model.generation_config
    config.gate = spelling if isinstance(spelling, str) else "unsure=0.12"
    try:
        assert new_tokens(model, ROWS, max_new_tokens=8) == wanted
        assert new_tokens(model, ROWS, max_new_tokens=8, gate="none") != wanted
    finally:
        del config.gate


def test_a_recipe_with_a_gate(oracle, model):
    experts = [{"name": n, "expert": e, "anti_expert": a, "alpha": alpha} for n, e, a, alpha in oracle.experts]
    own = ProxyTunedForCausalLM.from_members(oracle.base, experts=experts, gate="entropy=2")
    ids = torch.tensor(ROWS[:1])
    assert json.loads(own.config.to_json_string())["gate"] == {"entropy": 2.0}
    assert torch.equal(own(ids).logits, model(ids, gate={"entropy": 2.0}).logits)
    assert torch.equal(own(ids, gate="none").logits, model(ids).logits)


# -- what does not fit --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("often", "there is no gate 'often'"),
        ({"often": 1}, "there is no gate 'often'"),
        ({"unsure": 0.5, "kl": 1}, "one condition"),
        ({}, "one condition"),
        (0.5, "one condition"),
        ({"unsure": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"unsure": True}, "not True"),
        ({"kl": 0}, "nats above 0, not 0"),
        ("entropy=", "nats above 0, not ''"),
        ("entropy=nan", "not nan"),
        ("kl=inf", "not inf"),
    ],
)
def test_bad_gates_are_refused(model, said, message):
    with pytest.raises(RecipeError, match=message):
        gate_of(said)
    with pytest.raises(RecipeError, match=message):
        model.generate(torch.tensor(ROWS[:1]), gate=said, max_new_tokens=1)
    with pytest.raises(RecipeError, match=message):
        ProxyTuneConfig(base="./b", experts=[{"expert": "./e", "anti_expert": "./a"}], gate=said)


def test_the_commands(shelf, no_progress, tmp_path):
    parts = ("--base", shelf / "base", "--expert", shelf / "expert", "--anti-expert", shelf / "anti")
    run("new", tmp_path / "mine", *parts, "--gate", "entropy=100")
    asked = ("generate", tmp_path / "mine", "The", "-n", "6", "--json")
    closed = json.loads(run(*asked).stdout)["tokens"]
    assert closed == json.loads(run(*asked, "--alpha", "0").stdout)["tokens"]
    assert closed != json.loads(run(*asked, "--gate", "none").stdout)["tokens"]
    assert '"entropy": 100.0' in run("check", tmp_path / "mine", "--json").stdout
    assert "there is no gate 'never'" in fails(*asked, "--gate", "never")
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"prompt": "The", "completion": " fox"}) + "\n")
    assert "with a gate the mixture is no straight line" in fails("limit", tmp_path / "mine", "--input", gold)
