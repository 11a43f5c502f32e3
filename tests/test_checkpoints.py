"""A member's weights are its files', whole: nothing is drawn at random, nothing is left out unsaid."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from proxytune import MemberError, ProxyTuneConfig
from proxytune.lanes.loading import load_model
from proxytune.recipe.members import Loading
from support import tiny


def load(directory, name="expert.expert", **member):
    config = ProxyTuneConfig(base="unused", experts=[{"expert": {"model": str(directory), **member}}])
    return load_model(config, name, config.expert_list[0].expert, Loading())


def change(directory, *, drop=(), add=None):
    """Leave out the tensors whose names hold one of ``drop``, and put others in."""
    file = Path(directory) / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if not any(part in name for part in drop)}
    save_file({**kept, **(add or {})}, file, metadata={"format": "pt"})
    return directory


@pytest.fixture
def member(tmp_path):
    return tiny.write_model(tmp_path / "member", "llama", "small", 2)


# -- what is missing, or of another shape ---------------------------------------------------------------------
def test_a_missing_layer_is_an_error_that_names_the_member_and_its_tensors(member):
    change(member, drop=["layers.1."])
    with pytest.raises(MemberError, match=r"^expert\.expert .*lacks 9 tensors: model\.layers\.1\..* and 6 more"):
        load(member)


def test_a_missing_head_is_an_error_only_where_it_is_not_tied(member, tmp_path):
    with pytest.raises(MemberError, match=r"lacks the tensor lm_head\.weight;"):
        load(change(member, drop=["lm_head"]))
    tied = tiny.write_model(tmp_path / "tied", "llama", "small", 2, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(tied)


def test_a_tensor_of_another_shape_is_an_error_that_gives_both_shapes(member):
    change(member, add={"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 16)})
    with pytest.raises(MemberError, match=r"q_proj\.weight of shape \[8, 16\] in place of \[16, 16\]"):
        load(member)


def test_a_missing_shard_is_an_error(member):
    model = tiny.llama("small", 2)
    model.save_pretrained(member, max_shard_size="5KB")
    (member / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(member.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(member)
    shards[1].unlink()
    with pytest.raises(MemberError, match=r"^expert\.expert .*cannot be loaded"):
        load(member)


# -- what is left over ----------------------------------------------------------------------------------------
ONE_LAYER_MORE = {
    f"model.layers.2.{name}": torch.zeros(1)
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
}


@pytest.mark.parametrize(
    "tensors",
    [
        ONE_LAYER_MORE,
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
        {"model.layers.1.self_attn.q_norm.weight": torch.zeros(8)},
        {"model.norm.bias": torch.zeros(16)},
        {"lm_head.bias": torch.zeros(384)},
    ],
    ids=["one layer more", "a bias", "a norm in a layer", "a bias of the last norm", "a bias of the head"],
)
def test_a_tensor_that_the_config_leaves_no_place_for_is_an_error(member, tensors):
    change(member, add=tensors)
    with pytest.raises(MemberError, match=rf"^expert\.expert .*has .*{sorted(tensors)[0]}.* no place for"):
        load(member)


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(4, 4)},
        {"vision_tower.layers.0.mlp.weight": torch.zeros(4, 4)},
        {"mtp.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)},
        {"model.layers.2.eh_proj.weight": torch.zeros(4), "model.layers.2.self_attn.q_proj.weight": torch.zeros(4)},
    ],
    ids=["a vision tower in the body", "a vision tower beside it", "layers for drafts", "one of them in the list"],
)
def test_other_parts_are_left_out_and_reported(member, tensors, caplog):
    change(member, add=tensors)
    with caplog.at_level(logging.WARNING, "proxytune"):
        model = load(member)
    assert any(sorted(tensors)[0] in record.message for record in caplog.records)
    assert torch.equal(model.lm_head.weight, tiny.llama("small", 2).lm_head.weight)


def test_masks_that_older_versions_saved_are_no_weights(tmp_path):
    old = tiny.write_model(tmp_path / "old", "gpt2", "small", 2)
    mask = torch.ones(1, 1, 64, 64).tril()
    change(old, add={"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    load(old)
    change(old, add={"transformer.h.0.attn.masked_bias": torch.zeros(64)})
    with pytest.raises(MemberError, match=r"h\.0\.attn\.masked_bias"):
        load(old)


# -- GGUF -----------------------------------------------------------------------------------------------------
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_tensors(model):
    """A Llama's tensors under the names, and with the rows of Q and K in the order, of llama.cpp."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        before = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            before = f"blk.{number}."
        weights = tensor.numpy()
        if (n := heads.get(module.split(".")[-1])) is not None:
            weights = weights.reshape(n, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        found[f"{before}{GGUF_NAMES[module]}.weight"] = np.ascontiguousarray(weights)
    return found


def write_gguf(directory, model, parts=1, *, drop=(), add=None, name="small"):
    """Write a Llama as GGUF, in ``parts`` as llama-gguf-split makes them: what describes the model is in the first."""
    gguf = pytest.importorskip("gguf")
    config, tokenizer = model.config, tiny.tokenizer()
    tensors = {name: t for name, t in gguf_tensors(model).items() if not any(part in name for part in drop)}
    listed = list({**tensors, **(add or {})}.items())
    directory.mkdir(exist_ok=True)
    for part in range(parts):
        suffix = f"-{part + 1:05}-of-{parts:05}" if parts > 1 else ""
        writer = gguf.GGUFWriter(str(directory / f"{name}{suffix}.gguf"), "llama")
        if part == 0:
            writer.add_context_length(config.max_position_embeddings)
            writer.add_embedding_length(config.hidden_size)
            writer.add_block_count(config.num_hidden_layers)
            writer.add_feed_forward_length(config.intermediate_size)
            writer.add_vocab_size(config.vocab_size)
            writer.add_head_count(config.num_attention_heads)
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            writer.add_rope_freq_base(10000.0)
            vocab = tokenizer.get_vocab()
            tokens = sorted(vocab, key=vocab.get)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(tokens)
            writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
            merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
            writer.add_token_merges([" ".join(merge) for merge in merges])
            writer.add_bos_token_id(tiny.BOS)
            writer.add_eos_token_id(tiny.EOS)
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(listed))
        for key, tensor in listed[part::parts]:
            writer.add_tensor(key, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return directory


IDS = torch.tensor([[1, 40, 77, 102, 9]])


@pytest.mark.parametrize("parts", [1, 3])
def test_a_gguf_file_is_whole_in_one_piece_and_in_parts(tmp_path, parts):
    model = tiny.llama("small", 2)
    write_gguf(tmp_path, model, parts)
    for file in sorted(tmp_path.glob("*.gguf")):  # any part stands for the whole
        torch.testing.assert_close(load(file)(IDS).logits, model(IDS).logits)


def test_a_missing_part_of_a_gguf_file_is_named(tmp_path):
    write_gguf(tmp_path, tiny.llama("small", 2), 3)
    (tmp_path / "small-00002-of-00003.gguf").unlink()
    with pytest.raises(MemberError, match=r"^expert\.expert .*split into 3 files, and small-00002-of-00003\.gguf is"):
        load(tmp_path / "small-00001-of-00003.gguf")


def test_a_gguf_file_that_lacks_tensors_or_has_too_many_is_an_error(tmp_path):
    model, q = tiny.llama("small", 2), "blk.2.attn_q.weight"
    write_gguf(tmp_path, model, drop=["blk.1."])
    with pytest.raises(MemberError, match=r"^expert\.expert .*lacks 9 tensors: model\.layers\.1"):
        load(tmp_path / "small.gguf")
    write_gguf(tmp_path, model, add={q: np.zeros((16, 16), np.float32)})
    with pytest.raises(MemberError, match=rf"^expert\.expert .*has the tensor {q}, which"):
        load(tmp_path / "small.gguf")
    write_gguf(tmp_path, model, add={"blk.1.ffn_up.weight": np.zeros((20, 16), np.float32)})
    with pytest.raises(MemberError, match=r"layers\.1\.mlp\.up_proj\.weight of shape \[20, 16\]"):
        load(tmp_path / "small.gguf")
