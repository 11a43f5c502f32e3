"""What is refused at start and why, and the interfaces that the hooks were written against; no engine is started."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig

from proxytune.errors import AlphaError, MemberError, ProxyTuneError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.gates import Gate
from proxytune.recipe.parts import Expert, Member
from proxytune.recipe.rules import Steering
from proxytune.recipe.source import Source
from proxytune.vllm import check_version, frontend, hooks
from proxytune.vllm.alpha import Request, Row, join, requested, split, unread
from proxytune.vllm.members import Fitted, _refuse_part, fit, part_config
from proxytune.vllm.plan import Part, refuse
from proxytune.vllm.weights import Adapter, with_adapter
from support import tiny
from support.served import NGRAM, expert, quantized, wide
from support.syncs import counted_syncs


def configured(recipe, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(recipe), **{"dtype": "float32", "enforce_eager": True, **options}
    ).create_engine_config()


def refused(shelf, name, said, base="llama", options=None, **values):
    recipe = shelf.recipe(name, base, **values)
    with pytest.raises(ValueError, match=said):  # pydantic's, around our sentence
        configured(recipe, **(options or {}))


# -- refusals -------------------------------------------------------------------------------------------------


def test_quantization_on_the_fly(shelf):
    base = {"model": "../llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    refused(shelf, "on-the-fly", "base is to be quantized while it is loaded", base)


def test_gguf(shelf):
    (shelf.root / "some.gguf").touch()
    one = {"name": "e", "expert": {"model": "../some.gguf"}, "alpha": 1.0}
    refused(shelf, "of-gguf", r"e\.expert is a GGUF file", experts=[one])


def test_two_dtypes(shelf):
    base = {"model": "../llama", "dtype": "bfloat16"}
    refused(shelf, "two-dtypes", "base .* to be bfloat16 .* one dtype, float32", base)


def test_other_vocabularies(shelf):
    wide(shelf.root / "swapped", "qwen2", "small", 50, tokenizer_=tiny.tokenizer(swap=("a", "b")))
    refused(shelf, "swapped-recipe", "does not share the base's vocabulary", experts=[expert("e", "swapped", None)])


@pytest.mark.parametrize(
    ("lora", "said"),
    [({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "trains biases")],
    ids=["dora", "bias"],
)
def test_adapters_that_are_not_merged(shelf, lora, said):
    name = f"lora-{next(iter(lora))}"
    tiny.write_adapter(shelf.root / name, shelf.root / "qwen2-anti", 3, **lora)
    experts = [expert("e", "qwen2-anti", "qwen2-anti", adapter=f"../{name}")]
    refused(shelf, f"of-{name}", rf"adapter of e\.expert .*{said}", experts=experts)


EAGLE = {"method": "eagle", "model": "../llama-small", "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 200}, r"--max-model-len 200 is more than e\.expert reads \(96\)"),
        ({"load_format": "sharded_state"}, "does not load a recipe's members"),
        ({"enable_lora": True}, "name the adapter in the recipe instead"),
        ({"enable_dbo": True}, "halves the batch"),
        ({"enable_prompt_embeds": True}, "each member has embeddings of its own"),
        ({"offload_group_size": 2}, "vLLM offloads the layers of one model"),
        ({"hf_overrides": {"rope_theta": 10.0}}, "members have configs of their own"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "members are quantized as their checkpoints say"),
        ({"speculative_config": EAGLE}, "speculation by eagle reads the hidden states of one model"),
    ],
    ids=[
        "context",
        "load format",
        "lora",
        "two batches",
        "embeddings",
        "offloading",
        "overrides",
        "quantized",
        "eagle",
    ],
)
def test_engine_options(shelf, options, said):
    if "speculative_config" in options:
        options = {"speculative_config": {**EAGLE, "model": str(shelf.root / "llama-small")}}
    if not (shelf.root / "brief").exists():
        wide(shelf.root / "brief", "qwen2", "small", 41, max_position_embeddings=96)
    refused(shelf, "optional", said, options=options, experts=[expert("e", "brief", None)])


def test_heads_that_cannot_be_split(shelf, monkeypatch):
    """Every member must be divisible, not the base alone."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    wide(shelf.root / "odd", "qwen2", "small", 42, hidden_size=96, num_attention_heads=3, num_key_value_heads=1)
    options = {"tensor_parallel_size": 2}
    refused(shelf, "of-odd", r"e\.expert .*attention heads", options=options, experts=[expert("e", "odd", None)])


