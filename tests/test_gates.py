"""Gates: where steering applies, against the plain loop, and who takes them."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune import PromptError, ProxyTuneConfig, ProxyTunedForCausalLM, ProxyTuneError, RecipeError
from proxytune.decoding.gating import between
from proxytune.decoding.mixing import mix
from proxytune.recipe.gates import Gate, gate_of
from proxytune.recipe.rules import RULES
from support import tiny
from support.commands import fails, run
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens, divergence, gated
from support.oracle import inside as oracle_inside

ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]
EARLY = [("unsure", 0.12), ("entropy", 4.2), ("warmup", 5), ("decay", 6), ("cycle", 3)]  # known before experts read
GATES = [*EARLY, ("kl", 0.2), ("bet", 0.04)]


def drawn(seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(1, 3, 50, generator=generator) for _ in range(3))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["unsure", "entropy", "kl", "bet"]),
    st.floats(0.05, 1.0),
    st.integers(0, 10**6),
    st.floats(0.1, 6.0),
)
def test_each_gate_is_its_definition(kind, value, seed, spread):
    base, expert, anti = drawn(seed, spread)
    value = {"entropy": 3 * value, "bet": value - 0.05}.get(kind, value)
    whole = mix(base, [(expert, anti)], torch.ones(1, 1))
    mixed = mix(base, [(expert, anti)], torch.ones(1, 1), gate=Gate(kind, value))
    for at in range(3):
        expected = gated(kind, value, base[0, at], whole[0, at]).double().log_softmax(-1)
        torch.testing.assert_close(mixed[0, at].double().log_softmax(-1), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["warmup", "decay", "cycle"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_schedule_counts_the_answers_tokens(kind, n):
    base, expert, anti = drawn(4)
    whole = mix(base, [(expert, anti)], torch.ones(1, 1))
    mixed = mix(base, [(expert, anti)], torch.ones(1, 1), gate=Gate(kind, n))
    for t in range(3):
        torch.testing.assert_close(mixed[0, t], gated(kind, n, base[0, t], whole[0, t], t), atol=1e-4, rtol=1e-4)


def test_a_bet_is_what_drawing_twice_gives():
    """The draws themselves: one from the base, and another one from the mixture where the first does not stay."""
    base, expert, anti = (logits[0, :1] for logits in drawn(5, 1.0))
    p, q = base[0].softmax(-1), (base + expert - anti)[0].softmax(-1)
    margin = float(q.max() - p.max() / 2)
    n, generator = 200_000, torch.Generator().manual_seed(0)
    first, second = (torch.multinomial(each, n, replacement=True, generator=generator) for each in (p, q))
    drawn_twice = torch.where(p[first] >= q.max() - margin, first, second).bincount(minlength=50) / n
    mixed = mix(base[None], [(expert[None], anti[None])], torch.ones(1, 1), gate=Gate("bet", margin))[0, 0].softmax(-1)
    assert 0.1 < float(p[p < q.max() - margin].sum()) < 0.9  # both happen
    assert float((mixed - drawn_twice).abs().sum()) / 2 < 0.01  # of two true distributions it is about 0.1


@pytest.mark.parametrize("gate", [Gate("unsure", 1e-6), Gate("entropy", 100.0)])
def test_a_closed_gate_is_the_base_to_the_last_bit(gate):
    base, expert, anti = drawn(1)
    expert[..., 4] = -torch.inf  # what the expert excludes comes back
    assert torch.equal(mix(base, [(expert, anti)], torch.ones(1, 1), gate=gate), base)


@pytest.mark.parametrize("gate", [Gate("unsure", 1.0), Gate("entropy", 1e-9), Gate("kl", 1e6), Gate("warmup", 1)])
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
        moved = gated(*gate, base, whole[at], at)
        moved = (moved - moved.mean()) - (base - base.mean())
        share = float(moved.norm() / (added - added.mean()).norm())
        if gate[0] == "bet":
            p = base.softmax(-1)
            share = float(p[p < whole[at].softmax(-1).max() - gate[1]].sum())
        assert token.opened == pytest.approx(share, abs=2e-3)
        assert not token.flips
        assert token.to_json()["opened"] == pytest.approx(token.opened, abs=1e-6)
    openings = [token.opened for token in out.traces[0]]
    assert min(openings) < 1.0
    assert max(openings) > 0.0


# -- experts that wait --------------------------------------------------------------------------------------------
@pytest.fixture
def passes(model, monkeypatch):
    """How many columns each pass of the experts' lanes reads."""
    seen = []
    for lane in model.lanes[1:]:
        monkeypatch.setattr(lane, "forward", partial(counted, lane.forward, seen))
    return seen


