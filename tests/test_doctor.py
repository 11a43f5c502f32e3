"""Whether a pair pays off: every number against the plain loop, the verdicts, the gate, and a run that goes on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from scipy import spatial, special
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM

from proxytune import Prompt
from proxytune.analysis.doctor import Doctor, begins_with, number_at, summarize, verdict
from proxytune.analysis.references import Reference
from proxytune.evaluation.fit import ALL, GRID, curves, fit
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.store import load_recipe
from support import tiny
from support.commands import fails, run
from support.oracle import Oracle
from support.own_prompts import TEMPLATE, template_ids

pytestmark = pytest.mark.usefixtures("no_progress")

GOLD = [("the fox", " jumps over the dog"), ("Question: how many", " apples"), ("the lazy", " and the")]
REFERENCES = [Reference(prompt, (gold,), f"line {number}") for number, (prompt, gold) in enumerate(GOLD, start=1)]


@pytest.fixture(scope="module")
def models(shelf):
    return SimpleNamespace(**{n: AutoModelForCausalLM.from_pretrained(shelf / n) for n in ("base", "expert", "anti")})


@pytest.fixture(scope="module")
def sick(shelf):
    return Doctor(load_recipe(shelf / "recipe"), LoadingOptions(), (0.8,), REFERENCES, shots=2)


@pytest.fixture(scope="module")
def lines(sick):
    return [line for batch in sick.measure(range(len(REFERENCES))) for line in batch]


def gold_logprob(logits, ids):
    return float(logits[: len(ids)].log_softmax(dim=-1)[range(len(ids)), ids].sum())


# -- alpha ----------------------------------------------------------------------------------------------------
def test_the_best_alpha_is_where_the_likelihood_is_highest(models, tokenizer):
    """Two experts: along both together, and along each with the other as it is."""
    oracle = Oracle(models.base, [("a", models.expert, models.anti, 1.0), ("b", models.base, models.anti, 0.5)])
    ids = tokenizer(" jumps over the dog").input_ids
    found, exact = [], {ALL: [], "a": [], "b": []}
    for prompt in ("the fox", "the lazy dog", "Question"):
        logits = oracle.member_logits(tokenizer(prompt).input_ids, ids)
        members = (
            logits["base"][None, :-1],
            [(logits[f"{n}.expert"][None, :-1], logits[f"{n}.anti_expert"][None, :-1]) for n in "ab"],
        )
        found.append(curves(members, torch.tensor(ids), ["a", "b"], [1.0, 0.5], plausibility=None, vocab_size=None))
        for name, alphas_of in ((ALL, lambda x: [x, x]), ("a", lambda x: [x, 0.5]), ("b", lambda x: [1.0, x])):
            exact[name].append(
                lambda x, at=logits, to=alphas_of: gold_logprob(
                    oracle.mix({name: each.double() for name, each in at.items()}, to(x)), ids
                )
            )
    for name, of_answers in exact.items():
        for curve, likelihood in zip([each[name] for each in found], of_answers):
            assert curve == pytest.approx([likelihood(alpha) for alpha in GRID], abs=1e-3)
        best = minimize_scalar(lambda x, of=of_answers: -sum(f(x) for f in of), bounds=(0, 3), method="bounded").x
        of_name = fit([each[name] for each in found], 3 * len(ids))
        assert of_name.best == pytest.approx(best, abs=0.01)
        assert 0 <= of_name.low <= of_name.best <= of_name.high <= 3
    assert 0.05 < fit([each["a"] for each in found], 1).best < 2.95, "not at an end, where any rule would find it"


def test_where_a_fit_ends():
    rising, falling, level = ([slope * alpha for alpha in GRID] for slope in (1.0, -1.0, 0.0))
    assert (fit([rising, rising], 2).best, fit([rising], 2).at_end) == (3.0, True)
    assert (fit([falling, falling], 2).best, fit([falling], 2).at_end) == (0.0, False)
    assert (fit([level, level], 2).best, fit([level], 1).low) == (0.0, None)
    assert fit([rising, falling, rising], 30).gain == pytest.approx(0.1)


def test_tokens_that_cannot_be_chosen_are_left_out():
    base = torch.tensor([[[2.0, 0.0, -9.0], [0.0, 1.0, 2.0]]])
    expert = torch.zeros(1, 2, 3)
    gold = torch.tensor([2, 1])
    (curve,) = curves((base, [(expert, None)]), gold, ["e"], [1.0], plausibility=0.1, vocab_size=None).values()
    second = base[0, 1].log_softmax(dim=-1)[1].item()
    assert curve == pytest.approx([second] * len(GRID), abs=1e-5)


# -- an example -----------------------------------------------------------------------------------------------
def test_every_number_is_the_plain_loops(sick, lines, models, tokenizer):
    recipe = Oracle(models.base, [("expert", models.expert, models.anti, 0.8)])
    oracles = {
        "base": Oracle(models.base),
        "expert": Oracle(models.expert),
        "mean_logits": Oracle(models.base, [("expert", models.expert, models.base, 0.5)]),
        "proxy_tuned": recipe,
    }
    assert list(sick.arms) == list(oracles)
    for number, (line, (prompt, gold)) in enumerate(zip(lines, GOLD)):
        ids = tokenizer(gold, add_special_tokens=False).input_ids
        shots = "".join(f"{p}{c}\n\n" for p, c in [GOLD[(number + 1) % 3], GOLD[(number + 2) % 3]])
        prompts = {**dict.fromkeys(oracles, prompt), "base_few_shot": shots + prompt}
        assert set(line["logprob"]) == set(line["correct"]) == set(prompts)
        for arm, text in prompts.items():
            oracle, read = oracles.get(arm, oracles["base"]), tokenizer(text).input_ids
            assert line["logprob"][arm] == pytest.approx(gold_logprob(oracle.logits(read, ids), ids), abs=1e-3)
            written = tokenizer.decode(oracle.greedy(read, 12, eos=tiny.EOS)[0], skip_special_tokens=True)
            assert line["correct"][arm] == begins_with(written, (gold,))
        logits = recipe.member_logits(tokenizer(prompt).input_ids, ids)
        logs = {name: member[:-1].log_softmax(dim=-1) for name, member in logits.items()}
        learned = logs["expert.expert"] - logs["expert.anti_expert"]
        assert line["learned"] == {"expert": pytest.approx(float(learned[range(len(ids)), ids].sum()), abs=1e-3)}
        kl = (logs["base"].exp() * (logs["base"] - logs["expert.anti_expert"])).sum()
        assert line["distance"] == pytest.approx(float(kl), abs=1e-3)
        draft = logits["expert.anti_expert"] + 0.8 * (logits["expert.expert"] - logits["expert.anti_expert"])
        mixed = recipe.mix(logits, [0.8])[:-1, : draft.shape[-1]]
        assert line["agreed"] == int((draft[:-1].argmax(dim=-1) == mixed.argmax(dim=-1)).sum())
        at = {alpha: gold_logprob(recipe.mix(logits, [alpha]), ids) for alpha in (0.0, 0.5, 3.0)}
        assert [line["curves"][ALL][GRID.index(alpha)] for alpha in at] == pytest.approx(list(at.values()), abs=1e-3)


@pytest.fixture(scope="module")
def two_experts(shelf, tmp_path_factory):
    pairs = [
        {"name": "a", "expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti"), "alpha": 0.8},
        {"name": "b", "expert": str(shelf / "base"), "anti_expert": str(shelf / "anti"), "alpha": 0.5},
    ]
    values = {"model_type": "proxytune", "base": str(shelf / "base"), "experts": pairs}
    return tiny.write_recipe_alone(tmp_path_factory.mktemp("two") / "r", values)


def test_conflict_is_that_of_the_definitions(shelf, two_experts, models, tokenizer, tmp_path):
    """Each measure at each gold token, from the plain loop's logits in numpy; the result has their means."""
    oracle = Oracle(models.base, [("a", models.expert, models.anti, 0.8), ("b", models.base, models.anti, 0.5)])
    cosines, distances, disagree = [], [], []
    for prompt, gold in GOLD:
        ids = tokenizer(gold, add_special_tokens=False).input_ids
        logits = oracle.member_logits(tokenizer(prompt).input_ids, ids)
        width = min(each.shape[-1] for each in logits.values())
        logits = {name: each[:-1, :width].double().numpy() for name, each in logits.items()}
        for at in range(len(ids)):
            offsets = [
                alpha * (logits[f"{name}.expert"][at] - logits[f"{name}.anti_expert"][at])
                for name, alpha in (("a", 0.8), ("b", 0.5))
            ]
            p, q = (special.softmax(logits["base"][at] + offset) for offset in offsets)
            cosines.append(1 - spatial.distance.correlation(*offsets))
            distances.append(spatial.distance.jensenshannon(p, q, base=2))
            disagree.append(p.argmax() != q.argmax())
    words = ("doctor", two_experts, "--data", write(tmp_path / "sample.jsonl"), "--output", tmp_path / "out")
    found = json.loads(run(*words, "--json").stdout)["conflict"]
    expected = {"cosine": cosines, "distance": distances, "disagree": disagree}
    assert {name: of["mean"] for name, of in found.items()} == {
        name: pytest.approx(sum(values) / len(values), abs=1e-3) for name, values in expected.items()
    }
    assert 0 < found["disagree"]["mean"] < 1, "a sample that tells choices apart"
    assert all(of["low"] <= of["mean"] <= of["high"] for of in found.values())
    shown = run(*words).stdout
    assert "conflict of the experts: distance of what each steers to" in " ".join(shown.split())