CONFIGS = {
    "encoder-decoder": ("WhisperForConditionalGeneration", "whisper", "is an encoder-decoder"),
    "unknown": ("FromAfar", "from_afar", "cannot be served by vLLM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_that_cannot_be_members(shelf, kind):
    architecture, model_type, said = CONFIGS[kind]
    (shelf.root / kind).mkdir()
    config = {"architectures": [architecture], "model_type": model_type, "vocab_size": tiny.VOCAB}
    (shelf.root / kind / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(shelf.root / kind)
    refused(shelf, f"of-{kind}", rf"e\.expert .*{said}", experts=[expert("e", kind, None)])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architecture": "GptOssForCausalLM"}, "is a GptOssForCausalLM, which vLLM sets up by rules for the whole"),
        ({"is_multimodal_model": True}, "reads more than text"),
        ({"is_hybrid": True}, "keeps a state in place of a KV cache"),
        ({"is_attention_free": True}, "keeps a state in place of a KV cache"),
        ({"use_mla": True}, r"has latent attention \(MLA\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_kinds_of_models_that_cannot_be_members(values, said):
    """By what vLLM finds of them: its own configs of such models take minutes to be made."""
    names = ("is_encoder_decoder", "is_multimodal_model", "is_hybrid", "is_attention_free", "use_mla")
    assert all(hasattr(ModelConfig, name) for name in names)
    found = SimpleNamespace(architecture="LlamaForCausalLM", quantization=None, **dict.fromkeys(names, False))
    part = Part("expert", "e.expert", ("e.expert",), Member("m"), Source("m"), None)
    _refuse_part(Fitted(part, found), torch.float32)
    found.__dict__.update(values)
    with pytest.raises(MemberError, match=rf"e\.expert \(m\) {said}"):
        _refuse_part(Fitted(part, found), torch.float32)


@pytest.mark.parametrize("asked", [False, True])
def test_remote_code_of_a_member(shelf, asked):
    """``--trust-remote-code`` is for the recipe's own shim; what members bring is never run."""
    place = shelf.root / f"remote-{asked}"
    wide(place, "qwen2", "small", 43)
    ran = place / "it-ran"
    (place / "theirs.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Theirs(LlamaConfig):\n"
        "    model_type = 'theirs'\n"
    )
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (place / "config.json").write_text(json.dumps(config))
    experts = [expert("e", place.name, None)]
    options = {"trust_remote_code": asked}
    refused(shelf, f"of-{place.name}", r"e\.expert .*cannot be served by vLLM", options=options, experts=experts)
    assert not ran.exists()


def test_a_quantized_member_with_an_adapter(shelf):
    quantized(shelf.root / "eight-bits", shelf.root / "qwen2-anti")
    tiny.write_adapter(shelf.root / "on-eight-bits", shelf.root / "qwen2-anti", 3)
    experts = [expert("e", "eight-bits", None, adapter="../on-eight-bits")]
    refused(shelf, "of-eight-bits", "is quantized, so its adapter cannot be merged", experts=experts)


def test_an_adapter_on_tied_embeddings(shelf):
    wide(shelf.root / "tied", "qwen2", "small", 44, tie_word_embeddings=True)
    tiny.write_adapter(shelf.root / "on-tied", shelf.root / "tied", 3, target_modules=["embed_tokens", "q_proj"])
    experts = [expert("e", "tied", None, adapter="../on-tied")]
    refused(shelf, "of-tied", "embeddings that are tied to the head", experts=experts)


def test_an_adapter_of_another_kind(shelf):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(shelf.root / "qwen2-anti")
    adapted = get_peft_model(plain, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    adapted.save_pretrained(shelf.root / "ia3")
    experts = [expert("e", "qwen2-anti", None, adapter="../ia3")]
    refused(shelf, "of-ia3", r"adapter of e\.expert is IA3; vLLM serves only LoRA adapters", experts=experts)


def test_an_adapter_of_another_model():
    """Told while weights are loaded: that is when their shapes are known."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, lora_alpha=8)
    pair = {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "base_model.model.q.lora_B.weight": torch.ones(5, 2)}
    adapter = Adapter("e.expert", lora, pair)
    ((_, merged),) = with_adapter([("q.weight", torch.zeros(5, 3))], adapter)
    assert torch.equal(merged, torch.full((5, 3), 8.0))
    with pytest.raises(MemberError, match=r"shape \(5, 3\) for 'q', but the model has \(3, 5\)"):
        list(with_adapter([("q.weight", torch.zeros(3, 5))], adapter))
    with pytest.raises(MemberError, match="has weights for 'q', which the model's checkpoint lacks"):
        list(with_adapter([("k.weight", torch.zeros(5, 3))], adapter))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "is not merged, because it sets use_dora"),
        ({"bias": "all"}, "is not merged, because it trains biases"),
        ({"init_lora_weights": "pissa"}, "is not merged, because it sets init_lora_weights"),
        ({"alora_invocation_tokens": [9]}, "cannot be used, because it acts behind its invocation tokens alone"),
        ({"use_qalora": True}, "cannot be used, because it sets use_qalora, which was not verified"),
    ],
)
def test_adapters_that_vllm_does_not_merge(options, reason):
    """By the one list that both engines have."""
    from peft import LoraConfig

    with pytest.raises(MemberError, match=rf"^the adapter of e\.expert {reason}"):
        Adapter("e.expert", LoraConfig(**options), {})


def test_what_has_a_row_for_each_token():
    from peft import LoraConfig

    for name, touches in (("lm_head", True), ("layers.0.q_proj", False)):
        pair = {f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(9 if touches else 5, 2)}
        assert Adapter("e.expert", LoraConfig(), pair).touches_vocabulary(9) == touches
    assert Adapter("e.expert", LoraConfig(), {"embed_tokens.weight": torch.ones(9, 3)}).touches_vocabulary(9)


def test_members_in_a_folder_of_a_hub_repository(shelf):
    recipe = ProxyTuneConfig(base={"model": "./base"}, experts=[{"expert": "./expert"}])
    recipe.name_or_path = "somebody/recipe"
    with pytest.raises(MemberError, match="base lies in a folder of a hub repository"):
        refuse(recipe)


def test_a_base_without_a_config(shelf):
    recipe = ProxyTuneConfig(base={"model": "somebody/model"}, experts=[{"expert": "somebody/expert"}])
    with pytest.raises(MemberError, match="carries no config of its base, and 'somebody/model' is not on this machine"):
        refuse(recipe)


def test_what_works_is_not_refused(shelf):
    config = configured(shelf.recipe("fine"))
    assert config.model_config.architecture == "ProxyTunedForCausalLM"
    assert config.model_config.max_model_len == tiny.CONTEXT


def test_what_is_kept_of_compiled_members_is_for_recipes_alike(shelf):
    """vLLM finds it by a key. Where members read prompts of their own, attention itself writes keys and values."""
    one = expert("expert", "qwen2-small", "qwen2-anti")
    one["expert"]["prompt"] = "chat"
    keys = []
    for recipe in (shelf.recipe("kept-plain"), shelf.recipe("kept-chatty", experts=[one])):
        config = configured(recipe)
        keys += [part_config(config, fitted).compute_hash() for fitted in fit(config.model_config)]
    assert len(keys) == len(set(keys)) == 6


def test_room_for_the_widest_heads(shelf):
    """Triton's attention makes room for intermediate results by the recipe's shape; members use it by their own."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    experts = [expert("e", "gemma3-small", "llama-small")]
    config = configured(shelf.recipe("wide-heads", "llama", experts=experts))
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32)
    builder = TritonAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))
    assert builder.softmax_segm_output.shape[-1] == 64


def test_the_command_and_its_draft(shelf):
    from proxytune.errors import RecipeError
    from proxytune.recipe.store import load_recipe
    from proxytune.vllm.command import serve_command

    config = load_recipe(shelf.recipe("commanded"))
    words = serve_command(config, ["--port", "8001"], draft="expert", draft_tokens=3)
    assert str(config.name_or_path) in words
    assert words[-2:] == ["--port", "8001"]
    assert '"num_speculative_tokens": 3' in words[words.index("--speculative-config") + 1]
    with pytest.raises(RecipeError, match="is not an expert of the recipe"):
        serve_command(config, draft="none")
    demo = load_recipe("demo")
    words = serve_command(demo, name="demo")
    assert str(demo.name_or_path) in words, "the word is told as the directory that vLLM can read"
    assert words[words.index("--served-model-name") + 1] == "demo", "and requests name it as the user does"
    assert "demo" not in serve_command(demo, ["--served-model-name=mine"], name="demo")
    assert "--served-model-name" not in serve_command(config, name=str(config.name_or_path))
    tiny.write_adapter(shelf.root / "lora-draft", shelf.root / "qwen2-anti", 3)
    adapted = [expert("e", "qwen2-anti", "qwen2-anti", adapter="../lora-draft")]
    with pytest.raises(MemberError, match="is an adapter"):
        serve_command(load_recipe(shelf.recipe("of-adapted", experts=adapted)), draft="e")


# -- alpha ----------------------------------------------------------------------------------------------------


EXPERTS = [Expert.parse(expert(name, "one", "other", alpha), 0) for name, alpha in (("a", 1.0), ("b", 0.4))]


@pytest.mark.parametrize(("said", "alphas"), tiny.SPELLINGS, ids=repr)
def test_spellings_that_every_engine_takes(said, alphas):
    assert requested(said, EXPERTS, Steering()) == Request(tuple(alphas), Steering())
    assert requested({"other": 1, **said}, EXPERTS, Steering("mean")) == Request(tuple(alphas), Steering("mean"))


def test_rules_and_gates_of_a_request():
    own = Steering("mean", Gate("kl", 0.5))
    assert requested({}, EXPERTS, own).steering == own
    assert requested({"combine": "union"}, EXPERTS, own).steering == Steering("union", Gate("kl", 0.5))
    assert requested({"gate": "unsure=0.9"}, EXPERTS, own).steering == Steering("mean", Gate("unsure", 0.9))
    assert requested({"gate": "none"}, EXPERTS, own, split=True).steering == Steering("mean")
    assert requested({"gate": "decay=9"}, EXPERTS, own, split=True).steering == Steering("mean", Gate("decay", 9.0))


@pytest.mark.parametrize(("said", "message"), tiny.MISSPELLINGS, ids=repr)
def test_misspellings_are_refused(said, message):
    with pytest.raises(AlphaError, match=message):
        requested(said, EXPERTS, Steering())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"combine": "product"}, "there is no rule 'product'"),
        ({"combine": 1}, "there is no rule 1"),
        ({"combine": "union"}, "the rule union needs whole vocabularies"),
        ({"gate": "kl=1"}, "the gate kl=1 needs whole vocabularies"),
        ({"gate": "between=a...b"}, "between=a...b needs the text of the answer, but it is late; wait"),
        ({"gate": "kl"}, "the gate kl needs a number of nats above 0"),
        ({"combine": "convex"}, "sum to at most 1, unlike 1, 0.4"),
    ],
)
def test_rules_that_a_request_cannot_have(said, message):
    with pytest.raises(ProxyTuneError, match=message):
        requested(said, EXPERTS, Steering(), split=True, unread="it is late; wait")


