"""Static caches and compiled members change the speed and nothing else."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune import MemberError, ProxyTuneError
from proxytune.lanes.buffers import BufferLayer
from support import tiny
from support.decoding import QUIET, ROWS, family_answers, family_oracle, new_tokens, partly
from support.oracle import Oracle, assert_same_tokens

STATIC = {"cache_implementation": "static"}


def layers(model):
    """All layers of the cache that a call of generate() leaves."""
    out = model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=2, return_dict_in_generate=True, **STATIC)
    return out.past_key_values.layers


@pytest.mark.parametrize("speculate", [False, 3, "auto"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_static_caches_give_the_plain_loops_tokens(family, speculate):
    oracle, answers = family_answers(family)
    model = tiny.compose(oracle)
    assert_same_tokens(new_tokens(model, [ROWS[0]], speculate=speculate, **STATIC)[0], answers[0])
    for ours, theirs in zip(new_tokens(model, speculate=speculate, **STATIC), answers):
        assert_same_tokens(ours, theirs)
    assert speculate != 3 or partly(model.speculation_stats)
    assert all(isinstance(layer, BufferLayer) for layer in layers(model))


@pytest.mark.slow
def test_rows_that_drift_apart_for_long_fit_the_buffers():
    """Rejected drafts become padding at the left, which is dropped before it fills the spare columns."""
    oracle = family_oracle("llama", max_position_embeddings=512)
    model = tiny.compose(oracle)
    for ours, theirs in zip(
        new_tokens(model, n_new=200, speculate=8, **STATIC), new_tokens(model, n_new=200, speculate=False)
    ):
        assert ours == theirs


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"do_sample": True, "seed": 1}]
)
def test_other_strategies_take_static_caches(how):
    model = tiny.compose(family_oracle("llama"))
    how = dict(how)
    seed = how.pop("seed", 0)
    rows = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(seed)
        rows.append(new_tokens(model, n_new=8, cache_implementation=cache, speculate=False, **how))
    assert rows[0] == rows[1]


def test_what_keeps_more_than_keys_and_values_is_refused(monkeypatch):
    model = tiny.compose(family_oracle("llama"))
    monkeypatch.setattr("proxytune.lanes.buffers.can_roll_back", lambda cache: False)
    with pytest.raises(ProxyTuneError, match="static caches are for attention layers, and a member has others"):
        new_tokens(model, n_new=2, **STATIC)


# -- compiled members -------------------------------------------------------------------------------------------
def test_an_unknown_mode_is_refused():
    with pytest.raises(MemberError, match=r"compile is True or one of torch\.compile's modes, .*, not 'faster'"):
        tiny.compose(family_oracle("llama"), compile="faster")


@pytest.mark.slow
def test_prompts_are_not_compiled_and_static_caches_go_with_it(monkeypatch):
    seen = []
    real = torch.compile

    @wraps(real)
    def eager(function, **how):
        seen.append(how)
        return real(function, **{**how, "backend": "eager", "mode": None})

    monkeypatch.setattr(torch, "compile", eager)
    oracle = family_oracle("llama")
    model = tiny.compose(oracle, pack=True, compile=True)
    assert [how["dynamic"] for how in seen] == [True] * len(model.lanes)
    assert_same_tokens(new_tokens(model, [ROWS[0]])[0], oracle.greedy(ROWS[0], 24))
    assert model.cache_implementation == "static"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own compiler uses it
@pytest.mark.parametrize("pack", [False, True])
def test_compiled_members_give_the_plain_loops_tokens(pack):
    oracle = Oracle(tiny.llama("base", 1), [("e", tiny.qwen2("small", 2), tiny.qwen2("small", 3), 1.0)])
    answers = [oracle.greedy(row, 12) for row in ROWS]
    again = Oracle(tiny.llama("base", 1), [("e", tiny.qwen2("small", 2), tiny.qwen2("small", 3), 1.0)])
    model = tiny.compose(again, pack=pack, compile=True)
    torch._dynamo.reset()
    for speculate in (False, 2):
        assert_same_tokens(new_tokens(model, [ROWS[0]], n_new=12, speculate=speculate)[0], answers[0])
    before = dict(torch._dynamo.utils.counters["frames"])
    assert before["ok"] > 0
    assert before["ok"] == before["total"], "something was not compiled"
    for length in (3, 7):  # other lengths need no other kernels
        new_tokens(model, [ROWS[0][:length]], n_new=12, speculate=False)
    assert dict(torch._dynamo.utils.counters["frames"]) == before


def test_from_pretrained_compiles(shelf, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: setattr(module, "compiled_with", how))
    model = AutoModelForCausalLM.from_pretrained(shelf / "recipe", compile="max-autotune")
    assert {lane.model.base_model.compiled_with["mode"] for lane in model.lanes} == {"max-autotune"}