def test_an_expert_that_never_moves_the_base_has_no_cosine(two_experts):
    sick = Doctor(load_recipe(two_experts), LoadingOptions(), (0.8, 0.0), REFERENCES[:1], shots=0)
    ((line,),) = sick.measure([0])
    assert (line["conflict"]["cosine"], line["conflict"]["cosines"]) == (0, 0)
    found = summarize([line], ["a", "b"], [0.8, 0.0], n_examples=1)
    assert found["conflict"]["cosine"] is None
    assert found["conflict"]["distance"]["mean"] > 0


def test_what_the_arms_write_counts_where_it_is_right(shelf, models, tokenizer):
    """Gold answers that one arm writes, so that each is right somewhere and wrong elsewhere."""
    oracles = {"base": Oracle(models.base), "expert": Oracle(models.expert)}
    gold = {arm: tokenizer.decode(of.greedy(tokenizer("the fox").input_ids, 6)[0]) for arm, of in oracles.items()}
    assert gold["base"] != gold["expert"]
    references = [Reference("the fox", (text,)) for text in gold.values()] + [Reference("the fox", (*gold.values(),))]
    sick = Doctor(load_recipe(shelf / "recipe"), LoadingOptions(), (1.0,), references, shots=0)
    (batch,) = sick.measure([0, 1, 2])
    assert [line["correct"]["base"] for line in batch] == [True, False, True]
    assert [line["correct"]["expert"] for line in batch] == [False, True, True]
    assert "base_few_shot" not in batch[0]["correct"]


