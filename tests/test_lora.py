"""An expert that is a LoRA adapter on the anti-expert: one set of weights, one forward, the same outputs."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from proxytune import Expert, Member, MemberError, ProxyTunedForCausalLM
from support import tiny
from support.adapters import adapted, load, oracle_of
from support.decoding import QUIET, ROWS
from support.oracle import assert_same_tokens

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.fixture(scope="module")
def oracle(shelf):
    return oracle_of(shelf)


@torch.no_grad()
def test_one_set_of_weights_and_one_forward(shelf):
    model = load(shelf)
    assert len(model.lanes) == 2
    expert, anti = (dict(model.member(f"e0.{side}").named_parameters()) for side in ("expert", "anti_expert"))
    assert all(expert[name] is weight for name, weight in anti.items())
    rows = []
    model.lanes[1].model.register_forward_pre_hook(
        lambda _m, _a, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    model(torch.tensor([ROWS[0]] * 3))
    assert rows == [6], "expert and anti-expert are two blocks of one batch"


@torch.no_grad()
def test_logits_are_pefts_and_those_of_the_unshared(shelf, oracle):
    batch = tiny.padded([ROWS[0], ROWS[2]])
    shared = load(shelf)(**batch, output_member_logits=True)
    unshared_model = load(shelf, share=False)
    assert len(unshared_model.lanes) == 3
    unshared = unshared_model(**batch, output_member_logits=True)
    for name, member in oracle.members().items():
        expected = member(**batch).logits
        real = batch["attention_mask"].bool()
        for out in (shared, unshared):
            torch.testing.assert_close(out.member_logits[name][real], expected[real], rtol=1e-4, atol=1e-4)
    difference = shared.member_logits["e0.expert"] - shared.member_logits["e0.anti_expert"]
    assert difference.abs().mean() > 0.1, "the adapter does something"


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"alpha": [0.0, 1.0, -1.0]}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_every_mode_is_that_of_the_unshared(shelf, options):
    batch = tiny.padded(ROWS if "prompt_lookup_num_tokens" not in options else ROWS[:1])
    shared, unshared = (
        load(shelf, share=share).generate(**batch, **QUIET, max_new_tokens=10, **options) for share in (True, False)
    )
    assert torch.equal(shared, unshared)


def test_greedy_is_the_plain_loop_with_peft(shelf, oracle):
    out = load(shelf).generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=12)
    for row, tokens in zip(ROWS, out[:, len(ROWS[0]) :]):
        assert_same_tokens(tokens, oracle.greedy(row, 12))


KINDS = {
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "dropout": {"lora_dropout": 0.5},
    "one layer": {"layers_to_transform": [1]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_pefts(tmp_path, shelf, kind):
    tiny.write_adapter(tmp_path / "kind", shelf / "anti", 7, **KINDS[kind])
    ids = torch.tensor([ROWS[0]])
    model = load(shelf, [tmp_path / "kind"])
    assert len(model.lanes) == 2
    out = model(ids, output_member_logits=True).member_logits
    expected = adapted(shelf / "anti", tmp_path / "kind")(ids).logits
    torch.testing.assert_close(out["e0.expert"], expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(shelf / "anti")(ids).logits
    torch.testing.assert_close(out["e0.anti_expert"], plain, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().mean() > 0.01


@torch.no_grad()
def test_gemma_scales_its_embeddings_under_the_adapter_too(tmp_path):
    weights = tiny.write_model(tmp_path / "anti", "gemma3", "small", 3)
    tiny.write_model(tmp_path / "base", "llama", "base", 1)
    tiny.write_adapter(tmp_path / "adapter", weights, target_modules=["embed_tokens", "v_proj"])
    ids = torch.tensor([ROWS[0]])
    out = load(tmp_path)(ids, output_member_logits=True).member_logits
    torch.testing.assert_close(
        out["e0.expert"], adapted(weights, tmp_path / "adapter")(ids).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_gpt2_keeps_its_weights_transposed(tmp_path):
    weights = tiny.write_model(tmp_path / "anti", "gpt2", "small", 3)
    tiny.write_model(tmp_path / "base", "llama", "base", 1)
    tiny.write_adapter(tmp_path / "adapter", weights, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    ids = torch.tensor([ROWS[0]])
    out = load(tmp_path)(ids, output_member_logits=True).member_logits
    torch.testing.assert_close(
        out["e0.expert"], adapted(weights, tmp_path / "adapter")(ids).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_several_adapters_on_one_model(tmp_path, shelf):
    tiny.write_adapter(tmp_path / "second", shelf / "anti", 5, r=2, target_modules=["k_proj", "o_proj"])
    adapters = [shelf / "adapter", tmp_path / "second"]
    model = load(shelf, adapters)
    assert len(model.lanes) == 2
    assert len(model.lanes[1].seats) == 3, "two adapters and the weights as they are"
    oracle = oracle_of(shelf, adapters)
    out = model.generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=8)
    for row, tokens in zip(ROWS, out[:, len(ROWS[0]) :]):
        assert_same_tokens(tokens, oracle.greedy(row, 8))


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
def test_two_revisions_of_one_adapter_are_two_adapters(tmp_path, shelf, share):
    """On the hub both have one name."""
    tiny.write_adapter(tmp_path / "second", shelf / "anti", 5)
    tiny.publish(tmp_path / "hub", "me/adapter", shelf / "adapter", "v1")
    tiny.publish(tmp_path / "hub", "me/adapter", tmp_path / "second", "v2")
    experts = [
        Expert(
            name=revision,
            expert=Member(str(shelf / "anti"), adapter="me/adapter", adapter_revision=revision),
            anti_expert=Member(str(shelf / "anti")),
        )
        for revision in ("v1", "v2")
    ]
    model = ProxyTunedForCausalLM.from_members(
        str(shelf / "base"), experts=experts, share=share, cache_dir=tmp_path / "hub"
    )
    assert len(model.lanes) == (2 if share else 4)
    ids = torch.tensor([ROWS[0]])
    out = model(ids, output_member_logits=True).member_logits
    for revision, adapter in (("v1", shelf / "adapter"), ("v2", tmp_path / "second")):
        expected = adapted(shelf / "anti", adapter)(ids).logits
        torch.testing.assert_close(out[f"{revision}.expert"], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_on_the_base_shares_with_the_base(tmp_path, shelf):
    """A tuned copy of the base itself, as cheap as an adapter."""
    tiny.write_adapter(tmp_path / "a", shelf / "base", 4)
    model = ProxyTunedForCausalLM.from_members(
        str(shelf / "base"), Member(str(shelf / "base"), adapter=str(tmp_path / "a")), str(shelf / "base"), alpha=2.0
    )
    assert len(model.lanes) == 1
    ids = torch.tensor([ROWS[0]])
    base, tuned = AutoModelForCausalLM.from_pretrained(shelf / "base"), adapted(shelf / "base", tmp_path / "a")
    expected = base(ids).logits + 2.0 * (tuned(ids).logits - base(ids).logits)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "it sets use_dora"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"modules_to_save": ["lm_head"]}, "it sets modules_to_save"),
    ],
    ids=["dora", "bias", "modules_to_save"],
)
@torch.no_grad()
def test_what_cannot_be_shared_gets_weights_of_its_own_with_a_warning(tmp_path, shelf, caplog, lora, reason):
    tiny.write_adapter(tmp_path / "a", shelf / "anti", 6, **lora)
    with caplog.at_level(logging.WARNING, "proxytune"):
        model = load(shelf, [tmp_path / "a"])
    assert len(model.lanes) == 3
    assert [record.message for record in caplog.records] == [
        f"the adapter of e0.expert is loaded with weights of its own, because {reason}"
    ]
    ids = torch.tensor([ROWS[0]])
    out = model(ids, output_member_logits=True).member_logits
    torch.testing.assert_close(
        out["e0.expert"], adapted(shelf / "anti", tmp_path / "a")(ids).logits, rtol=1e-3, atol=1e-3
    )
    plain = AutoModelForCausalLM.from_pretrained(shelf / "anti")(ids).logits
    torch.testing.assert_close(out["e0.anti_expert"], plain, rtol=1e-4, atol=1e-4)


# -- in memory ------------------------------------------------------------------------------------------------
def in_memory(seed=0, **lora):
    anti = tiny.qwen2("small", 3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expert = get_peft_model(
            anti, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **lora)
        )
        tiny.shake(expert)
    return expert.eval()


@torch.no_grad()
def test_a_peft_model_shares_with_the_model_under_it(trio):
    expert = in_memory()
    ids = torch.tensor([ROWS[0]])
    tuned = expert(ids).logits.clone()
    with expert.disable_adapter():
        plain = expert(ids).logits.clone()
    torch.testing.assert_close(plain, trio.anti_expert(ids).logits)
    model = ProxyTunedForCausalLM.from_members(trio.base, expert, expert.get_base_model())
    assert len(model.lanes) == 2
    expected = trio.base(ids).logits + tuned - plain
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expert(ids).logits, tuned, msg="the caller's own model still answers as before")


@torch.no_grad()
def test_a_peft_model_alone_on_its_weights(trio):
    expert = in_memory()
    ids = torch.tensor([ROWS[0]])
    model = ProxyTunedForCausalLM.from_members(trio.base, expert, trio.anti_expert)
    expected = trio.base(ids).logits + expert(ids).logits - trio.anti_expert(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_peft_model_that_cannot_share_is_refused(trio):
    expert = in_memory(use_dora=True)
    with pytest.raises(MemberError, match=r"expert\.expert shares its weights.*it sets use_dora"):
        ProxyTunedForCausalLM.from_members(trio.base, expert, expert.get_base_model())


def test_an_adapter_is_trained_through_the_mixture(trio):
    """Gradients reach the adapter and nothing else, and equal those of the unshared computation."""
    expert = in_memory()
    model = ProxyTunedForCausalLM.from_members(trio.base, expert, expert.get_base_model())
    ids = torch.tensor([ROWS[0]])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    model(ids, labels=ids).loss.backward()
    ours = {name: p.grad.clone() for name, p in trained.items()}

    twin = in_memory()
    unshared = ProxyTunedForCausalLM.from_members(trio.base, twin, trio.anti_expert)
    unshared(ids, labels=ids).loss.backward()
    theirs = [p.grad for p in unshared.parameters() if p.requires_grad]
    assert len(ours) == len(theirs)
    for grad, expected in zip(ours.values(), theirs):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


# -- errors ---------------------------------------------------------------------------------------------------
def test_a_missing_adapter_is_one_sentence(tmp_path, shelf):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MemberError, match=r"e0\.expert .*empty\) cannot be loaded"):
        load(shelf, [tmp_path / "empty"])


def test_an_adapter_for_another_model_is_one_sentence(tmp_path, shelf):
    tiny.write_adapter(tmp_path / "a", shelf / "base", 4)
    with pytest.raises(MemberError, match=r"e0\.expert"):
        load(shelf, [tmp_path / "a"])
