"""`proxytune eval` and `sweep` of a base behind an API: their answers, marks and budgets, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from proxytune import ProxyTuneError
from support import tiny
from support.commands import fails, run
from support.completions import Served, serving
from support.decoding import near
from support.evaldata import QUESTIONS, write_data
from support.oracle import Oracle

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

from proxytune import load_recipe
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.run import evaluate, sweep
from proxytune.recipe.options import LoadingOptions

pytestmark = pytest.mark.usefixtures("no_progress")
N_NEW = 20  # of a TriviaQA answer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the data, the tokenizer, the experts, and a base whose weights only tests use."""
    where = tmp_path_factory.mktemp("api")
    base = tiny.llama("base", 1)
    for name, model in (("base", base), ("expert", near(base, 2)), ("anti", near(base, 3))):
        model.save_pretrained(where / name)
        tiny.tokenizer().save_pretrained(where / name)
    write_data(where)
    return where


@pytest.fixture(scope="module")
def oracle(place):
    load = {name: tiny.LlamaForCausalLM.from_pretrained(place / name) for name in ("base", "expert", "anti")}
    return Oracle(load["base"], [("expert", load["expert"], load["anti"], 1.0)])


@pytest.fixture
def served(oracle):
    made = Served(oracle.base, tiny.tokenizer())
    with serving(made):
        yield made


@pytest.fixture
def recipe(place, served, tmp_path):
    """From the number of log-probabilities to a recipe made by the command."""

    def make(n=20):
        where = ["--base-api", served.url, "--base-model", "tiny", "--base-tokenizer", place / "base"]
        members = ["--expert", place / "expert", "--anti-expert", place / "anti"]
        run("new", tmp_path / f"recipe{n}", *where, "--base-top-logprobs", n, *members)
        return tmp_path / f"recipe{n}"

    return make


def options(place, task="triviaqa", **more):
    return EvaluationOptions((task,), data=str(place), **{"limit": 3, **more})


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def expected(oracle, line):
    """The answer of the plain loop to a TriviaQA question."""
    tokenizer = tiny.tokenizer()
    prompt = tokenizer(f"Question: {QUESTIONS[int(line['id'])]}\nAnswer:")["input_ids"]
    tokens, _ = oracle.greedy(prompt, N_NEW, eos=tiny.EOS)
    return tokenizer.decode(tokens, skip_special_tokens=True).split("\n\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ask", "verify", "push"])
def test_every_arm_that_is_possible_answers_as_the_plain_loop(recipe, place, served, oracle, tmp_path, way):
    notes = []
    found = evaluate(
        load_recipe(recipe()), options(place), tmp_path / "out", loading=LoadingOptions(way=way), note=notes.append
    )
    assert found["left_out"] == []
    assert any(note.startswith("no mean_logits: ") for note in notes)
    arms = found["tasks"]["triviaqa"]["arms"]
    assert list(arms) == ["base", "anti_expert", "expert", "proxy_tuned"]
    _, expert, anti, _ = oracle.experts[0]
    alone = {"base": oracle.base, "expert": expert, "anti_expert": anti}
    for arm, of in {"proxy_tuned": oracle, **{name: Oracle(model) for name, model in alone.items()}}.items():
        lines = lines_of(tmp_path / "out" / "triviaqa" / f"{arm}.jsonl")
        assert [line["output"] for line in lines] == [expected(of, line) for line in lines], arm
        if arm in ("base", "proxy_tuned"):
            assert all(all(line["certified"]) for line in lines)
            assert arms[arm]["certified"] == 1
            assert arms[arm]["calls"] == sum(line["calls"] for line in lines) > 0
            assert {line["way"] for line in lines} == {"pull" if arm == "base" else way}
        else:
            assert "calls" not in arms[arm]
            assert not any("certified" in line for line in lines)
    counted = sum(of.get("calls", 0) for of in arms.values())
    assert counted <= len(served.requests) <= counted + 20  # and a few to find out what the server offers
    table = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert "certain" in table
    assert "100.0 %" in table