def test_members_with_prompts_of_their_own(shelf, models, tokenizer, tmp_path):
    values = {
        "base": str(shelf / "base"),
        "experts": [
            {
                "name": "e",
                "expert": {"model": str(shelf / "expert"), "prompt": TEMPLATE.to_json()},
                "anti_expert": str(shelf / "anti"),
            }
        ],
    }
    tiny.write_recipe_alone(tmp_path / "r", {"model_type": "proxytune", **values})
    sick = Doctor(load_recipe(tmp_path / "r"), LoadingOptions(), (0.8,), REFERENCES[:2], shots=1)
    (batch,) = sick.measure([0])
    ids, raw = (tokenizer(text, add_special_tokens=False).input_ids for text in (GOLD[0][1], GOLD[0][0]))
    raw, own = tokenizer(GOLD[0][0]).input_ids, template_ids("the fox", tokenizer)
    mean = Oracle(models.base, [("e", models.expert, models.base, 0.5)])
    steered = Oracle(models.base, [("e", models.expert, models.anti, 0.8)])
    prompts = {"base": raw, "e.expert": own, "e.anti_expert": raw}
    expected = {
        "base": gold_logprob(Oracle(models.base).logits(raw, ids), ids),
        "expert": gold_logprob(Oracle(models.expert).logits(own, ids), ids),
        "mean_logits": gold_logprob(mean.logits(prompts, ids), ids),
        "proxy_tuned": gold_logprob(steered.logits(prompts, ids), ids),
    }
    assert {arm: batch[0]["logprob"][arm] for arm in expected} == pytest.approx(expected, abs=1e-3)
    for arm, of, read in (
        ("expert", Oracle(models.expert), own),
        ("mean_logits", mean, prompts),
        ("proxy_tuned", steered, prompts),
    ):
        written = tokenizer.decode(of.greedy(read, 12, eos=tiny.EOS)[0], skip_special_tokens=True)
        assert batch[0]["correct"][arm] == begins_with(written, (GOLD[0][1],))
    assert Prompt() != TEMPLATE


