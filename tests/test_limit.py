"""What steering can reach: gold answers against the plain loop's logits, at every strength."""

from __future__ import annotations

import json
import math

import pytest
import torch

from proxytune import Prompt, ProxyTunedForCausalLM
from proxytune.analysis.limit import best_factor, limit, limit_tables, reach, summary
from proxytune.analysis.references import Reference, read_references
from proxytune.answers.options import Sampling
from support import tiny
from support.commands import fails, run
from support.oracle import Oracle
from support.own_prompts import TEMPLATE, template_ids

pytestmark = pytest.mark.usefixtures("no_progress")

SHOWN = {"chat": False, "system": None, "negative_prompt": None}
GOLD = [("the fox", " jumps over the dog"), ("Question: how many", " apples"), ("the lazy", " and the")]


@pytest.fixture(scope="module")
def oracle(trio):
    return Oracle(trio.base, [("expert", trio.expert, trio.anti_expert, 0.8)])


@pytest.fixture(scope="module")
def model(oracle, tokenizer):
    return tiny.compose(oracle, tokenizer=tokenizer)


# -- the lines ------------------------------------------------------------------------------------------------
def test_reach_by_hand():
    """Three tokens: the lines 2 - s, 1 and 0 + s; from 1 on the second could only tie, which it does at 1."""
    base, added = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[-1.0, 0.0, 1.0]])
    found = [tuple(end.item() for end in reach(base, added, torch.tensor([gold]))) for gold in range(3)]
    assert found == [(0.0, 1.0), (1.0, 1.0), (1.0, math.inf)]
    low, high = reach(torch.tensor([[2.0, 0.9, 0.0]]), added, torch.tensor([1]))
    assert low > high


def test_reach_where_something_is_excluded():
    inf = torch.inf
    gold = torch.tensor([0])
    assert [end.item() for end in reach(torch.tensor([[1.0, 0.0]]), torch.tensor([[-inf, 0.0]]), gold)] == [0.0, 0.0]
    low, high = reach(torch.tensor([[0.0, 1.0]]), torch.tensor([[-inf, 0.0]]), gold)
    assert low > high, "every strength excludes it, and at 0 another is first"
    low, high = reach(torch.tensor([[-inf, 1.0]]), torch.tensor([[5.0, 0.0]]), gold)
    assert low > high, "the base excludes it"
    low, high = reach(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -inf]]), gold)
    assert (low.item(), high.item()) == (0.0, inf), "every strength above 0 excludes its only rival"


@pytest.mark.parametrize("seed", range(4))
def test_reach_is_what_trying_every_strength_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    base, added = torch.randn(40, 12, generator=generator), torch.randn(40, 12, generator=generator)
    gold = torch.randint(0, 12, (40,), generator=generator)
    low, high = reach(base, added, gold)
    tried = torch.cat([torch.linspace(0, 20, 4001), torch.tensor([1e6])])
    chosen = torch.stack([(base + s * added).argmax(dim=-1) == gold for s in tried], dim=1)
    assert 0 < (low <= high).sum() < 40
    for row in range(40):
        within = (tried >= low[row] + 1e-3) & (tried <= high[row] - 1e-3)
        outside = (tried < low[row] - 1e-3) | (tried > high[row] + 1e-3)
        assert chosen[row][within].all()
        assert not chosen[row][outside].any()


def test_the_best_factor_is_that_of_a_grid():
    generator = torch.Generator().manual_seed(1)
    base, added = torch.randn(20, 9, generator=generator), torch.randn(20, 9, generator=generator)
    gold = torch.randint(0, 9, (20,), generator=generator)
    best = best_factor(base, added, gold)
    tried = torch.linspace(0, 64, 6401)
    log_p = torch.stack([(base + s * added).log_softmax(dim=-1)[range(20), gold] for s in tried])
    for row, found in enumerate(best.tolist()):
        if math.isinf(found):
            assert log_p[-1, row] == log_p[:, row].max()
        else:
            assert found == pytest.approx(tried[log_p[:, row].argmax()].item(), abs=0.011)
    assert {math.isinf(each) for each in best.tolist()} == {True, False}
    assert 0.0 in best.tolist()