def test_the_answer_after_each_token():
    tokens = np.array([1, 5, 6, 7, 8, 9, 0, 0])  # a prompt of three
    request = Request((1.0, 0.4), Steering())
    assert Row(request, 0, 4, 3, tokens).answers() == [[], [], [], [7]]
    assert Row(request, 4, 2, 3, tokens).answers() == [[7, 8], [7, 8, 9]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"async_scheduling": True}, "start the server with --no-async-scheduling"),
        ({"skip_tokenizer_init": True}, "start it without --skip-tokenizer-init"),
        ({"v2": "1"}, "start the server with VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
    ids=["asynchronous", "no tokenizer", "V2"],
)
def test_engines_that_do_not_know_the_text_of_answers(shelf, monkeypatch, options, said):
    """A recipe's own gate is refused at start, a request's with 400."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", options.pop("v2", "0"))
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr("vllm.platforms.current_platform.check_and_update_config", lambda config: None)
    refused(shelf, "by-text", f"between=a...b needs .*{said}", options=options, gate={"between": ["a", "b"]})
    served = configured(shelf.recipe("not-by-text"), **options)
    with pytest.raises(ProxyTuneError, match=f"between=a...b needs .*{said}"):
        frontend.served_by(served.model_config).check({"gate": "between=a...b"}, served)


def test_a_conversation_is_not_rendered_for_later_beside_own_prompts(shelf):
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.exceptions import VLLMValidationError

    one = expert("e", "qwen2-small", "qwen2-anti")
    one["expert"]["prompt"] = "chat"
    served = configured(shelf.recipe("rendered-chatty", experts=[one]))
    with pytest.raises(VLLMValidationError, match="a conversation cannot be rendered for later"):
        ServingRender.render_chat_request(SimpleNamespace(model_config=served.model_config), None)
    served = configured(shelf.recipe("rendered-plain"))
    ServingRender.render_chat_request(SimpleNamespace(model_config=served.model_config), None).close()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget cannot be had"),
        ({"prompt_logprob_token_ids": [5]}, "log-probabilities of the prompt cannot be had"),
        ({"prompt_logprobs": 1}, "log-probabilities of the prompt cannot be had"),
    ],
)
def test_what_cannot_be_told_of_a_prompt_that_is_filled_up(shelf, asked, said):
    from vllm import SamplingParams

    one = expert("e", "qwen2-small", "qwen2-anti")
    one["expert"]["prompt"] = "chat"
    served = frontend.served_by(configured(shelf.recipe("filled-up", experts=[one])).model_config)
    params = SamplingParams(**asked)
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=tiny.tokenizer()("dog")["input_ids"])
    with pytest.raises(ProxyTuneError, match=said):
        served.give_prompts(request, "dog", False, 256)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "pooling"}, "a recipe only generates, so --runner pooling"),
        ({"weight_transfer_config": {"backend": "ipc"}}, "--weight-transfer-config does not fit a recipe"),
    ],
    ids=["pooling", "weights"],
)
def test_what_a_recipe_is_not_for(shelf, options, said):
    refused(shelf, f"not-for-{next(iter(options))}", said, options=options)


def test_recipes_in_one_process(shelf):
    """Each engine's requests are checked by its own recipe, until the engine is gone."""
    strong = [expert("expert", "qwen2-small", "qwen2-anti", alpha=3.0)]
    first, second = configured(shelf.recipe("served")), configured(shelf.recipe("served-strongly", experts=strong))
    mine, others = frontend.served_by(first.model_config), frontend.served_by(second.model_config)
    assert mine is not None
    assert mine.recipe.default != others.recipe.default
    gone = weakref.ref(others)
    del second, others
    gc.collect()
    assert gone() is None
    assert frontend.served_by(first.model_config) is mine
    assert frontend.served_by(SimpleNamespace(hf_config=object())) is None