def test_the_base_alone_needs_no_experts(recipe, place, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr("proxytune.lanes.loading.load_model", None)  # loads no weights
    found = evaluate(load_recipe(recipe()), options(place, arms=("base",)), tmp_path / "out")
    assert found["left_out"] == []
    lines = lines_of(tmp_path / "out" / "triviaqa" / "base.jsonl")
    assert [line["output"] for line in lines] == [expected(Oracle(oracle.base), line) for line in lines]


@pytest.mark.parametrize("where", ["api", "local"])
def test_realtimeqa_with_one_token(recipe, place, served, oracle, tmp_path, where):
    """The paper's black box: the best of the base's top five after steering, in one request per question."""
    members = ["--base", place / "base", "--expert", place / "expert", "--anti-expert", place / "anti"]
    made = recipe(5) if where == "api" else tmp_path / "local"
    if where == "local":
        run("new", made, *members)
    command = ["eval", made, "--tasks", "realtimeqa_one_token", "--data", place, "--arms", "base,expert,proxy_tuned"]
    command += ["--way", "pull"] if where == "api" else []
    found = json.loads(run(*command, "--output", tmp_path / "out", "--json").stdout)
    arms = found["tasks"]["realtimeqa_one_token"]["arms"]
    assert list(arms) == ["base", "expert", "proxy_tuned"]
    tokenizer, n_unsure = tiny.tokenizer(), 0
    for line in lines_of(tmp_path / "out" / "realtimeqa_one_token" / "proxy_tuned.jsonl"):
        logits = oracle.member_logits(tokenizer(line["prompt"])["input_ids"], [])
        mixed = oracle.logits(tokenizer(line["prompt"])["input_ids"], [])[-1]
        five = logits["base"][-1].topk(5 if where == "api" else tiny.VOCAB).indices
        token = int(five[mixed[five].argmax()])
        assert line["mc_output"] == tokenizer.decode([token], skip_special_tokens=True)
        if where == "api":
            assert len(line["certified"]) == 1
            assert not line["certified"][0] or token == int(mixed.argmax())
            n_unsure += not line["certified"][0]
    if where == "api":
        assert n_unsure > 0
        assert len(served.requests) <= 20 + 2 * len(QUESTIONS) + 2  # what the server offers; each question by two arms


@pytest.mark.slow
def test_a_spent_budget_ends_the_run_and_the_same_command_continues(recipe, place, served, tmp_path):
    made = recipe()
    command = ["eval", made, "--tasks", "triviaqa", "--data", place, "--limit", 3, "--batch-size", 1, "--way", "pull"]
    command += ["--arms", "expert,base,proxy_tuned", "--output", tmp_path / "out"]
    whole = run(*command[:-1], tmp_path / "whole", "--max-calls", 500, "--json")
    n_whole = len(served.requests)
    ended, n_runs = 0, 0
    while True:
        served.requests.clear()
        n_runs += 1
        status = 3 if n_runs < 3 else 0
        result = run(*command, "--max-calls", 60 if status else 500, "--json", status=status)
        if not status:
            break
        assert len(served.requests) <= 60
        assert "the budget of 60 requests (--max-calls) is spent" in result.stderr
        assert "the same command continues from there" in result.stderr
        assert (tmp_path / "out" / "triviaqa" / "expert.jsonl").exists()
        now = sum(len(lines_of(path)) for path in (tmp_path / "out" / "triviaqa").glob("*.jsonl"))
        assert now > ended
        ended = now
    assert len(served.requests) < n_whole
    again, before = (json.loads(each.stdout)["tasks"]["triviaqa"] for each in (result, whole))
    assert {name: of["metrics"] for name, of in again["arms"].items()} == {
        name: of["metrics"] for name, of in before["arms"].items()
    }
    assert again["arms"]["proxy_tuned"]["calls"] == before["arms"]["proxy_tuned"]["calls"]
    message = fails(*["ask" if word == "pull" else word for word in command])
    assert 'way "pull", now "ask"' in message


def test_tokens_have_a_budget_too(recipe, place, tmp_path):
    command = ["eval", recipe(), "--tasks", "triviaqa", "--data", place, "--limit", 3, "--arms", "proxy_tuned"]
    result = run(*command, "--output", tmp_path / "out", "--max-tokens", 2000, status=3)
    assert "the budget of 2000 tokens (--max-tokens) is spent" in result.stderr
    assert "continues from there" in result.stderr


@pytest.mark.parametrize(
    ("task", "more", "loading", "said"),
    [
        ("truthfulqa_mc1", {}, {}, "truthfulqa_mc1, which scores given continuations, needs the base's probabilities"),
        ("humaneval", {}, {}, "humaneval, which is sampled, needs the base's probabilities of all 384 tokens"),
        ("triviaqa", {"trace": True}, {}, "--trace needs the base's probabilities of all 384 tokens, .* asked for 20"),
        ("triviaqa", {"arms": ("mean_logits",)}, {}, "needs the base's weights .*; leave the arm mean_logits out"),
        ("triviaqa", {"mean_weight": 2.0}, {}, "needs the base's weights .*; leave the arm weighted_mean out"),
        ("triviaqa", {"steering_vector": __file__}, {}, "base's weights .*; leave the arm steering_vector out"),
        ("triviaqa", {"trace": True}, {"way": "push"}, "--trace .*with --way push its server chooses alone"),
    ],
)
def test_what_needs_more_is_refused_before_anything_is_asked(
    recipe, place, served, tmp_path, task, more, loading, said
):
    made = load_recipe(recipe())
    with pytest.raises(ProxyTuneError, match=said) as caught:
        evaluate(made, options(place, task, **more), tmp_path / "out", loading=LoadingOptions(**loading))
    assert "\n" not in str(caught.value)
    assert served.requests == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(ProxyTuneError, match="--fit needs the base's probabilities of all 384 tokens"):
        sweep(made, options(place), [0.0, 1.0], tmp_path / "sweep", fit=True)
    with pytest.raises(ProxyTuneError, match="there is no way 'guess'"):
        LoadingOptions(way="guess")
    made.plausibility = 0.1
    with pytest.raises(ProxyTuneError, match="plausibility needs the base's probabilities, and with --way push"):
        sweep(made, options(place), [0.0], tmp_path / "sweep", loading=LoadingOptions(way="push"))
    with pytest.raises(ProxyTuneError, match="a sweep never drafts"):
        sweep(made, options(place), [0.0], tmp_path / "sweep", loading=LoadingOptions(way="verify"))


def test_options_of_an_api_are_refused_without_one(shelf, place, tmp_path):
    for flag, value in (("--way", "ask"), ("--max-calls", 5)):
        command = ["eval", shelf / "recipe", "--tasks", "triviaqa", "--data", place, "--arms", "base", flag, value]
        assert f"{flag} is for a base behind an API" in fails(*command, "--output", tmp_path / "out")


@pytest.mark.slow
def test_a_server_that_names_all_tokens_scores_continuations(recipe, place, oracle, tmp_path):
    """And samples, and traces: as the same recipe with the base on this machine does."""
    members = ["--base", place / "base", "--expert", place / "expert", "--anti-expert", place / "anti"]
    run("new", tmp_path / "local", *members)
    recipes = {"api": load_recipe(recipe(tiny.VOCAB)), "local": load_recipe(tmp_path / "local")}
    arms = ("base", "proxy_tuned")
    for name, config in recipes.items():
        one = evaluate(config, options(place, "truthfulqa_mc1", arms=arms), tmp_path / name / "scored")
        two = evaluate(config, options(place, trace=True, arms=arms), tmp_path / name / "traced")
        assert one["left_out"] == two["left_out"] == []
    for arm in arms:
        api, local = (lines_of(tmp_path / name / "scored" / "truthfulqa_mc1" / f"{arm}.jsonl") for name in recipes)
        for line, other in zip(api, local, strict=True):
            torch.testing.assert_close(line["loglikelihoods"], other["loglikelihoods"], atol=1e-3, rtol=0)
        api, local = (lines_of(tmp_path / name / "traced" / "triviaqa" / f"{arm}.trace.jsonl") for name in recipes)
        for line, other in zip(api, local, strict=True):
            assert line["text"] == other["text"]
            assert all(token["certified"] for token in line["tokens"])
            assert not any("certified" in token for token in other["tokens"])
            for token, same in zip(line["tokens"], other["tokens"], strict=True):
                assert token["base_logprob"] == pytest.approx(same["base_logprob"], abs=1e-3)


@pytest.mark.slow
def test_a_sweep_asks_for_each_alpha(recipe, place, oracle, tmp_path):
    found = sweep(
        load_recipe(recipe()), options(place), [0.0, 1.0], tmp_path / "out", loading=LoadingOptions(way="ask")
    )
    assert found["left_out"] == []
    for point, of in zip(found["tasks"]["triviaqa"]["points"], (Oracle(oracle.base), oracle)):
        lines = lines_of(tmp_path / "out" / "triviaqa" / f"alpha={point['alpha']:g}.jsonl")
        assert [line["output"] for line in lines] == [expected(of, line) for line in lines]
        assert point["certified"] == 1
        assert point["calls"] == sum(line["calls"] for line in lines) > 0


@pytest.mark.slow
def test_a_sweep_finds_alpha_if_the_server_names_all_tokens(recipe, place, tmp_path):
    members = ["--base", place / "base", "--expert", place / "expert", "--anti-expert", place / "anti"]
    run("new", tmp_path / "local", *members)
    api, local = (
        sweep(load_recipe(at), options(place, "demo_math", limit=1), [0.0], tmp_path / f"out{n}", fit=True)
        for n, at in enumerate((recipe(tiny.VOCAB), tmp_path / "local"))
    )
    assert api["left_out"] == []
    one, other = (found["tasks"]["demo_math"]["fit"] for found in (api, local))
    assert one["tokens"] == other["tokens"]
    assert one["best"] == pytest.approx(other["best"], abs=0.1)
    assert one["gain"] == pytest.approx(other["gain"], abs=1e-3)


@pytest.mark.slow
def test_a_sweep_has_a_budget(recipe, place, tmp_path):
    command = ["sweep", recipe(), "--tasks", "triviaqa", "--data", place, "--limit", 3, "--alpha", "0,1", "-b", 2]
    command += ["--output", tmp_path / "out"]
    result = run(*command, "--max-calls", 100, status=3)
    assert "is spent" in result.stderr
    n_kept = len(lines_of(tmp_path / "out" / "triviaqa" / "alpha=0.jsonl"))
    assert 0 < n_kept < 3
    run(*command)
    assert len(lines_of(tmp_path / "out" / "triviaqa" / "alpha=1.jsonl")) == 3
