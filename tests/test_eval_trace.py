"""`proxytune eval --trace`: the traces of the mixture's answers, in step with the predictions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from proxytune.decoding.trace import Candidate, TokenTrace
from support.commands import fails, run
from support.evaldata import write_data
from support.oracle import Oracle
from support.traced import hold

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

from proxytune import load_recipe
from proxytune.errors import PromptError, ProxyTuneError
from proxytune.evaluation.answering import Log, answer_jobs
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.run import evaluate, sweep
from proxytune.recipe.options import LoadingOptions

pytestmark = pytest.mark.usefixtures("no_progress")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def record(token):
    """A trace's token as the record that it was written of."""
    fields = {name: value for name, value in token.items() if name != "token"}
    candidates = [Candidate(**{k: v for k, v in each.items() if k != "token"}) for each in token["candidates"]]
    return TokenTrace(**{**fields, "candidates": tuple(candidates)})


def options_of(local, **more):
    return EvaluationOptions(("triviaqa",), arms=("proxy_tuned",), data=str(local), trace=True, **{"limit": 3, **more})


@pytest.mark.parametrize("speculate", [False, 2])
def test_the_traces_of_a_run_are_the_plain_loops(shelf, local, tokenizer, tmp_path, speculate):
    out, loading = tmp_path / "out", LoadingOptions(speculate=speculate)
    evaluate(load_recipe(shelf / "recipe"), options_of(local, alpha=0.5), out, loading=loading)
    models = SimpleNamespace(**{n: AutoModelForCausalLM.from_pretrained(shelf / n) for n in ("base", "expert", "anti")})
    oracle = Oracle(models.base, [("expert", models.expert, models.anti, 0.5)])
    predictions = lines_of(out / "triviaqa" / "proxy_tuned.jsonl")
    traces = lines_of(out / "triviaqa" / "proxy_tuned.trace.jsonl")
    assert list(traces[0]) == ["schema", "id", "sample", "prompt", "text", "alpha", "tokens"]
    assert len(traces) == 3
    for trace, line in zip(traces, predictions, strict=True):
        assert (trace["schema"], trace["alpha"]) == ("proxytune.trace/1", {"expert": 0.5})
        assert [trace[name] for name in ("id", "sample", "prompt")] == [
            line[name] for name in ("id", "sample", "prompt")
        ]
        assert trace["text"].split("\n\n")[0] == line["output"]
        assert tokenizer.decode([t["id"] for t in trace["tokens"]], skip_special_tokens=True) == trace["text"]
        assert all(token["token"] == tokenizer.decode([token["id"]]) for token in trace["tokens"])
        hold(oracle, tokenizer(trace["prompt"])["input_ids"], [record(token) for token in trace["tokens"]])


def test_each_arm_has_traces_of_its_own_mixture(shelf, local, tokenizer, tmp_path):
    """A model alone is its own base; a mean is base + w (expert - base), which the trace's numbers are of."""
    arms = ("base", "expert", "mean_logits", "weighted_mean", "tuned")
    more = {"arms": arms, "trace": True, "tuned": str(shelf / "anti"), "mean_weight": 3.0}
    evaluate(
        load_recipe(shelf / "recipe"), EvaluationOptions(("triviaqa",), data=str(local), limit=2, **more), tmp_path
    )
    base, expert, anti = (AutoModelForCausalLM.from_pretrained(shelf / name) for name in ("base", "expert", "anti"))
    oracles = {
        "base": Oracle(base),
        "expert": Oracle(expert),
        "tuned": Oracle(anti),
        "mean_logits": Oracle(base, [("expert", expert, base, 0.5)]),
        "weighted_mean": Oracle(base, [("expert", expert, base, 0.75)]),
    }
    for arm, oracle in oracles.items():
        traces = lines_of(tmp_path / "triviaqa" / f"{arm}.trace.jsonl")
        assert [trace["alpha"] for trace in traces] == [{name: alpha for name, _, _, alpha in oracle.experts}] * 2
        for trace in traces:
            hold(oracle, tokenizer(trace["prompt"])["input_ids"], [record(token) for token in trace["tokens"]])
    files = [tmp_path / "triviaqa" / f"{arm}.trace.jsonl" for arm in arms]
    found = json.loads(run("analyze", *files, "--json").stdout)
    assert list(found["files"]) == [str(file) for file in files]
    assert found["files"][str(files[0])]["shift"]["mean"] == 0.0
    assert found["answers"] == 4, "those of the means"