def test_arms_are_compared_on_what_steering_can_choose(shelf, models, tokenizer, tmp_path):
    """A plausibility mask excludes gold tokens: no arm counts them, and an answer of them alone is left out."""
    pair = {"expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti")}
    recipe = tiny.write_recipe_alone(
        tmp_path / "r",
        {"model_type": "proxytune", "base": str(shelf / "base"), "experts": [pair], "plausibility": 0.3},
    )
    prompt = tokenizer("the fox").input_ids
    base = Oracle(models.base)
    first = base.greedy(prompt, 1)[0]
    worst = int(base.logits(prompt, [])[-1].argmin())
    gold = tokenizer.decode([*first, worst])
    ids = tokenizer(gold, add_special_tokens=False).input_ids
    logits = base.logits(prompt, ids)[:-1].log_softmax(dim=-1)
    kept = [at for at, id_ in enumerate(ids) if logits[at, id_] >= logits[at].max() + torch.tensor(0.3).log()]
    assert 0 < len(kept) < len(ids)
    references = [Reference("the fox", (gold,), "line 1"), Reference("the fox", (tokenizer.decode([worst]),), "line 2")]
    sick = Doctor(load_recipe(recipe), LoadingOptions(), (1.0,), references, shots=0)
    (batch,) = sick.measure([0, 1])
    assert (batch[0]["n_tokens"], batch[0]["excluded"]) == (len(kept), len(ids) - len(kept))
    assert batch[0]["logprob"]["base"] == pytest.approx(float(sum(logits[at, ids[at]] for at in kept)), abs=1e-3)
    assert batch[1] == {"number": 1, "left_out": "line 2: steering excludes every gold token"}
    assert "Infinity" not in json.dumps(batch)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        (" 4 apples", "4", True),
        ("42", "4", False),
        ("4.", " 4", True),
        ("five", "4", False),
        ("", "4", False),
        ("Yes", "Yes", True),
    ],
)
def test_begins_with(text, gold, right):
    assert begins_with(text, ("nothing", gold)) == right


def test_a_template_without_earlier_turns_has_no_few_shot_arm(shelf):
    sick = Doctor(load_recipe(shelf / "recipe"), LoadingOptions(), (1.0,), REFERENCES, chat=True, shots=1)
    whole, last = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
        "{{ messages[-1]['content'] }}",
    )
    read = {}
    for template in (whole, last):
        sick.tokenizer.chat_template = template
        (batch,) = sick.measure([0])
        read[template] = "base_few_shot" in batch[0]["correct"]
    assert read == {whole: True, last: False}


# -- what it says ---------------------------------------------------------------------------------------------
def line_of(number, correct, logprob, *, peak=1.0, learned=1.0):
    """A line of made numbers: 10 gold tokens, a curve that is highest at ``peak``."""
    curve = [-((alpha - peak) ** 2) for alpha in GRID]
    return {
        "number": number,
        "n_tokens": 10,
        "logprob": logprob,
        "correct": correct,
        "curves": {ALL: curve},
        "learned": {"e": learned},
        "distance": 2.0,
        "excluded": 0,
        "agreed": 7,
        "seconds": dict.fromkeys(correct, 0.1),
    }


