"""`proxytune eval --engine vllm` before an engine starts: what is refused, and what arms read. It needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from proxytune.evaluation.options import EvaluationOptions, engine_options
from proxytune.vllm import installed_version
from support import tiny
from support.commands import fails
from support.evaldata import write_data

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'proxytune[eval]'")

from proxytune import load_recipe
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.engine import EngineArms
from proxytune.evaluation.manifest import manifest_of, write_manifest
from proxytune.evaluation.run import Part, Tally, load_plans, unreadable
from proxytune.recipe.options import LoadingOptions


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trace"], "--trace needs --engine transformers; leave one of the two out"),
        (["--pack"], "--pack needs --engine transformers"),
        (["--device-map", "cpu"], "--device-map needs --engine transformers"),
        (["--speculate", "4"], "--speculate needs --engine transformers"),
        (["--trust-remote-code"], "--trust-remote-code needs --engine transformers"),
        (["--dtype", "float64"], "--dtype float64 is not one of vLLM's"),
        (["--way", "pull"], "--way"),
        (["--steering-vector", "FILE"], "the arm steering_vector needs --engine transformers"),
        (["--engine-option", "tensor_parallel_size"], "--engine-option is NAME=VALUE"),
        (["--engine-option", "dtype=float32"], "--engine-option cannot give dtype; use --dtype"),
        (["--engine-option", "quantization=fp8"], "--engine-option cannot give quantization; leave it out"),
        (["--engine-option", "max_model_len=abc"], "max_model_len must be a whole number of tokens, not 'abc'"),
        (["--engine-option", "max_model_len=-1"], "max_model_len must be a whole number of tokens, not -1"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_vllm_cannot_do_is_refused_before_anything_is_made(shelf, local, tmp_path, words, said):
    given = [{"FILE": __file__}.get(word, word) for word in words]
    words = ["eval", shelf / "recipe", "--data", local, "--limit", 1, "--engine", "vllm", "--output", tmp_path / "out"]
    words += [] if "--tasks" in given else ["--tasks", "triviaqa"]
    assert said in fails(*words, *given)
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(shelf, local, tmp_path):
    words = ["--tasks", "triviaqa", "--data", local, "--output", tmp_path / "out"]
    assert "is for vLLM; give --engine vllm too" in fails("eval", shelf / "recipe", *words, "--engine-option", "a=1")
    assert "--fit needs --engine transformers" in fails("sweep", shelf / "recipe", *words, "--engine", "vllm", "--fit")
    gguf = {"base": {"model": "m.gguf"}, "experts": [{"expert": {"model": str(shelf / "expert")}}]}
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    recipe = tiny.write_recipe_alone(tmp_path / "gguf", gguf)
    assert "base is a GGUF file, which vLLM does not read" in fails("eval", recipe, *words, "--engine", "vllm")
    api = {
        "base": {"api": "http://127.0.0.1:9/v1", "model": "m", "tokenizer": str(shelf / "base")},
        **{"experts": gguf["experts"]},
    }
    recipe = tiny.write_recipe_alone(tmp_path / "api", api)
    assert "they are behind an API" in fails("eval", recipe, *words, "--arms", "base", "--engine", "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(installed_version() is not None, reason="vLLM is installed")
def test_vllm_is_missing(shelf, local, tmp_path):
    words = ["--tasks", "triviaqa", "--data", local, "--output", tmp_path / "out", "--engine", "vllm"]
    assert "--engine vllm needs vllm: pip install 'proxytune[vllm]'" in fails("eval", shelf / "recipe", *words)
    assert not (tmp_path / "out").exists()


def test_options_are_json_or_text():
    given = [
        "tensor_parallel_size=4",
        "enforce_eager=true",
        'speculative_config={"method": "ngram"}',
        "tokenizer_mode=slow",
    ]
    assert engine_options(given) == {
        "tensor_parallel_size": 4,
        "enforce_eager": True,
        "speculative_config": {"method": "ngram"},
        "tokenizer_mode": "slow",
    }


def test_the_engine_decides_predictions(shelf, local, tmp_path):
    """A run that was started before there was a choice is one of transformers."""
    config, settings = load_recipe(shelf / "recipe"), EvaluationOptions(("triviaqa",), data=str(local), limit=1)
    plans, loading = load_plans(settings), LoadingOptions()
    manifest = manifest_of(config, settings, loading, plans, {"arms": ["base"]})
    assert manifest["decides"]["engine"] == "transformers"
    del manifest["decides"]["engine"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "triviaqa").mkdir()
    (tmp_path / "triviaqa" / "base.jsonl").write_text('{"id": "0", "sample": 0, "seconds": 1}\n')
    write_manifest(tmp_path, manifest_of(config, settings, loading, plans, {"arms": ["base"]}))
    other = manifest_of(config, replace(settings, engine="vllm"), loading, plans, {"arms": ["base"]})
    with pytest.raises(ProxyTuneError, match='engine "transformers", now "vllm"'):
        write_manifest(tmp_path, other)


def test_every_member_reads_the_prompt_and_has_room_for_the_answer(shelf, local, tmp_path):
    """A member alone is limited by all members' contexts; one more place is for the token that is written."""
    tiny.write_model(tmp_path / "long", "llama", "base", 1, max_position_embeddings=1024)
    values = {
        "base": {"model": str(tmp_path / "long")},
        "experts": [
            {
                "expert": {"model": str(shelf / "expert"), "prompt": "chat"},
                "anti_expert": {"model": str(shelf / "anti")},
            }
        ],
    }
    config = load_recipe(tiny.write_recipe_alone(tmp_path / "recipe", values))
    (plan,) = load_plans(EvaluationOptions(("triviaqa",), data=str(local), limit=1))
    arms = EngineArms(config, (), LoadingOptions(), options={})
    for name in ("base", "expert", "proxy_tuned", "mean_logits"):
        reader = arms.reader(name)
        assert reader.contexts == {"base": 1023, "expert.expert": 255, "expert.anti_expert": 255}
        encoded = reader.encode(plan, "the quick brown fox")
        assert encoded.room == 255 - max(len(encoded.ids), *map(len, encoded.own.values()), 0) + 1
    brief = EngineArms(config, (), LoadingOptions(), options={"max_model_len": 100})
    assert set(brief.reader("base").contexts.values()) == {99}
    # A scored text is read whole, and one place is left for a token after it.
    long = "the quick brown fox jumps over the lazy dog " * 40
    (pair,) = arms.reader("base").encode_pairs(plan, long, [" dog"])
    assert pair.cut > 0
    assert len(pair.context.ids) + len(pair.continuation) == 255


