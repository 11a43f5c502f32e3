"""Recipes whose experts are adapters on the anti-expert, from the shelf, and their oracle."""

from __future__ import annotations

from peft import PeftModel
from transformers import AutoModelForCausalLM

from proxytune import Expert, ProxyTunedForCausalLM
from support.oracle import Oracle


def adapted(weights, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(weights), adapter).eval()


def load(shelf, adapters=("adapter",), **kwargs):
    experts = [
        {
            "name": f"e{index}",
            "expert": {"model": str(shelf / "anti"), "adapter": str(shelf / adapter)},
            "anti_expert": {"model": str(shelf / "anti")},
            "alpha": 1.0 - 0.3 * index,
        }
        for index, adapter in enumerate(adapters)
    ]
    parsed = [Expert.parse(values) for values in experts]
    return ProxyTunedForCausalLM.from_members(str(shelf / "base"), experts=parsed, **kwargs)


def oracle_of(shelf, adapters=("adapter",)):
    anti = AutoModelForCausalLM.from_pretrained(shelf / "anti")
    return Oracle(
        AutoModelForCausalLM.from_pretrained(shelf / "base"),
        [(f"e{i}", adapted(shelf / "anti", shelf / a), anti, 1.0 - 0.3 * i) for i, a in enumerate(adapters)],
    )