def test_a_recipe_that_reads_answers_is_not_scheduled_ahead(shelf):
    served = configured(shelf.recipe("reads-answers", gate={"between": ["a", "b"]}))
    assert served.scheduler_config.async_scheduling is False
    assert unread(served) is None


# -- versions and interfaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, "0.31.2", "0.33.0", "1.0", "dev"])
def test_a_vllm_out_of_range_is_refused(found):
    with pytest.raises(ProxyTuneError, match="vLLM"):
        check_version(found)


def test_this_vllm_is_in_range():
    import vllm

    check_version(vllm.__version__)


def test_the_v1_hook_fits():
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    hooks.wrap_v1_runner()
    wrapped = GPUModelRunner._prepare_inputs
    hooks.wrap_v1_runner()
    assert GPUModelRunner._prepare_inputs is wrapped, "wrapped once"
    assert list(inspect.signature(wrapped).parameters) == ["self", "scheduler_output", "num_scheduled_tokens"]
    names = list(inspect.signature(GPUModelRunner._model_forward).parameters)
    assert names[:5] == ["self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"]
    names = list(inspect.signature(NgramProposer.propose).parameters)
    assert names[1:5] == ["num_speculative_tokens", "sampled_token_ids", "num_tokens_no_spec", "token_ids_cpu"]