# -- gold answers ---------------------------------------------------------------------------------------------
def test_gold_answers_are_those_of_the_plain_loop(model, oracle, tokenizer):
    references = [Reference(prompt, (gold,)) for prompt, gold in GOLD]
    found = list(limit(model, tokenizer, references, (0.8,), shown=SHOWN))
    tried = torch.cat([torch.linspace(0, 12, 2401), torch.tensor([1e5])])
    for (prompt, gold), one in zip(GOLD, found):
        ids = tokenizer(gold, add_special_tokens=False).input_ids
        assert [token.id for token in one.tokens] == ids
        logits = oracle.member_logits(tokenizer(prompt).input_ids, ids)
        for at, token in enumerate(one.tokens):
            base = logits["base"][at].log_softmax(dim=-1)
            added = 0.8 * (logits["expert.expert"][at] - logits["expert.anti_expert"][at])
            assert token.base_logprob == pytest.approx(base[token.id].item(), abs=1e-3)
            assert token.base_rank == 1 + int((base > base[token.id]).sum())
            assert token.needed == pytest.approx((base.max() - base[token.id]).item(), abs=1e-3)
            first = base.argmax()
            assert token.given == pytest.approx((added[token.id] - added[first]).item(), abs=1e-3)
            assert token.at_recipe_alpha == ((base + added).argmax() == token.id)
            chosen = [bool((base + s * added).argmax() == token.id) for s in tried]
            if token.reachable is None:
                assert not any(chosen)
            else:
                low, high = token.reachable
                assert [s for s, each in zip(tried.tolist(), chosen) if each] == pytest.approx(
                    [s for s in tried.tolist() if low <= s <= high], abs=0.006
                )
    told = summary(found)
    tokens = [token for one in found for token in one.tokens]
    assert told["n_tokens"] == len(tokens)
    assert told["reachable"]["at_recipe_alpha"]["tokens"] == sum(t.at_recipe_alpha for t in tokens) / len(tokens)
    assert told["reachable"]["at_some_alpha"]["tokens"] == sum(t.reachable is not None for t in tokens) / len(tokens)
    assert told["pass_at_k"] is None


@pytest.mark.parametrize("rule", ["mean", "union", "intersection"])
def test_other_rules_at_every_strength(trio, tokenizer, rule):
    """The reach of each gold token holds the factors, of all alphas together, at which the plain loop chooses it."""
    pairs = [("a", trio.expert, trio.anti_expert, 0.8), ("b", trio.anti_expert, trio.base, 0.5)]
    plain = Oracle(trio.base, pairs, rule=rule)
    experts = [{"name": n, "expert": e, "anti_expert": a, "alpha": alpha} for n, e, a, alpha in pairs]
    two = ProxyTunedForCausalLM.from_members(trio.base, experts=experts, combine=rule, tokenizer=tokenizer)
    prompt, text = GOLD[0]
    (answer,) = limit(two, tokenizer, [Reference(prompt, (text,))], [0.8, 0.5], shown=SHOWN)
    ids = [token.id for token in answer.tokens]
    logits = plain.member_logits(tokenizer(prompt)["input_ids"], ids[:-1])
    for s in (0.01, 0.5, 1.0, 3.0, 20.0):
        chosen = plain.mix(logits, [0.8 * s, 0.5 * s]).argmax(dim=-1).tolist()
        for token, other in zip(answer.tokens, chosen):
            low, high = token.reachable or (math.inf, -math.inf)
            if min(abs(s - low), abs(s - high)) > 1e-3:
                assert (low <= s <= high) == (token.id == other)


def test_what_the_mixture_writes_is_within_reach(model, oracle, tokenizer):
    prompt = tokenizer("the fox").input_ids
    for factor, at_recipe in ((1.0, True), (2.5, False), (0.0, False)):
        ids = oracle.greedy(prompt, 8, [0.8 * factor])[0]
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False).input_ids != ids:
            continue
        one = next(limit(model, tokenizer, [Reference("the fox", (text,))], (0.8,), shown=SHOWN))
        assert one.share(True) == 1
        assert one.first_unreachable() is None
        assert all(low - 1e-3 <= factor <= high + 1e-3 for low, high in (token.reachable for token in one.tokens))
        assert (one.share(False) == 1) == at_recipe


def test_of_several_wordings_the_best_counts(model, tokenizer):
    alone = [next(limit(model, tokenizer, [Reference(*each)], (0.8,), shown=SHOWN)) for each in (
        ("the fox", (" jumps over the dog",)), ("the fox", (" apples and dogs",)))]  # fmt: skip
    both = next(
        limit(
            model, tokenizer, [Reference("the fox", (" jumps over the dog", " apples and dogs"))], (0.8,), shown=SHOWN
        )
    )
    assert both == max(alone, key=lambda one: (one.share(True), one.share(False)))