ARMS = ("base", "expert", "mean_logits", "proxy_tuned")


def said(rights, logprobs=(-10.0, -12.0, -9.0, -8.0), **more):
    """The result of 40 examples, of which each arm has some right (the first ones), or all the same log-probability."""
    lines = [
        line_of(
            number,
            {arm: number < right for arm, right in zip(ARMS, rights)},
            {arm: value + 0.01 * ((number * at) % 3) for at, (arm, value) in enumerate(zip(ARMS, logprobs))},
            **more,
        )
        for number in range(40)
    ]
    return summarize(lines, ["e"], [1.0], n_examples=50, speed=lambda acceptance: 1 + acceptance)


def test_a_pair_that_pays_off():
    found = said((4, 8, 10, 30))
    assert found["metric"] == "correct"
    assert found["arms"]["proxy_tuned"]["correct"]["mean"] == 0.75
    assert found["differences"]["base"]["correct"]["mean"] == pytest.approx(0.65)
    assert found["verdict"].startswith("Steer: it adds +65.0 points of right answers (95 % interval +")
    assert "ahead of the expert alone, the mean of logits too" in found["verdict"]
    assert found["alpha"]["best"] == pytest.approx(1.0)
    assert found["learned"]["e"]["mean"] == pytest.approx(0.1)
    assert found["distance"]["mean"] == pytest.approx(0.2)
    assert found["speed"]["acceptance"]["mean"] == pytest.approx(0.7)
    assert found["speed"]["to_base"] == pytest.approx(1.0)
    assert found["speed"]["predicted_to_base"] == pytest.approx(1.7)


def test_a_pair_whose_anti_expert_adds_nothing():
    assert "the mean of logits does as well" in said((4, 8, 30, 30))["verdict"]
    assert "the anti-expert adds nothing here" in said((4, 8, 30, 30))["verdict"]
    assert "but the expert alone does better: the base adds nothing" in said((4, 39, 10, 20))["verdict"]


def test_a_pair_that_makes_the_base_worse():
    knows = said((30, 8, 20, 10), (-7.0, -20.0, -9.0, -9.5), peak=0.2)["verdict"]
    assert knows.startswith("Do not steer with this pair: it makes the base worse, -50.0 points of right answers")
    assert "the base knows these answers better than the expert (-0.700 against -1.999 nats per token)" in knows
    assert "the most likely alpha is 0.20, interval 0.20 to 0.20" in knows
    unlearned = said((30, 8, 20, 10), learned=-0.5)["verdict"]
    assert "on these answers the expert is no better than its anti-expert" in unlearned
    strong = said((30, 8, 20, 10), (-20.0, -7.0, -9.0, -21.0), peak=0.5)["verdict"]
    assert "its alpha is too large (the most likely alpha is 0.50" in strong


def test_no_clear_effect_and_likelihood_where_nothing_is_right():
    assert said((10, 8, 9, 10))["verdict"].startswith("No clear effect")
    assert "most probable without steering at all" in said((10, 8, 9, 10), peak=0.0)["verdict"]
    found = said((0, 0, 0, 0))
    assert found["metric"] == "logprob"
    assert "nats per gold token" in found["verdict"]
    lines = [line_of(0, dict.fromkeys(ARMS, True), dict.fromkeys(ARMS, -1.0))]
    assert summarize(lines, ["e"], [1.0], n_examples=1)["verdict"].startswith("One example says nothing")


def test_verdicts_are_of_the_result_alone():
    found = said((4, 8, 10, 30))
    assert verdict(json.loads(json.dumps(found))) == found["verdict"]


def test_a_number_by_its_name():
    found = {"arms": {"a.b.expert": {"correct": {"mean": 0.5}}}, "verdict": "Steer"}
    assert number_at(found, "arms.a.b.expert.correct.mean") == 0.5
    for path, message in (
        ("arms.x.correct", "there is no 'arms.x.correct' in the results; at 'x' there is a.b.expert"),
        ("verdict", "'verdict' is not a number"),
        ("verdict.more", "at 'more' there is nothing more"),
    ):
        with pytest.raises(Exception, match=message.replace(".", r"\.")):
            number_at(found, path)


