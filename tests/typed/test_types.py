"""What callers get, by its type: mypy checks this file strictly, and it runs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from typing_extensions import assert_type

import proxytune
from proxytune import ProxyTunedCache, ProxyTunedForCausalLM, ProxyTunedOutput, TokenTrace, TracedOutput

IDS = torch.tensor([[1, 40, 77]])


@pytest.fixture(scope="module")
def model(shelf: Path) -> ProxyTunedForCausalLM:
    return assert_type(ProxyTunedForCausalLM.from_pretrained(shelf / "recipe"), ProxyTunedForCausalLM)


def test_generate(model: ProxyTunedForCausalLM) -> None:
    ids = model.generate(IDS, max_new_tokens=3)
    assert_type(ids, Tensor)
    assert isinstance(ids, Tensor)
    full = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, alpha=0.5)
    assert_type(full, GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput)
    assert isinstance(full, GenerateDecoderOnlyOutput)
    assert isinstance(model.generate(IDS, max_new_tokens=3, return_dict_in_generate=False), Tensor)
    traced = assert_type(model.generate(IDS, max_new_tokens=3, return_trace=True), TracedOutput)
    assert isinstance(assert_type(traced.traces[0][0], TokenTrace), TokenTrace)


def test_forward(model: ProxyTunedForCausalLM) -> None:
    output = model(IDS, output_member_logits=True)
    assert_type(output, ProxyTunedOutput)
    assert isinstance(output, ProxyTunedOutput)
    assert_type(output.logits, Tensor)
    assert_type(output.past_key_values, ProxyTunedCache | None)
    assert_type(output.member_logits["base"][0, -1], Tensor)
    assert_type(model.forward(input_ids=IDS, alpha=[0.5], use_cache=False), ProxyTunedOutput)
    parts = model(IDS, return_dict=False)
    assert_type(parts, tuple[Any, ...])
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], output.logits)


def test_texts(model: ProxyTunedForCausalLM) -> None:
    assert isinstance(assert_type(proxytune.generate(model, "the fox", max_new_tokens=3), str), str)
    assert len(assert_type(proxytune.generate(model, ["the fox", "a dog"], max_new_tokens=3), list[str])) == 2
