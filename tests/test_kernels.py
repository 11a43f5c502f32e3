"""Packed linear layers: the same numbers, whatever the rows, and the same weights when they are saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from proxytune import MemberError, ProxyTunedForCausalLM
from proxytune.lanes.kernels import PackedLinear, QuickHead, pack
from support import tiny
from support.decoding import QUIET, ROWS
from support.oracle import Oracle, assert_same_tokens

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@torch.inference_mode()
def test_a_packed_layer_is_the_plain_one(rows, bias):
    linear = nn.Linear(48, 20, bias=bias)
    packed = PackedLinear(linear)
    for x in (torch.randn(2, rows, 48), torch.randn(rows, 48), torch.randn(rows, 3, 48).transpose(0, 1)):
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_packed_models_generate_the_plain_loops_tokens(family):
    base, expert, anti = tiny.model(family, "base", 1), tiny.qwen2("small", 2), tiny.qwen2("small", 3)
    oracle = Oracle(base, [("e", expert, anti, 1.0)])
    answers = [oracle.greedy(row, 12) for row in ROWS]
    model = tiny.compose(
        Oracle(tiny.model(family, "base", 1), [("e", tiny.qwen2("small", 2), tiny.qwen2("small", 3), 1.0)]), pack=True
    )
    assert all(lane.packed for lane in model.lanes)
    assert any(isinstance(module, PackedLinear) for module in model.base.modules())
    batch = tiny.padded(ROWS)
    for row, answer in zip(model.generate(**batch, **QUIET, max_new_tokens=12, speculate=2), answers):
        assert_same_tokens(row[batch["input_ids"].shape[1] :], answer)


@torch.no_grad()
def test_a_packed_recipe_with_shared_lora_is_saved_with_its_weights(shelf, tmp_path):
    from support.adapters import load

    model, plain = load(shelf, pack=True), load(shelf)
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.costs.base.fixed == plain.costs.base.fixed, "packing changes no size"
    assert model.costs.base.of(2) < plain.costs.base.of(2)
    model.save_pretrained(tmp_path / "bundle", bundle=True)
    again = ProxyTunedForCausalLM.from_pretrained(tmp_path / "bundle")
    torch.testing.assert_close(again(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_tied_head_is_packed_and_the_embeddings_stay(tmp_path):
    model = tiny.llama("base", 1, tie_word_embeddings=True)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        expected = model(ids).logits
        pack(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


def test_what_cannot_be_packed_is_refused_before_anything_is_changed():
    model = tiny.llama("base", 1).to(torch.float64)
    with pytest.raises(MemberError, match=r"pack=True has no kernel for torch\.float64 on this machine"):
        pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_from_pretrained_packs(shelf):
    model = AutoModelForCausalLM.from_pretrained(shelf / "recipe", pack=True)
    assert all(lane.packed for lane in model.lanes)


# -- a quick head -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n_vocab", "width"), [(384, 32), (385, 17), (31, 7), (3, 5), (1000, 96)])
@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_a_quick_head_is_nearly_right(n_vocab, width, rows):
    linear = nn.Linear(width, n_vocab, bias=rows == 5)
    linear.weight[0] = 0  # no scale to divide by
    head = QuickHead(PackedLinear(linear))
    x = torch.randn(rows, 2, width)
    guess, exact = head(x), linear(x)
    assert guess.dtype == torch.float32
    assert guess.shape == exact.shape
    assert 0 < (guess - exact).abs().max() < 0.05 * exact.abs().max()
    assert head.rounded.nbytes < 0.25 * 4 * (n_vocab + 32) * (width + 32)


def test_only_the_drafting_lane_has_a_quick_head_and_only_in_float32():
    def lanes(dtype, pack=True):
        small = [tiny.qwen2("small", seed).to(dtype) for seed in (2, 3)]
        base = tiny.gemma3("base", 1).to(dtype)
        return tiny.compose(Oracle(base, [("e", *small, 1.0)]), pack=pack)

    model = lanes(torch.float32)
    assert [lane.quick_head is not None for lane in model.lanes] == [index == model.drafting.lane for index in range(3)]
    assert all(lane.quick_head is None for lane in lanes(torch.float32, pack=False).lanes)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert all(lane.quick_head is None for lane in lanes(torch.bfloat16).lanes)


def test_a_member_that_caps_its_logits_keeps_its_own_head():
    capped = [tiny.gemma3("small", seed, final_logit_softcapping=5.0) for seed in (2, 3)]
    model = tiny.compose(Oracle(tiny.llama("base", 1), [("e", *capped, 1.0)]), pack=True)
    assert model.lanes[model.drafting.lane].packed
    assert all(lane.quick_head is None for lane in model.lanes)