def counted(forward, seen, ids, **inputs):
    seen.append(ids.shape[1])
    return forward(ids, **inputs)


def test_experts_read_only_where_the_gate_is_open(model, passes):
    """And make up for the columns before in one pass: 12 tokens, of which 3 to 5 and 9 to 11 are the base's."""
    new_tokens(model, ROWS[:1], max_new_tokens=12, gate="cycle=3", speculate=False)
    one_lane = [5, 1, 1, 4, 1, 1]
    assert passes == [each for each in one_lane for _ in model.lanes[1:]]


def test_experts_do_not_read_once_a_schedule_is_over(model, passes):
    tokens = new_tokens(model, ROWS, max_new_tokens=30, gate="decay=2", speculate=False)
    assert len(passes) == 2 * len(model.lanes[1:])
    assert tokens == new_tokens(model, ROWS, max_new_tokens=30, gate="decay=2", speculate=False, num_beams=1, seed=None)


@pytest.mark.parametrize("gate", [("unsure", 0.12), ("entropy", 4.2)], ids=str)
def test_a_gate_that_the_base_closes_saves_passes(model, passes, gate):
    new_tokens(model, ROWS[:1], max_new_tokens=12, gate=dict([gate]), speculate=False)
    assert 2 * len(model.lanes[1:]) <= len(passes) < 12 * len(model.lanes[1:])
    assert sum(passes) <= (len(ROWS[0]) + 11) * len(model.lanes[1:])  # no column is read twice