# -- the command ----------------------------------------------------------------------------------------------
def write(path, rows=GOLD):
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": gold}) + "\n" for prompt, gold in rows))
    return path


@pytest.mark.slow
def test_the_command(shelf, tmp_path):
    data, out = write(tmp_path / "sample.jsonl"), tmp_path / "out"
    words = ("doctor", shelf / "recipe", "--data", data, "--output", out, "--shots", "1")
    found = json.loads(run(*words, "--json").stdout)
    assert found == json.loads((out / "doctor.json").read_text())
    assert list(found["arms"]) == ["base", "expert", "mean_logits", "base_few_shot", "proxy_tuned"]
    assert all(of["correct"]["low"] <= of["correct"]["high"] for of in found["arms"].values())
    assert found["alpha"]["recipe"] == {"expert": 1.0}
    assert found["alpha"]["low"] <= found["alpha"]["best"] <= found["alpha"]["high"]
    assert found["conflict"] is None, "there is one expert"
    assert found["verdict"] in (out / "doctor.md").read_text()
    assert {"alpha.png", "alpha.svg"} <= {path.name for path in out.iterdir()}
    before = (out / "examples.jsonl").read_bytes()
    assert found["verdict"] in run(*words).stdout
    assert (out / "examples.jsonl").read_bytes() == before, "nothing is measured twice"
    assert "was made with another alpha; choose another --output" in fails(*words, "--alpha", "0.5")
    failed = run(*words, "--gate", "examples>=3", "--gate", "arms.base.correct.mean>=1.1", status=2)
    assert failed.stderr.endswith("error: --gate: arms.base.correct.mean is 0, which is below 1.1\n")
    assert found["verdict"] in failed.stdout
    run(*words, "--gate", "examples>=3")


@pytest.mark.slow
def test_a_run_continues(shelf, tmp_path, monkeypatch):
    data, out = write(tmp_path / "sample.jsonl", [(f"the fox {n}", " jumps") for n in range(6)]), tmp_path / "out"
    words = ("doctor", shelf / "recipe", "-d", data, "-o", out, "--json")
    monkeypatch.setattr("proxytune.analysis.doctor.BATCH", 2)
    first = run(*words, "--minutes", "1e-9")
    assert "2 of 6 examples in 1e-09 minutes; the same command continues" in first.stderr
    assert json.loads(first.stdout)["examples"] == 2
    whole = json.loads(run(*words).stdout)
    assert (whole["examples"], whole["of"]) == (6, 6)
    again = json.loads(run("doctor", shelf / "recipe", "-d", data, "-o", tmp_path / "other", "--json").stdout)
    for found in (whole, again):
        found.pop("speed")
        found["verdict"] = ""
    assert whole == again


def test_what_cannot_be_read_is_left_out(shelf, tmp_path):
    data = write(tmp_path / "sample.jsonl", [*GOLD, ("word " * 600, " jumps")])
    found = json.loads(run("doctor", shelf / "recipe", "-d", data, "-o", tmp_path / "out", "--json").stdout)
    assert found["examples"] == 3
    assert found["left_out"][0].startswith("line 4: the prompt has ")
    data = write(tmp_path / "none.jsonl", [("word " * 600, " jumps")])
    assert "no example could be measured: line 1: the prompt has" in fails(
        "doctor", shelf / "recipe", "-d", data, "-o", tmp_path / "none"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a sample with gold answers with --data FILE"),
        (["-d", "EMPTY"], "holds no gold answers"),
        (["-d", "NOSUCH"], "No such file"),
        (["-d", "EMPTY", "--gate", "verdict"], "--gate is METRIC>=X"),
        (["-d", "EMPTY", "--gate", "a>=b"], "--gate is METRIC>=X"),
    ],
)
def test_what_is_refused(shelf, tmp_path, args, message):
    (tmp_path / "empty.jsonl").write_text("")
    names = {"EMPTY": tmp_path / "empty.jsonl", "NOSUCH": tmp_path / "nosuch.jsonl"}
    assert message in fails("doctor", shelf / "recipe", *(names.get(arg, arg) for arg in args), "-o", tmp_path / "out")
