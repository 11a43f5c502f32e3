"""Every family of models is exact in a recipe, or refused in one sentence when it is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from proxytune import MemberError, ProxyTuneConfig
from proxytune.lanes.reading import one_by_one, reading_of
from proxytune.recipe.check import check_recipe
from support import tiny
from support.decoding import QUIET
from support.oracle import Oracle, assert_same_tokens

ROWS = [[1, 40, 77, 102, 9, 33, 250, 61, 90, 91, 12], [1, 88, 15], [1, 7, 300, 41, 12]]
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
EXACT = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    "qwen3_next": {**LINEAR, "layer_types": MIXED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "num_heads": 4},
}
REFUSED = {
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8},
    "minimax": {"head_dim": 8, "num_local_experts": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bert": {},  # these look ahead, unless their configs make them decoders
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
}


def make(kind, seed, **more):
    """A small random model of any family."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "vocab_size": tiny.VOCAB, "max_position_embeddings": 256}
    ids = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    config = AutoConfig.for_model(kind, **ids, **shape, initializer_range=0.3, tie_word_embeddings=False, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", EXACT)
def test_a_family_is_exact_alone_in_a_batch_and_with_a_cache(kind):
    oracle = Oracle(make(kind, 1, **EXACT[kind]), [("e", make(kind, 2, **EXACT[kind]), tiny.llama("small", 3), 1.0)])
    model = tiny.compose(oracle)
    wanted = [oracle.greedy(row, 8) for row in ROWS]
    for row, expected in zip(ROWS, wanted):
        assert_same_tokens(model.generate(torch.tensor([row]), **QUIET, max_new_tokens=8)[0, len(row) :], expected)
    out = model.generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=8)
    for tokens, expected in zip(out[:, len(ROWS[0]) :], wanted):
        assert_same_tokens(tokens, expected)
    # Rows chosen and repeated, and several columns after a cache, as likelihoods and conversations read them.
    cache = model.new_cache()
    model(torch.tensor([ROWS[0], ROWS[0][::-1]]), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    logits = model(more, past_key_values=cache).logits
    for at, prompt in enumerate((ROWS[0][::-1], ROWS[0], ROWS[0][::-1])):
        expected = oracle.logits([*prompt, *more[at].tolist()], [])[-1]
        torch.testing.assert_close(logits[at, -1], expected, rtol=1e-3, atol=1e-3)


def test_states_are_repeated_with_their_rows():
    hybrid = make("falcon_h1", 1, **EXACT["falcon_h1"])
    model = tiny.compose(Oracle(hybrid, [("e", hybrid, None, 1.0)]))
    cache = model.new_cache()
    model(torch.tensor(ROWS[:1]), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    logits = model(torch.tensor([[5], [6]]), past_key_values=cache).logits
    for row, token in zip(logits, (5, 6)):
        expected = model(torch.tensor([[*ROWS[0], token]])).logits[0, -1]
        torch.testing.assert_close(row[-1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_whose_cache_cannot_be_used_is_refused_by_check_and_at_loading_alike(kind, tmp_path):
    made = make(kind, 1, **REFUSED[kind])
    with pytest.raises(MemberError, match=rf"^base cannot be used in a recipe: {type(made).__name__} "):
        tiny.compose(Oracle(made, [("e", tiny.llama("small", 2), tiny.llama("small", 3), 1.0)]))
    made.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    report = check_recipe(ProxyTuneConfig(base=str(tmp_path / "base"), experts=[{"expert": str(tmp_path / "base")}]))
    assert not report.works
    assert any(type(made).__name__ in problem for problem in report.problems), report.problems


class Forgetful(LlamaForCausalLM):
    """Its steps after a cache have lost their positions."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, position_ids=None, **inputs):
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            position_ids = torch.zeros_like(position_ids)
        inputs |= {"past_key_values": past_key_values, "use_cache": use_cache, "position_ids": position_ids}
        return super().forward(input_ids, **inputs)


def test_a_decoding_step_that_differs_from_reading_is_found():
    wrong = Forgetful(tiny.llama("small", 1).config)
    with pytest.raises(MemberError, match=r"^e\.expert cannot be used .* gives other logits with a cache than"):
        tiny.compose(Oracle(tiny.llama(), [("e", wrong.eval(), None, 1.0)]))


def test_what_cannot_be_read_in_pieces_or_after_padding_is_distinguished():
    assert reading_of(tiny.llama()) == reading_of(tiny.gemma3())
    assert reading_of(tiny.llama()).in_pieces
    assert not reading_of(make("jamba", 1, **EXACT["jamba"])).in_pieces
    model = make("trocr", 1, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32)
    assert not reading_of(model).padded
    with pytest.raises(ValueError, match="gives other logits behind padding"):
        tiny.compose(Oracle(model, [("e", model, None, 1.0)])).generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=2)


def test_one_column_at_a_time_is_all_columns_at_once():
    model = tiny.llama("small", 2)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    inputs = {"past_key_values": None, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(5)[None]}
    inputs["past_key_values"] = model(ids[:, :2]).past_key_values
    inputs["position_ids"] = inputs["position_ids"][:, 2:]
    logits = one_by_one(lambda ids, **own: model(ids, **own).logits, ids[:, 2:], inputs)
    torch.testing.assert_close(logits, model(ids).logits[:, 2:])