def test_a_cache_that_outlives_the_call_is_whole(model):
    ids = torch.tensor(ROWS[:1])
    options = {"gate": "decay=1", "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, return_dict_in_generate=True, speculate=False, **options)
    more = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    again = model.generate(out.sequences, past_key_values=out.past_key_values, **more)
    assert torch.equal(again, model.generate(out.sequences, **more))


@settings(max_examples=15, deadline=None)
@given(
    gate=st.sampled_from([*GATES, ("cycle", 1), ("decay", 2)]),
    speculate=st.sampled_from(["auto", False, 1, 2, 4]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    sample=st.booleans(),
)
def test_any_batch_and_drafts_under_any_gate(oracle, model, gate, speculate, lengths, seed, sample):
    """Greedy: the plain loop's tokens. Sampled with a seed: those of each row alone without drafts."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[1, *torch.randint(5, 300, (n,), generator=generator).tolist()] for n in lengths]
    options = {"gate": dict([gate]), "max_new_tokens": 9}
    if sample:
        seeds = [seed + at for at in range(len(rows))]
        tokens = new_tokens(model, rows, speculate=speculate, do_sample=True, top_k=0, seed=seeds, **options)
        for row, own, its_seed in zip(rows, tokens, seeds):
            alone = {"speculate": False, "do_sample": True, "top_k": 0, "seed": [its_seed]}
            assert own == new_tokens(model, [row], **alone, **options)[0]
        return
    plain = Oracle(oracle.base, oracle.experts, gate=gate)
    for row, own in zip(rows, new_tokens(model, rows, speculate=speculate, **options)):
        assert_same_tokens(own, plain.greedy(row, 9))


def test_beams_take_a_schedule(oracle, model):
    plain = Oracle(oracle.base, oracle.experts, gate=("decay", 3))
    out = model.generate(
        torch.tensor(ROWS[:1]),
        num_beams=2,
        max_new_tokens=5,
        gate="decay=3",
        do_sample=False,
        eos_token_id=None,
        length_penalty=1.0,
    )
    assert out[0, len(ROWS[0]) :].tolist() == plain.beams(ROWS[0], 5, 2)[0][1]


# -- between two texts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "texts", "inside"),
    [
        ("", ("<a>", "</a>"), False),
        ("so <a>", ("<a>", "</a>"), True),
        ("so <a>4</a", ("<a>", "</a>"), True),
        ("so <a>4</a> and", ("<a>", "</a>"), False),
        ("<a>4</a> and <a>", ("<a>", "</a>"), True),
        ("", ("", "####"), True),
        ("so it is ####", ("", "####"), False),
        ("so it is #### 4 ####", ("", "####"), False),
        ("so", ("####", ""), False),
        ("#### 4 #### ", ("####", ""), True),
        ('a "b', ('"', '"'), True),
        ('a "b" c', ('"', '"'), False),
        ('a "b" c "', ('"', '"'), True),
    ],
)
def test_between_two_texts(written, texts, inside):
    assert between(written, *texts) is inside
    assert oracle_inside(written, *texts) is inside


@pytest.fixture(scope="module")
def texts(oracle):
    """The tiny models with a tokenizer, whose unsteered answer has the gate's two texts in it."""
    return tiny.compose(oracle, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("speculate", [False, 3, "auto"])
def test_steering_between_two_texts(oracle, texts, speculate):
    tokenizer = tiny.tokenizer()
    alone = [tokenizer.decode([token]) for token in new_tokens(texts, ROWS[:1], max_new_tokens=16, alpha=0)[0]]
    start = next(text for text in alone[2:] if text.strip())
    for gate in [(start, ""), ("", start), (start, alone[-1])]:
        plain = Oracle(oracle.base, oracle.experts, gate=("between", gate), tokenizer=tokenizer)
        tokens = new_tokens(texts, ROWS, max_new_tokens=16, gate={"between": gate}, speculate=speculate)
        for row, own in zip(ROWS, tokens):
            assert_same_tokens(own, plain.greedy(row, 16))


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
        ("bet=1", "at least 0 and below 1, not 1.0"),
        ("warmup=0", "a whole number of tokens, 1 or more, not 0.0"),
        ({"cycle": 1.5}, "a whole number of tokens, 1 or more, not 1.5"),
        ("between=<a>", "two texts"),
        ("between=...", "two texts"),
        ({"between": ["<a>", 3]}, "two texts"),
    ],
)
def test_bad_gates_are_refused(model, said, message):
    with pytest.raises(RecipeError, match=message):
        gate_of(said)
    with pytest.raises(RecipeError, match=message):
        model.generate(torch.tensor(ROWS[:1]), gate=said, max_new_tokens=1)
    with pytest.raises(RecipeError, match=message):
        ProxyTuneConfig(base="./b", experts=[{"expert": "./e", "anti_expert": "./a"}], gate=said)


def test_where_a_schedule_does_not_fit(model):
    ids = torch.tensor(ROWS[:1])
    with pytest.raises(PromptError, match="say `prompt_length`"):
        model(ids, gate="decay=4")
    with pytest.raises(ProxyTuneError, match="needs a tokenizer"):
        model.generate(ids, gate="between=a...b", max_new_tokens=2)
    with pytest.raises(RecipeError, match="is for greedy decoding and sampling"):
        model.generate(ids, gate="between=a...b", max_new_tokens=4, num_beams=2)


def test_a_forward_with_a_schedule(oracle, model):
    plain = Oracle(oracle.base, oracle.experts, gate=("warmup", 4))
    row = [*ROWS[0], 30, 31, 32]
    logits = model(torch.tensor([row]), gate="warmup=4", prompt_length=len(ROWS[0]), logits_to_keep=4).logits[0]
    torch.testing.assert_close(logits, plain.logits(ROWS[0], row[len(ROWS[0]) :]), atol=1e-4, rtol=1e-4)


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