def test_members_with_prompts_of_their_own(oracle, tokenizer):
    expert = {"name": "e", "expert": oracle.experts[0][1], "anti_expert": oracle.experts[0][2], "alpha": 0.8}
    expert |= {"expert_prompt": TEMPLATE, "anti_expert_prompt": Prompt()}
    model = type(tiny.compose(oracle)).from_members(oracle.base, experts=[expert], tokenizer=tokenizer)
    one = next(limit(model, tokenizer, [Reference("the fox", (" jumps",))], (0.8,), shown=SHOWN))
    ids = tokenizer(" jumps", add_special_tokens=False).input_ids
    raw = tokenizer("the fox").input_ids
    prompts = {"base": raw, "expert.expert": template_ids("the fox", tokenizer), "expert.anti_expert": raw}
    logits = oracle.logits(prompts, ids, [0.8])
    assert [token.at_recipe_alpha for token in one.tokens] == [
        bool(logits[at].argmax() == id_) for at, id_ in enumerate(ids)
    ]


def test_samples_of_the_base_pass_where_they_begin_with_the_gold_text(model, tokenizer):
    from proxytune import generate

    gold = generate(model, "the fox", alpha=0.0, max_new_tokens=1)
    cold = Sampling(temperature=1e-4)
    references = [Reference("the fox", (gold,)), Reference("the fox", ("nothing like it",))]
    found = list(limit(model, tokenizer, references, (0.8,), shown=SHOWN, samples=2, sampling=cold))
    assert [one.passed for one in found] == [True, False]
    assert summary(found, 2)["pass_at_k"] == {"k": 2, "share": 0.5}


# -- the command ----------------------------------------------------------------------------------------------
def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command(shelf, tmp_path):
    rows = [{"prompt": prompt, "completion": gold} for prompt, gold in GOLD]
    file = write(tmp_path / "gold.jsonl", rows)
    told = json.loads(run("limit", shelf / "recipe", "--input", file, "--json").stdout)
    assert set(told) == {"n_answers", "n_tokens", "reachable", "pass_at_k", "answers"}
    assert set(told["reachable"]) == {"at_recipe_alpha", "at_some_alpha"}
    first = told["answers"][0]
    assert (first["first_unreachable"] is None) == first["at_some_alpha"]
    shown = run("limit", shelf / "recipe", "-i", file, "--samples", "2", "--alpha", "0.5").stdout
    assert "one of 2 samples of the base" in shown
    assert "This is a bound for exactly these tokens" in shown
    broken = run("limit", shelf / "recipe", "-i", write(file, [*rows, {"prompt": "x"}]), status=2)
    assert 'line 4: its "completion" is missing' in broken.stderr
    assert "at the recipe's alpha" in broken.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give the gold answers with --input FILE"),
        (["-i", "EMPTY"], "holds no gold answers"),
        (["-i", "GOLD", "--temperature", "0"], "--temperature must be above 0"),
        (["-i", "none.jsonl"], "none.jsonl"),
    ],
)
def test_the_command_says_what_is_wrong(shelf, tmp_path, args, message):
    files = {"EMPTY": write(tmp_path / "e.jsonl", []), "GOLD": write(tmp_path / "g.jsonl", [{"prompt": "a"}])}
    assert message in fails("limit", shelf / "recipe", *[files.get(arg, arg) for arg in args])


def test_references_are_read_and_broken_ones_named():
    lines = [b'{"prompt": "a", "completion": ["b", "c"]}\n', b"[1]\n", b'{"prompt": " ", "completion": "b"}\n', b"{\n"]
    references, broken = read_references(lines)
    assert references == [Reference("a", ("b", "c"), "line 1")]
    assert [each.partition(":")[0] for each in broken] == ["line 2", "line 3", "line 4"]


def test_tables_name_where_the_base_breaks(model, tokenizer):
    found = summary(list(limit(model, tokenizer, [Reference("the fox", (" zzz qqq",))], (0.8,), shown=SHOWN)))
    tables = limit_tables(found)
    assert [table.title for table in tables] == ["limit", "no alpha reaches"]
