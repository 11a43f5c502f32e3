"""What ``proxytune check`` says, compared with the models that are then really loaded."""

from __future__ import annotations

import json

import pytest
import torch

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM, load_recipe
from proxytune.recipe.check import check_recipe
from proxytune.recipe.members import Loading
from support import tiny


def recipe(shelf, tmp_path, **values):
    """A recipe in a directory of its own, whose members are the shelf's."""
    config = ProxyTuneConfig(
        **{
            "base": str(shelf / "base"),
            "experts": [{"expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti")}],
            **values,
        }
    )
    config.name_or_path = str(tmp_path)
    return config


def test_a_recipe_that_works(shelf):
    report = check_recipe(load_recipe(shelf / "recipe"))
    assert report.works
    assert not report.problems
    assert [one.name for one in report.members] == ["base", "expert.expert", "expert.anti_expert"]
    assert report.context == tiny.CONTEXT
    assert report.shared_vocab == tiny.VOCAB
    json.dumps(report.to_json())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bytes_are_those_of_the_loaded_models(tmp_path, family, dtype):
    base = tiny.write_model(tmp_path / "base", family, "base", 1)
    expert = tiny.write_model(tmp_path / "expert", family, "small", 2)
    config = ProxyTuneConfig(base=str(base), experts=[{"expert": str(expert), "anti_expert": str(expert)}])
    report = check_recipe(config, Loading(dtype=dtype))
    assert report.works, report.problems
    model = ProxyTunedForCausalLM.from_members(
        base=str(base), expert=str(expert), anti_expert=str(expert), **({"dtype": dtype} if dtype else {})
    )
    assert report.weight_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    cache = model(torch.tensor([[1, 40, 41, 42]])).past_key_values
    held = sum(t.numel() * t.itemsize for layer in cache.layers for t in (layer.keys, layer.values))
    assert report.kv_bytes_per_token == held / 4
    assert report.members[2].shares_with == "expert.expert"
    assert report.members[0].sliding_window == (tiny.WINDOW if family in ("gemma3", "mistral") else None)


def test_an_adapter_shares_its_weights(shelf, tmp_path):
    anti, adapter = str(shelf / "anti"), str(shelf / "adapter")
    experts = [{"expert": {"model": anti, "adapter": adapter}, "anti_expert": anti}]
    config = recipe(shelf, tmp_path, experts=experts)
    report = check_recipe(config)
    assert report.works, report.problems
    expert, anti_expert = report.members[1:]
    assert anti_expert.shares_with == "expert.expert"
    assert anti_expert.weight_bytes == 0
    assert anti_expert.kv_bytes_per_token == expert.kv_bytes_per_token  # rows of their own
    model = ProxyTunedForCausalLM._load(config, {}, None, {}, {})
    assert report.weight_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    assert expert.parameters > anti_expert.parameters


def test_an_adapter_that_cannot_share_is_reported(shelf, tmp_path):
    dora = tiny.write_adapter(tmp_path / "dora", shelf / "anti", use_dora=True)
    experts = [
        {"expert": {"model": str(shelf / "anti"), "adapter": str(dora)}, "anti_expert": str(shelf / "anti")},
    ]
    report = check_recipe(recipe(shelf, tmp_path, experts=experts))
    assert report.works, report.problems
    assert report.members[2].shares_with is None
    assert any("weights of its own, because it sets use_dora" in note for note in report.notes)


def test_a_missing_member_is_reported_and_the_others_counted(shelf, tmp_path):
    report = check_recipe(recipe(shelf, tmp_path, experts=[{"expert": "./gone", "anti_expert": str(shelf / "anti")}]))
    assert not report.works
    assert "./gone" in report.problems[0]
    assert [one.name for one in report.members] == ["base", "expert.anti_expert"]


def test_a_mismatch_names_the_ids(shelf, tmp_path):
    other = tiny.write_model(tmp_path / "other", "qwen2", "small", 2, tokenizer_=tiny.tokenizer(swap=("a", "b")))
    report = check_recipe(recipe(shelf, tmp_path, experts=[{"expert": str(other), "anti_expert": str(shelf / "anti")}]))
    assert not report.works
    assert "does not share the base's vocabulary (2 ids differ)" in report.problems[0]


def test_notes(shelf, tmp_path):
    wide = tiny.write_model(tmp_path / "wide", "qwen2", "small", 2, tokenizer_=None, vocab_size=tiny.VOCAB + 16)
    report = check_recipe(recipe(shelf, tmp_path, experts=[{"expert": str(wide), "anti_expert": str(shelf / "anti")}]))
    assert report.works is None, report.problems
    assert any("expert.expert has 16 ids" in note for note in report.notes)
    assert any("expert.expert" in what and "no tokenizer" in what for what in report.unchecked)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{{ raise_exception('no system role') }}", "no system role")],
)
def test_a_prompt_that_cannot_be_made(shelf, tmp_path, template, message):
    plain = tiny.write_model(tmp_path / "plain", "qwen2", "small", 2, tokenizer_=tiny.tokenizer(chat_template=template))
    experts = [{"expert": {"model": str(plain), "prompt": "chat"}, "anti_expert": str(shelf / "anti")}]
    report = check_recipe(recipe(shelf, tmp_path, experts=experts))
    assert not report.works
    assert message in report.problems[0]


def test_a_directory_without_weights(shelf, tmp_path):
    bare = tmp_path / "bare"
    tiny.model("qwen2", "small").config.save_pretrained(bare)
    report = check_recipe(recipe(shelf, tmp_path, experts=[{"expert": str(bare)}]))
    assert not report.works
    assert "has no weights" in report.problems[0]


def test_quantized_weights_are_counted_by_their_bits(shelf, tmp_path):
    base = {"model": str(shelf / "base"), "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    report = check_recipe(recipe(shelf, tmp_path, base=base))
    plain = check_recipe(recipe(shelf, tmp_path))
    assert report.members[0].weight_bytes < plain.members[0].weight_bytes
    assert any("quantized to 4 bits" in note for note in report.notes)
