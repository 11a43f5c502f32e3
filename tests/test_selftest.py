"""``proxytune check --run``: right recipes pass every trial, and each kind of fault fails one."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from proxytune import ProxyTunedForCausalLM
from proxytune.answers.selftest import run_trials
from proxytune.cli import app
from proxytune.lanes.transformers import TransformersLane
from support import tiny
from support.oracle import Oracle

ALPHA_ZERO, PLAIN, UNCACHED, DRAFTED, BATCHED = range(5)


@pytest.fixture
def model():
    small = tiny.qwen2("small", 3)
    return tiny.compose(Oracle(tiny.llama("base", 1), [("e", tiny.qwen2("small", 2), small, 1.0)]))


def outcomes(model):
    return [trial.passed for trial in run_trials(model)]


def test_a_right_recipe_passes_every_trial_and_is_left_as_it_was(model):
    model.generation_config.repetition_penalty = 3.0  # no trial is about that
    trials = list(run_trials(model))
    assert [trial.passed for trial in trials] == [True] * 5, trials
    assert model.generation_config.repetition_penalty == 3.0
    assert "drafts at a time" in trials[DRAFTED].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_prompts_adapters_and_half_precision(tmp_path, tokenizer, dtype):
    anti = tiny.write_model(tmp_path / "anti", "llama", "small", 2)
    adapter = tiny.write_adapter(tmp_path / "adapter", anti, 3)
    expert = {"model": str(anti), "adapter": str(adapter), "prompt": "Q: {prompt} A:"}
    model = ProxyTunedForCausalLM.from_members(
        str(tiny.write_model(tmp_path / "base", "llama", "base", 1)),
        experts=[{"expert": expert, "anti_expert": str(anti), "alpha": 0.7}],
        dtype=dtype,
    )
    assert outcomes(model) == [True] * 5


def test_a_recipe_of_one_model_has_no_drafts_to_try(tokenizer):
    base = tiny.llama("small", 1)
    experts = [{"name": "e", "expert": base, "expert_prompt": "Q: {prompt}"}]
    trials = list(run_trials(ProxyTunedForCausalLM.from_members(base, experts=experts, tokenizer=tokenizer)))
    assert [trial.passed for trial in trials] == [True, True, True, None, True]
    assert "no member with weights of its own" in trials[DRAFTED].detail


def test_a_wrong_mixture_fails(model, monkeypatch):
    mixed = model.mix_lanes
    monkeypatch.setattr(model, "mix_lanes", lambda logits, alpha, *how: mixed(logits, alpha * 0.5, *how))
    assert outcomes(model) == [True, False, True, True, True]
    monkeypatch.setattr(model, "mix_lanes", lambda logits, alpha, *how: mixed(logits, alpha + 0.5, *how))
    assert outcomes(model)[ALPHA_ZERO] is False


def test_a_cache_that_forgets_fails(model, monkeypatch):
    read = TransformersLane.forward

    def forgetful(self, input_ids, **inputs):
        if inputs.get("past_key_values") is not None:
            inputs["position_ids"] = torch.zeros_like(inputs["position_ids"])
        return read(self, input_ids, **inputs)

    monkeypatch.setattr(TransformersLane, "forward", forgetful)
    assert outcomes(model)[UNCACHED] is False


def test_what_a_trial_raises_is_its_outcome(model, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: 1 / 0)
    trials = list(run_trials(model))
    assert [trial.passed for trial in trials] == [False] * 5
    assert "ZeroDivisionError" in trials[PLAIN].detail


@pytest.mark.slow
def test_the_command_tells_each_trial_and_fails_with_one(tmp_path, monkeypatch):
    recipe = str(tiny.write_recipe(tmp_path / "recipe"))
    told = CliRunner().invoke(app, ["check", recipe, "--run"])
    assert told.exit_code == 0, told.output
    assert told.output.count("ok ") == 5
    told = CliRunner().invoke(app, ["check", recipe, "--run", "--json"])
    report = json.loads(told.stdout)
    assert [trial["passed"] for trial in report["trials"]] == [True] * 5
    monkeypatch.setattr(ProxyTunedForCausalLM, "alpha_rows", lambda self, alpha, n: torch.tensor([[0.5]]))
    told = CliRunner().invoke(app, ["check", recipe, "--run"])
    assert told.exit_code == 2
    assert "failed" in told.output
