"""Every adapter that PEFT has: exactly what PEFT's own model says, not merged, or refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from proxytune import MemberError, ProxyTunedForCausalLM
from proxytune.adapters import judge
from proxytune.check import check_recipe
from proxytune.recipe import load_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

IDS = torch.tensor([[1, 40, 77, 102, 9, 33, 250, 61], [1, 88, 15, 7, 300, 41, 12, 5]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def write(directory, weights, config):
    """Write a random adapter of any type for the model in ``weights``."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(weights), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(directory)
    return directory


def recipe_of(directory, weights, adapter, anti=None):
    """A recipe whose expert is ``adapter`` on ``weights``."""
    expert = {
        "expert": {"model": str(weights), "adapter": str(adapter)},
        "anti_expert": {"model": str(anti or weights)},
        "alpha": 1.0,
    }
    return tiny.write_recipe_alone(directory, {"base": {"model": str(weights.parent / "base")}, "experts": [expert]})


REFUSED = {
    "prompt tuning": (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "its type is PROMPT_TUNING"),
    "prefix tuning": (PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "its type is PREFIX_TUNING"),
    "activated": (
        LoraConfig(alora_invocation_tokens=[9], target_modules=TARGETS, task_type="CAUSAL_LM"),
        "it acts behind its invocation tokens alone",
    ),
    "layers repeated": (
        LoraConfig(layer_replication=[[0, 2], [1, 2]], target_modules=TARGETS, task_type="CAUSAL_LM"),
        "it repeats layers",
    ),
    "random at each load": (
        LoraConfig(init_lora_weights="pissa_niter_4", target_modules=TARGETS, task_type="CAUSAL_LM"),
        "it sets init_lora_weights='pissa_niter_4'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused_by_check_and_at_loading_and_in_memory(tmp_path, shelf, kind):
    config, reason = REFUSED[kind]
    adapter = write(tmp_path / "adapter", shelf / "anti", config)
    for anti in ("anti", "expert"):  # whether it would share weights or have its own
        recipe = recipe_of(tmp_path / "recipe", shelf / "anti", adapter, shelf / anti)
        report = check_recipe(load_recipe(recipe))
        assert any(reason in problem for problem in report.problems), report.problems
        with pytest.raises(MemberError, match=f"^the adapter of expert.expert cannot be used, because {reason}"):
            ProxyTunedForCausalLM.from_pretrained(recipe)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shelf / "anti"), adapter)
    with pytest.raises(MemberError, match=reason):
        ProxyTunedForCausalLM.from_members(tiny.llama("base", 1), model, tiny.qwen2("small", 3))


def test_an_option_that_peft_does_not_know_is_refused(tmp_path, shelf):
    """PEFT drops it with a warning, and would apply the adapter without it."""
    adapter = write(tmp_path / "adapter", shelf / "anti", LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_next_year": True, "unused_next_year": None}))
    recipe = recipe_of(tmp_path / "recipe", shelf / "anti", adapter)
    assert "it sets use_next_year, which PEFT" in check_recipe(load_recipe(recipe)).problems[0]
    with pytest.raises(MemberError, match="it sets use_next_year, which PEFT"):
        ProxyTunedForCausalLM.from_pretrained(recipe)


def test_options_and_types_that_were_not_looked_at_are_refused():
    assert judge(LoraConfig(target_modules=TARGETS)).merges
    assert judge(LoraConfig(use_qalora=True)).refused == "it sets use_qalora, which was not verified"