def test_the_v2_hook_fits(monkeypatch):
    """Where its runner cannot run: the methods have the parameters of vLLM's, and set the batch's alphas."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from proxytune.vllm.model import ProxyTunedForCausalLM

    state_class = resolve_model_state_cls(None, ProxyTunedForCausalLM)
    assert state_class is not DefaultModelState
    assert issubclass(state_class, DefaultModelState)
    for name, n in (("add_request", 3), ("prepare_attn", 2), ("prepare_dummy_inputs", 3)):
        ours, theirs = (inspect.signature(getattr(one, name)) for one in (state_class, DefaultModelState))
        assert list(ours.parameters)[:n] == list(theirs.parameters)[:n]
    fields = {"num_reqs", "idx_mapping_np", "query_start_loc_np", "num_computed_tokens_np", "req_ids"}
    assert fields <= set(InputBatch.__dataclass_fields__)

    told = []
    own, other = Request((1.0,), Steering()), Request((0.5,), Steering())
    state = state_class.__new__(state_class)
    state.model = SimpleNamespace(
        recipe=SimpleNamespace(asked_by=lambda params: params), set_rows=lambda rows: told.append(rows)
    )
    state.slots = {}
    state.rope_state = state.prompt_embeds_state = None
    for slot, name, asked, n_prompt in ((2, "a", other, 5), (0, "b", own, 7)):
        new = SimpleNamespace(sampling_params=asked, req_id=name, prompt_token_ids=[1] * n_prompt)
        state.add_request(slot, new)
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, batch: "built")
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        idx_mapping_np=np.array([2, 0]),
        query_start_loc_np=np.array([0, 3, 4, 4]),
        num_computed_tokens_np=np.array([2, 9]),
    )
    assert state.prepare_attn(batch) == "built"
    assert told.pop() == [Row(other, 2, 3, 5, None), Row(own, 9, 1, 7, None)]
    batch.req_ids = ["req_0", "req_1"]  # a trial, in slots that requests have
    assert state.prepare_attn(batch) == "built"
    assert told.pop() is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}}, "speculation by draft_model"),
        ({"speculative_config": NGRAM, "v2": "1"}, "speculation by ngram"),
        ({"data_parallel_size": 2}, "data parallelism does not fit"),
        ({"enable_expert_parallel": True}, "expert parallelism does not fit"),
        ({"kv_offloading_size": 1.0}, "KV offloading does not fit"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill does not fit"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb does not fit"),
        ({"watermark_config": {"key": 1}, "v2": "1"}, "a watermark does not fit"),
    ],
    ids=["draft", "n-grams on V2", "data", "experts", "offloading", "sharing", "weights", "watermark"],
)
def test_what_own_prompts_exclude(shelf, monkeypatch, options, said):
    one = expert("e", "qwen2-small", "qwen2-anti")
    one["expert"]["prompt"] = "chat"
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", options.pop("v2", "0"))
    if "draft" in said:
        options["speculative_config"]["model"] = str(shelf.root / "qwen2-small")
    refused(shelf, f"chatty-{said[:8]}", f"{said}.*members read prompts of their own", options=options, experts=[one])


@pytest.mark.parametrize("kind", ["cpu_attn", "flash_attn", "flashinfer", "triton_attn"])
def test_attention_backends_have_what_own_prompts_need(kind):
    """Their packages are not all here, so their source is read."""
    import ast
    import importlib.util

    file = importlib.util.find_spec("vllm.v1.attention.backends").submodule_search_locations[0] + f"/{kind}.py"
    classes = {node.name: node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)}

    def parameters(name, method):
        found = next(node for node in classes[name].body if getattr(node, "name", None) == method)
        return [argument.arg for argument in found.args.args]

    (backend,) = (node for name, node in classes.items() if name.endswith("Backend"))
    fields = {ast.unparse(node) for node in backend.body if isinstance(node, ast.AnnAssign)}
    assert "forward_includes_kv_cache_update: bool = False" in fields
    (impl,) = (name for name in classes if name.endswith("Impl"))
    update = ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
    assert parameters(impl, "do_kv_cache_update") == update
    assert parameters(impl, "forward")[:7] == ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata"]
    (builder,) = (name for name in classes if name.endswith("MetadataBuilder"))
    assert parameters(builder, "build")[:3] == ["self", "common_prefix_len", "common_attn_metadata"]
    metadata = builder.removesuffix("Builder")
    assert any(getattr(node, "target", None) and node.target.id == "slot_mapping" for node in classes[metadata].body)


def test_the_common_metadata_have_what_is_replaced():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from proxytune.vllm.attention import own_metadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert set(re.findall(r"^        (\w+)=", inspect.getsource(own_metadata), flags=re.MULTILINE)) <= names


def test_metadata_of_a_part_never_wait_for_the_device():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from proxytune.vllm.attention import own_metadata
    from proxytune.vllm.own_prompts import reading

    request = Request((1.0,), Steering(), prompts={"expert": np.array([5, 6, 7])})
    rows = [Row(request, 8, 1, 8, None), Row(request, 0, 8, 8, None)]
    starts, lengths = torch.tensor([0, 1, 9], dtype=torch.int32), torch.tensor([9, 8], dtype=torch.int32)
    whole = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=2,
        num_actual_tokens=9,
        max_query_len=8,
        max_seq_len=9,
        block_table_tensor=torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32),
        slot_mapping=torch.arange(9),
    )
    with counted_syncs() as syncs:
        own = own_metadata(reading("expert", rows, 4), 4, whole)
    assert syncs == []
    assert own.seq_lens.tolist() == own.seq_lens_cpu_upper_bound.tolist() == [4, 3]
    assert own.query_start_loc.tolist() == own.query_start_loc_cpu.tolist() == [0, 1, 4]
    # The prompt begins at the second block: its beginning is at positions 4 and 5, its last id at 7.
    assert own.slot_mapping.tolist() == [11, 20, 21, 22, -1, -1, -1, -1, -1]


def test_the_core_takes_what_is_wrapped():
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    assert block_pool.generate_block_hash_extra_keys is kv_cache_utils.generate_block_hash_extra_keys
    assert block_pool.generate_block_hash_extra_keys.asks_members
    assert "Request.from_engine_core_request(" in inspect.getsource(EngineCore.preprocess_add_request)
    assert list(inspect.signature(InputProcessor.process_inputs).parameters)[:4] == [
        "self",
        "request_id",
        "prompt",
        "params",
    ]
    for name in ("render_chat", "render_chat_async"):
        names = list(inspect.signature(getattr(BaseRenderer, name)).parameters)
        assert names[:4] == ["self", "conversations", "chat_params", "tok_params"]


@pytest.mark.parametrize("last", [True, False], ids=["last stage", "first stage"])
def test_parts_may_write_to_one_place(monkeypatch, last):
    """As replayed CUDA graphs of pieces do: they share memory, and a model's output stands in it."""
    from vllm.sequence import IntermediateTensors

    from proxytune.vllm import model
    from proxytune.vllm.alpha import PIECES

    place = torch.empty(4, 8)

    def part(name):
        def run(*_):
            place.fill_({"base": 1.0, "expert": 2.0}[name])
            return place if last else IntermediateTensors({"hidden_states": place})

        return run

    monkeypatch.setattr(model, "get_pp_group", lambda: SimpleNamespace(is_last_rank=last))
    fake = SimpleNamespace(
        now={},
        parts=["base", "expert"],
        widths=[8, 8],
        part=part,
        _read_by=lambda *_: (None, None),
        alphas=torch.zeros(4, 3 * PIECES),
        dtype=torch.float32,
    )
    found = model.ProxyTunedForCausalLM.forward(fake, torch.ones(4), torch.arange(4))
    found = found if last else found["hidden_states"]
    assert found[0, :16].tolist() == [1.0] * 8 + [2.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alphas_survive_the_dtype_of_hidden_states(dtype):
    alpha = torch.tensor([[0.1, -1.0 / 3.0], [3e5, 1e-7]])
    assert torch.equal(join(split(alpha, dtype)), alpha)


def test_mixing_a_batch_never_waits_for_the_device():
    """Whatever its requests ask for: the recipe's own, another rule, gates, a schedule, weights."""
    from proxytune.vllm.alpha import PIECES
    from proxytune.vllm.model import ProxyTunedForCausalLM as Model

    hows = [Steering(), Steering("union"), (("base", 0.5), ("e.expert", 0.5))]
    hows += [Steering(gate=Gate(kind, value)) for kind, value in (("unsure", 0.9), ("kl", 0.5), ("warmup", 4.0))]
    hows.append(Steering(gate=Gate("between", ("a", "b"))))
    parts = {"base": "base", "e.expert": "e", "e.anti_expert": "anti"}
    head = SimpleNamespace(compute_logits=lambda state: torch.log_softmax(state, dim=-1))
    part = SimpleNamespace(
        parts=list(parts.values()),
        widths=[20] * 3,
        n_columns=PIECES * 3,
        part=lambda name: head,
        recipe=SimpleNamespace(names=["e"]),
        hows=hows,
        owner=parts,
        gather=None,
        shared_vocab=18,
        config=SimpleNamespace(plausibility=0.01),
    )
    for name in ("_mixed", "_opened"):
        setattr(part, name, getattr(Model, name).__get__(part))
    columns = split(torch.tensor([[0.5, float(place), 2.0] for place in range(len(hows))]), torch.float32)
    hidden = torch.cat([torch.randn(len(hows), 60), columns], dim=-1)
    with counted_syncs() as syncs:
        assert Model.compute_logits(part, hidden).shape == (len(hows), 18)
    assert syncs == []