def test_a_generation_config_that_was_not_tried_leaves_the_arm_out(shelf, local, tmp_path):
    values = {"base": {"model": str(shelf / "base")}, "experts": [{"expert": {"model": str(shelf / "expert")}}]}
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", values)
    (recipe / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "no_repeat_ngram_size": 3}))
    arms = EngineArms(load_recipe(recipe), (), LoadingOptions(), options={})
    with pytest.raises(ProxyTuneError, match="asks for no_repeat_ngram_size=3, which was not tried with vLLM"):
        arms.reader("proxy_tuned")
    arms.reader("expert")


def test_a_task_that_vllm_cannot_score_is_left_out_of_the_arms_that_it_concerns(shelf, local, tmp_path):
    """Members with prompts of their own, or a gate that is a schedule; the other task keeps all its arms."""
    long = str(tiny.write_model(tmp_path / "long", "llama", "base", 1, max_position_embeddings=1024))
    chat = {"expert": {"model": long, "prompt": "chat"}}
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", {"base": {"model": long}, "experts": [chat]})
    plans = load_plans(EvaluationOptions(("triviaqa", "truthfulqa_mc1"), data=str(local), limit=1))
    names = ("base", "expert", "mean_logits", "proxy_tuned")
    parts = [Part(name, plan, [tmp_path / plan.name / f"{name}.jsonl"]) for name in names for plan in plans]

    def left_out(config):
        arms, told = EngineArms(config, (), LoadingOptions(), options={}), []
        found = unreadable(arms, [replace(part) for part in parts], Tally(lambda *_: None, parts), told.append)
        assert [f"{one['arm']} will be left out of {one['task']}: {one['reason']}" for one in found] == told
        return {(one["arm"], one["task"]): one["reason"] for one in found}

    why = "truthfulqa_mc1 scores given continuations, which needs --engine transformers"
    assert left_out(load_recipe(recipe)) == {
        (arm, "truthfulqa_mc1"): f"{why} where members of {arm} read prompts of their own" for arm in names[2:]
    }
    gated = load_recipe(shelf / "recipe").with_mixing(None, "warmup=3")
    assert left_out(gated) == {("proxy_tuned", "truthfulqa_mc1"): f"{why} with the gate warmup"}