@pytest.mark.slow
def test_tracing_decides_no_prediction(shelf, local, tmp_path):
    """Not of a sampling task either, whose samples have traces of their own."""
    settings = {"tasks": ("humaneval",), "samples": 2}
    found = {}
    for trace in (False, True):
        out = tmp_path / str(trace)
        options = EvaluationOptions(arms=("base", "proxy_tuned"), data=str(local), limit=2, trace=trace, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("proxytune.evaluation.run.task_results", lambda *_, **__: {"arms": {}, "samples": 2})
            patch.setattr("proxytune.evaluation.run.results_tables", lambda results: [])
            evaluate(load_recipe(shelf / "recipe"), options, out)
        lines = lines_of(out / "humaneval" / "proxy_tuned.jsonl")
        found[trace] = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
        assert (out / "humaneval" / "proxy_tuned.trace.jsonl").exists() == trace
        assert (out / "humaneval" / "base.trace.jsonl").exists() == trace
    assert found[False] == found[True]
    traces = lines_of(tmp_path / "True" / "humaneval" / "proxy_tuned.trace.jsonl")
    assert {(trace["id"], trace["sample"]) for trace in traces} == {
        (line["task_id"] if "task_id" in line else line["id"], line["sample"]) for line in found[True]
    }
    assert len(traces) == 4


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_killed_run_has_each_trace_once(shelf, local, tmp_path, monkeypatch):
    """It ends between the traces of a batch and its predictions; what goes on is the same as what was never killed."""
    config, options = load_recipe(shelf / "recipe"), options_of(local, limit=6, batch_size=2)
    evaluate(config, options, tmp_path / "whole")
    append = Log.append

    def dying(log, lines):
        if len(log.made) >= 2:
            raise Killed
        append(log, lines)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", dying)
        with pytest.raises(Killed):
            evaluate(config, options, out)
    file, predictions = (out / "triviaqa" / f"proxy_tuned.{end}" for end in ("trace.jsonl", "jsonl"))
    assert (len(lines_of(file)), len(lines_of(predictions))) == (4, 2)
    with file.open("a") as torn:
        torn.write('{"schema": "proxytune.tr')
    evaluate(config, options, out)
    whole = lines_of(tmp_path / "whole" / "triviaqa" / "proxy_tuned.trace.jsonl")
    assert [(line["id"], line["text"]) for line in lines_of(file)] == [(line["id"], line["text"]) for line in whole]
    assert [line["id"] for line in lines_of(predictions)] == [line["id"] for line in whole]
    before = file.read_bytes()
    evaluate(config, options, out)
    assert file.read_bytes() == before


def test_traces_without_a_prediction_fix_no_settings(shelf, local, tmp_path, monkeypatch):
    """They are thrown away when the run goes on, with whatever settings."""
    config = load_recipe(shelf / "recipe")

    def killed(log, lines):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", killed)
        with pytest.raises(Killed):
            evaluate(config, options_of(local, alpha=2.0), tmp_path)
    evaluate(config, options_of(local, alpha=0.5), tmp_path)
    traces = lines_of(tmp_path / "triviaqa" / "proxy_tuned.trace.jsonl")
    assert [trace["alpha"] for trace in traces] == [{"expert": 0.5}] * 3


def test_what_has_no_trace_is_refused(shelf, local, tmp_path, monkeypatch):
    words = ("eval", shelf / "recipe", "--data", local, "--limit", 2, "--output", tmp_path / "out")
    scored = fails(*words, "--tasks", "triviaqa,truthfulqa_mc1", "--trace")
    assert "truthfulqa_mc1 scores given continuations; leave truthfulqa_mc1 or --trace out" in scored
    assert not (tmp_path / "out").exists()
    run(*words, "--tasks", "triviaqa", "--arms", "proxy_tuned")
    monkeypatch.setattr("proxytune.evaluation.run.answer_jobs", None)
    said = fails(*words, "--tasks", "triviaqa", "--arms", "proxy_tuned", "--trace")
    assert "proxy_tuned.jsonl has the prediction of example" in said
    assert "has no trace of it; remove the predictions, choose another --output, or leave --trace out" in said
    with pytest.raises(ProxyTuneError, match="a sweep writes no traces"):
        sweep(load_recipe(shelf / "recipe"), options_of(local), [1.0], tmp_path / "sweep")


def test_a_foreign_trace_file_is_left_as_it_is(shelf, local, tmp_path):
    file = tmp_path / "triviaqa" / "proxy_tuned.trace.jsonl"
    file.parent.mkdir()
    file.write_text('{"mine": 1}\n')
    with pytest.raises(ProxyTuneError, match=r"line 1 of .*trace\.jsonl is not a trace of this command"):
        evaluate(load_recipe(shelf / "recipe"), options_of(local), tmp_path)
    assert file.read_text() == '{"mine": 1}\n'


def test_an_arm_that_cannot_answer_leaves_whole_traces(shelf, local, tmp_path, monkeypatch):
    config, options = load_recipe(shelf / "recipe"), options_of(local, batch_size=1)

    def failing(*args, **more):
        batches = answer_jobs(*args, **more)
        yield next(batches)
        raise PromptError("too long")

    with monkeypatch.context() as patch:
        patch.setattr("proxytune.evaluation.run.answer_jobs", failing)
        with pytest.raises(ProxyTuneError, match="too long"):
            evaluate(config, options, tmp_path)
    evaluate(config, options, tmp_path)
    assert len(lines_of(tmp_path / "triviaqa" / "proxy_tuned.trace.jsonl")) == 3
