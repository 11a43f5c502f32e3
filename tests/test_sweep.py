"""`proxytune sweep`: each alpha's answers are those of a run of its own, from prompts that are read once."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM

from support import tiny
from support.commands import fails, run
from support.evaldata import write_data
from support.oracle import Oracle

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

from proxytune import ProxyTunedForCausalLM, load_recipe
from proxytune.errors import AlphaError
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.run import evaluate, sweep
from proxytune.recipe.alpha import alpha_range
from proxytune.recipe.options import LoadingOptions

ALPHAS = [0.0, 0.5, 1.5]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def lines(path):
    return {
        line["id"]: {key: value for key, value in line.items() if key != "seconds"}
        for line in map(json.loads, path.read_text().splitlines())
    }


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["raw", "chat"])
def test_a_sweep_equals_runs_of_their_own(prompt, shelf, local, tmp_path):
    """Writing and likelihoods; with a prompt of its own, a member reads it once an alpha."""
    values = {
        "base": {"model": str(shelf / "base")},
        "experts": [
            {
                "expert": {"model": str(shelf / "expert"), "prompt": prompt},
                "anti_expert": {"model": str(shelf / "anti")},
            }
        ],
    }
    config = load_recipe(tiny.write_recipe_alone(tmp_path / "recipe", values))
    settings = EvaluationOptions(("realtimeqa", "mbpp_likelihood"), data=str(local), limit=5, batch_size=7)
    results = sweep(config, settings, ALPHAS, tmp_path / "sweep")
    for at, alpha in enumerate(ALPHAS):
        own = replace(settings, arms=("proxy_tuned",), alpha=alpha)
        single = evaluate(config, own, tmp_path / f"own{alpha}", loading=LoadingOptions(speculate=False))
        for task in settings.tasks:
            ours = lines(tmp_path / "sweep" / task / f"alpha={alpha:g}.jsonl")
            theirs = lines(tmp_path / f"own{alpha}" / task / "proxy_tuned.jsonl")
            assert ours.keys() == theirs.keys()
            for name, line in ours.items():
                if "loglikelihoods" in line:
                    expected = pytest.approx(theirs[name]["loglikelihoods"], abs=1e-3)
                    assert line["loglikelihoods"] == expected
                else:
                    assert line == theirs[name]
            point = results["tasks"][task]["points"][at]
            assert point["alpha"] == alpha
            assert point["value"] == pytest.approx(single["tasks"][task]["arms"]["proxy_tuned"]["value"], abs=1e-5)
    different = {json.dumps(list(lines(path).values())) for path in (tmp_path / "sweep" / "realtimeqa").iterdir()}
    assert len(different) == len(ALPHAS)


def test_prompts_are_read_once_for_all_alphas(shelf, local, tmp_path, monkeypatch):
    widths = []
    forward = ProxyTunedForCausalLM.forward

    @functools.wraps(forward)
    def watched(self, input_ids, *args, **kwargs):
        widths.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(ProxyTunedForCausalLM, "forward", watched)
    settings = EvaluationOptions(("realtimeqa",), data=str(local), limit=2, batch_size=6)
    sweep(load_recipe(shelf / "recipe"), settings, ALPHAS, tmp_path)
    (rows, width), rest = widths[0], widths[1:]
    assert rows == 2
    assert width > 10
    assert {shape[1] for shape in rest} == {1}  # the last column, and then a token at a time

    widths.clear()
    sweep(load_recipe(shelf / "recipe"), replace(settings, tasks=("mbpp_likelihood",)), ALPHAS, tmp_path / "l")
    assert [rows for rows, _ in widths] == [2, 2]  # the prompts, and what stands after them: nothing is read thrice


def test_a_sweep_continues_and_takes_more_alphas(shelf, local, tmp_path):
    config = load_recipe(shelf / "recipe")
    settings = EvaluationOptions(("realtimeqa",), data=str(local), batch_size=6)
    whole = sweep(config, settings, ALPHAS, tmp_path / "whole")
    sweep(config, settings, ALPHAS[:1], tmp_path / "parts")
    torn = (tmp_path / "whole" / "realtimeqa" / "alpha=0.5.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "parts" / "realtimeqa" / "alpha=0.5.jsonl").write_bytes(torn[0] + torn[3] + torn[4][:9])
    grown = sweep(config, settings, ALPHAS, tmp_path / "parts")
    for task, of in whole["tasks"].items():
        assert grown["tasks"][task] == of
    for alpha in ALPHAS:
        name = f"realtimeqa/alpha={alpha:g}.jsonl"
        assert lines(tmp_path / "parts" / name) == lines(tmp_path / "whole" / name)
    assert (tmp_path / "parts" / "realtimeqa" / "alpha=0.5.jsonl").read_bytes().startswith(torn[0] + torn[3])
    for name in ("results.json", "results.md", "realtimeqa.png", "realtimeqa.svg"):
        assert (tmp_path / "parts" / name).stat().st_size > 100
    table = (tmp_path / "parts" / "results.md").read_text()
    assert [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("|")][2:] == ["0", "0.5", "1.5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:2:0.25", (None, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])),
        ("0:1:0.1", (None, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])),
        ("1,0,0.5,1", (None, [0, 0.5, 1])),
        ("math=-1:1:1", ("math", [-1, 0, 1])),
        ("0.7", (None, [0.7])),
    ],
)
def test_ranges(text, expected):
    assert alpha_range(text) == expected


@pytest.mark.parametrize("text", ["", "0:2", "0:2:0", "2:0:0.5", "0:1:nan", "a,b", "0:1e9:1", "0:inf:1", "1e40", "nan"])
def test_a_bad_range_is_one_sentence(text):
    with pytest.raises(
        AlphaError, match=r"--alpha (is START:STOP:STEP, such as 0:2:0.25|.* has no alphas: STOP lies before START)"
    ):
        alpha_range(text)


def test_an_expert_that_is_not_there_is_reported(shelf, local, tmp_path):
    with pytest.raises(AlphaError, match="no expert is called 'chat'; the recipe has expert"):
        sweep(
            load_recipe(shelf / "recipe"),
            EvaluationOptions(("realtimeqa",), data=str(local)),
            [1.0],
            tmp_path,
            expert="chat",
        )


# -- the most likely alpha ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_progress")
def test_the_most_likely_alpha_is_the_plain_loops(shelf, local, tokenizer, tmp_path):
    """Of gold answers that are written, and of those among choices; each after the task's own white space."""
    words = ("sweep", shelf / "recipe", "--data", local, "--limit", 3, "--alpha", "0,1", "--fit", "--output", tmp_path)
    shown = run(*words, "--tasks", "triviaqa,truthfulqa_mc1").stdout
    results = json.loads((tmp_path / "results.json").read_text())["tasks"]
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    oracle = Oracle(base, [("expert", expert, anti, 1.0)])
    rows = [json.loads(line) for line in (tmp_path / "triviaqa" / "alpha=1.jsonl").read_text().splitlines()]
    ids = tokenizer(" seven", add_special_tokens=False).input_ids
    n_gold = len(ids)
    logits = [oracle.member_logits(tokenizer(row["prompt"].rstrip()).input_ids, ids) for row in rows]

    def loss(alpha):
        of = [oracle.mix(each, [alpha])[:n_gold].log_softmax(dim=-1)[range(n_gold), ids].sum() for each in logits]
        return -float(sum(of))

    found = results["triviaqa"]["fit"]
    assert found["best"] == pytest.approx(minimize_scalar(loss, bounds=(0, 3), method="bounded").x, abs=0.02)
    assert found["gain"] == pytest.approx((loss(0) - min(loss(n / 10) for n in range(31))) / (3 * n_gold), abs=1e-4)
    assert (found["answers"], found["tokens"]) == (3, 3 * n_gold)
    assert found["low"] <= found["best"] <= found["high"]
    assert results["truthfulqa_mc1"]["fit"]["answers"] == 3
    assert shown.count("The gold answers are most probable at alpha") == 2


