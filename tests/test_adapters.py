"""Every adapter that PEFT has: exactly what PEFT's own model says, not merged, or refused in one sentence."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from proxytune import Member, MemberError, ProxyTunedForCausalLM, ProxyTuneError, RecipeError
from proxytune.recipe.adapters import OTHER_TYPES, judge
from proxytune.recipe.check import check_recipe
from proxytune.recipe.store import load_recipe
from support import tiny

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
    "not verified": (
        LoraConfig(monteclora_config=MontecloraConfig(), target_modules=TARGETS, task_type="CAUSAL_LM"),
        "it sets monteclora_config, which was not verified",
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


# -- exact ----------------------------------------------------------------------------------------------------
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
OPTIONS = {  # of LoRA: what it is, and whether it may share weights and be merged
    "plain": ({}, True, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True, True),
    "drawn": ({"init_lora_weights": False}, True, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True, True),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, True, True),
    "pissa": ({"init_lora_weights": "pissa"}, False, True),
    "olora": ({"init_lora_weights": "olora"}, False, True),
    "mica": ({"init_lora_weights": "mica"}, False, True),
    "dora": ({"use_dora": True}, False, True),
    "dora, embeddings": ({"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}, False, True),
    "parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, False, True),
    "bias": ({"bias": "all"}, False, False),
    "bias of B": ({"lora_bias": True}, False, False),
    "head": ({"modules_to_save": ["lm_head"]}, False, False),
    "norms": ({"modules_to_save": ["norm"]}, False, False),
    "tokens": ({"trainable_token_indices": [40, 77]}, False, False),
    "tying": ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, False, False),
    "velora": ({"velora_config": VeloraConfig(num_groups=8)}, False, False),
    "kasa": ({"kasa_config": KasaConfig()}, False, False),
    "bdlora": (
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj", "down_proj"], nblocks=2
            )
        },
        False,
        False,
    ),
}
OTHERS = {  # by type: what its config must be told
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [40, 77]},
    "VBLORA": {"vector_length": 8, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}


def kinds():
    for name, (options, shares, merges) in OPTIONS.items():
        yield pytest.param(LoraConfig(**{**LORA, **options}), shares, merges, id=name)
    for name in sorted(OTHER_TYPES):
        options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **OTHERS.get(name, {})}
        yield pytest.param(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**options), False, False, id=name)


@torch.no_grad()
@pytest.mark.parametrize(("config", "shares", "merges"), list(kinds()))
def test_every_adapter_is_pefts_own_and_is_saved_as_it_is(tmp_path, config, shares, merges):
    torch.manual_seed(0)  # some types draw their frozen parts
    weights = tiny.write_model(tmp_path / "small", "qwen2", "small", 3, num_hidden_layers=1)
    tiny.write_model(tmp_path / "base", "llama", "base", 1, num_hidden_layers=1)
    adapter = write(tmp_path / "adapter", weights, config)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(weights), adapter).eval()
    expected = alone(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(weights)(IDS).logits
    assert (expected - plain).abs().max() > 0.01, "the adapter does something"
    assert check_recipe(load_recipe(recipe_of(tmp_path / "recipe", weights, adapter))).problems == []

    def held(model, *, both):
        said = model(IDS, output_member_logits=True).member_logits
        torch.testing.assert_close(said["expert.expert"], expected, rtol=1e-4, atol=1e-4)
        if both:
            torch.testing.assert_close(said["expert.anti_expert"], plain, rtol=1e-4, atol=1e-4)
        return said

    # Beside its own model: one set of weights, or two.
    model = ProxyTunedForCausalLM.from_pretrained(recipe_of(tmp_path / "recipe", weights, adapter))
    assert len(model.lanes) == (2 if shares else 3)
    held(model, both=True)
    model.save_pretrained(tmp_path / "bundle", bundle=True)
    held(ProxyTunedForCausalLM.from_pretrained(tmp_path / "bundle"), both=True)

    # Alone on its weights: merged, or not.
    model = ProxyTunedForCausalLM.from_pretrained(recipe_of(tmp_path / "recipe", weights, adapter, tmp_path / "base"))
    assert (model.lanes[model.seats["expert.expert"][0]].adapted is None) == merges
    held(model, both=False)

    # In memory: the caller's stays as it was, and ours is saved.
    kept = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in alone.named_modules()]
    model = ProxyTunedForCausalLM.from_members(
        tiny.llama("base", 1), alone, tiny.qwen2("small", 3, num_hidden_layers=1)
    )
    held(model, both=False)
    model.save_pretrained(tmp_path / "saved")
    held(ProxyTunedForCausalLM.from_pretrained(tmp_path / "saved"), both=False)
    assert [(name, type(module), module.training) for name, module in alone.named_modules()] == modules
    assert alone.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in alone.state_dict().items())


# -- files that do not fit ------------------------------------------------------------------------------------
def renamed(tensors):
    return {name.replace(".model.layers.", ".model.language_model.layers."): t for name, t in tensors.items()}


MISFITS = {
    "of another tree": (renamed, "has a tensor '.*language_model.*', which fits no layer of its model"),
    "one missing": (lambda tensors: dict(list(tensors.items())[1:]), "lacks the tensor '.*', which its config asks"),
    "one left over": (
        lambda tensors: tensors | {"base_model.model.score.weight": torch.zeros(2, 16)},
        "has a tensor 'base_model.model.score.weight'",
    ),
    "another shape": (
        lambda tensors: {name: t[..., :2].contiguous() for name, t in tensors.items()},
        "does not fit its model: size mismatch",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("second", [False, True], ids=["alone", "second"])
def test_every_tensor_of_an_adapter_has_its_place(tmp_path, shelf, kind, second):
    """A second adapter on a model too: PEFT says nothing of its tensors."""
    change, reason = MISFITS[kind]
    adapter = tiny.write_adapter(tmp_path / "adapter", shelf / "anti", 4)
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    experts = [
        {"name": name, "expert": {"model": str(shelf / "anti"), "adapter": str(place)}, "anti_expert": None}
        for name, place in (("a", shelf / "adapter"), ("b", adapter))[0 if second else 1 :]
    ]
    recipe = tiny.write_recipe_alone(tmp_path / "recipe", {"base": {"model": str(shelf / "base")}, "experts": experts})
    assert any(re.search(reason, problem) for problem in check_recipe(load_recipe(recipe)).problems)
    with pytest.raises(MemberError, match=f"^the adapter of b.expert .*{reason}"):
        ProxyTunedForCausalLM.from_pretrained(recipe)


@torch.no_grad()
def test_an_adapter_that_brings_weights_of_the_model_is_found_out(tmp_path, shelf, caplog):
    """PEFT saves embeddings beside an adapter on them; here they were changed before training."""
    model = AutoModelForCausalLM.from_pretrained(shelf / "anti")
    model.get_input_embeddings().weight[30:110] += 1.0
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}))
    tiny.shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    model = ProxyTunedForCausalLM.from_pretrained(recipe_of(tmp_path / "recipe", shelf / "anti", tmp_path / "adapter"))
    assert "because it changes the model's own weights (model.embed_tokens.weight)" in caplog.text
    said = model(IDS, output_member_logits=True).member_logits
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shelf / "anti"), tmp_path / "adapter")
    torch.testing.assert_close(said["expert.expert"], expected.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(shelf / "anti")(IDS).logits
    torch.testing.assert_close(said["expert.anti_expert"], plain, rtol=1e-4, atol=1e-4)


# -- threads --------------------------------------------------------------------------------------------------
def test_threads_do_not_meet(shelf):
    """Calls at the same time on one recipe of shared weights, each with an alpha of its own."""
    model = ProxyTunedForCausalLM.from_members(
        str(shelf / "base"), Member(str(shelf / "anti"), adapter=str(shelf / "adapter")), Member(str(shelf / "anti"))
    )
    calls = [{"alpha": alpha, "inputs": IDS[:1, : 3 + i % 5]} for i, alpha in enumerate([0.0, 0.7, 1.5, -1.0] * 4)]

    def answer(call):
        out = model.generate(**call, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
        alone = model.member("expert.expert" if call["alpha"] > 0 else "expert.anti_expert")
        with torch.no_grad():
            return out.tolist(), alone(call["inputs"]).logits.argmax(-1).tolist()

    expected = [answer(call) for call in calls]
    assert len({str(one) for one in expected}) > 8
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, calls)) == expected


def test_gradient_checkpointing_computes_the_same_gradients(trio):
    """Blocks are computed again in the backward pass, after the forward that knew about rows."""
    found = []
    for checkpointing in (False, True):
        adapted = get_peft_model(tiny.qwen2("small", 3), LoraConfig(**LORA))
        torch.manual_seed(0)
        tiny.shake(adapted)
        model = ProxyTunedForCausalLM.from_members(trio.base, adapted, adapted.get_base_model())
        if checkpointing:
            lane = model.lanes[1].model.train()
            lane.gradient_checkpointing_enable()
            lane.enable_input_require_grads()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(grad.abs().max() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_layer_that_is_not_given_whole_rows_gets_weights_of_its_own(shelf, monkeypatch, caplog):
    """As the experts of a mixture, which get the tokens that are routed to them."""
    forward = Qwen2MLP.forward

    def routed(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chosen = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        out[chosen] = forward(self, flat[chosen])
        return out.view_as(x)

    monkeypatch.setattr(Qwen2MLP, "forward", routed)
    anti = str(shelf / "anti")
    expert = Member(anti, adapter=str(shelf / "adapter"))
    model = ProxyTunedForCausalLM.from_members(str(shelf / "base"), expert, Member(anti))
    assert len(model.lanes) == 3
    assert "because some of its layers are not given whole rows" in caplog.text
    said = model(IDS, output_member_logits=True).member_logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(anti), shelf / "adapter").eval()
    torch.testing.assert_close(said["expert.expert"], adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(MemberError, match="because some of its layers are not given whole rows"):
        ProxyTunedForCausalLM.from_members(tiny.llama("base", 1), adapted, adapted.get_base_model())


# -- the caller's models --------------------------------------------------------------------------------------
def test_a_model_in_memory_is_the_callers(tmp_path, trio):
    """It can be trained through the mixture, saved, and merged, as if nothing had been made of it."""
    adapted = get_peft_model(tiny.qwen2("small", 3), LoraConfig(**LORA)).train()
    tiny.shake(adapted)
    before = [(name, type(module), module.training) for name, module in adapted.named_modules()]
    keys, config, learns = list(adapted.state_dict()), adapted.config.to_dict(), adapted.get_nb_trainable_parameters()
    model = ProxyTunedForCausalLM.from_members(trio.base, adapted, adapted.get_base_model())
    model(IDS, labels=IDS).loss.backward()
    weight = next(p for p in adapted.parameters() if p.requires_grad)
    assert weight.grad.abs().max() > 0
    torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path / "saved")
    assert [(name, type(module), module.training) for name, module in adapted.named_modules()] == before
    assert list(adapted.state_dict()) == keys
    assert adapted.config.to_dict() == config
    assert adapted.get_nb_trainable_parameters() == learns
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        said = model.eval()(IDS, output_member_logits=True).member_logits["expert.expert"]
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(tiny.qwen2("small", 3), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_trained_and_then_frozen_is_saved(tmp_path, shelf, fused):
    model = ProxyTunedForCausalLM.from_pretrained(recipe_of(tmp_path / "recipe", shelf / "anti", shelf / "adapter"))
    model.save_pretrained(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "members").exists()
    learned = [p.requires_grad_() for name, p in model.named_parameters() if ".lora_" in name]
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(learned, lr=0.1, fused=fused).step()
    model.requires_grad_(False)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


# -- arguments ------------------------------------------------------------------------------------------------
def test_save_pretrained_honours_what_transformers_has_or_refuses_it(tmp_path, shelf, monkeypatch):
    model = ProxyTunedForCausalLM.from_pretrained(shelf / "recipe")
    for option in (
        {"variant": "fp16"},
        {"save_peft_format": False},
        {"save_original_format": False},
        {"distributed_checkpoint": True},
        {"safe_serialization": False},
        {"state_dict": {}},
        {"state_dict": {name: tensor + 1 for name, tensor in model.state_dict().items()}},
        {"repo_id": "me/mine"},
    ):
        with pytest.raises(ProxyTuneError):
            model.save_pretrained(tmp_path / "saved", **option)
    with pytest.raises(TypeError, match="takes no argument 'max_shard_sise'; did you mean 'max_shard_size'"):
        model.save_pretrained(tmp_path / "saved", max_shard_sise="1GB")
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", True, model.state_dict())
    assert (tmp_path / "saved" / "config.json").exists()
    pushed = []
    monkeypatch.setattr("proxytune.model.push_model", lambda _, repo_id, **options: pushed.append((repo_id, options)))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, token="secret", private=True)
    asked = {"bundle": False, "commit_message": "Upload recipe", "token": "secret", "private": True}
    assert pushed == [("saved", {**asked, "revision": None, "create_pr": False})]


def test_from_pretrained_ignores_nothing_and_leaves_the_callers_config_as_it_is(shelf):
    with pytest.raises(TypeError, match="one argument by position"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", "float16")
    with pytest.raises(RecipeError, match="is a ProxyTuneConfig, not a dict"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", config={})
    config = load_recipe(shelf / "recipe")
    before = config.to_dict()
    ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", config=config, alpha=0.25)
    assert config.to_dict() == before


def test_an_adapter_on_the_hub_given_as_a_model_is_named(tmp_path, shelf):
    adapter = write(tmp_path / "adapter", shelf / "anti", LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    tiny.publish(tmp_path / "hub", "me/adapter", adapter)
    with pytest.raises(MemberError, match=r"me/adapter\) is an adapter, not a model; give it as `adapter`"):
        ProxyTunedForCausalLM.from_members(shelf / "base", "me/adapter", shelf / "anti", cache_dir=tmp_path / "hub")