@pytest.mark.usefixtures("no_progress")
def test_each_of_several_experts_has_a_most_likely_alpha(shelf, local, tmp_path):
    pair = {"expert": {"model": str(shelf / "expert")}, "anti_expert": {"model": str(shelf / "anti")}}
    other = {"expert": {"model": str(shelf / "base")}, "anti_expert": {"model": str(shelf / "anti")}}
    values = {
        "base": {"model": str(shelf / "base")},
        "experts": [{"name": "a", **pair}, {"name": "b", **other, "alpha": 0.5}],
    }
    config = load_recipe(tiny.write_recipe_alone(tmp_path / "recipe", values))
    settings = EvaluationOptions(("triviaqa",), data=str(local), limit=2)
    whole = sweep(config, settings, [1.0], tmp_path / "all", fit=True)["tasks"]["triviaqa"]["fit"]
    assert list(whole["by_expert"]) == ["a", "b"]
    own = sweep(config, settings, [1.0], tmp_path / "own", expert="b", fit=True)["tasks"]["triviaqa"]["fit"]
    assert own == whole["by_expert"]["b"]
    assert "fit" not in sweep(config, settings, [1.0], tmp_path / "all")["tasks"]["triviaqa"]


@pytest.mark.parametrize("task", ["toxigen", "humaneval"])
def test_what_has_no_gold_answers_is_not_fitted(task, shelf, local, tmp_path):
    words = ("sweep", shelf / "recipe", "--data", local, "--tasks", task, "--fit", "--output", tmp_path / "out")
    assert f"{task} has no gold answers to fit alpha to; leave {task} or --fit out" in fails(*words)
