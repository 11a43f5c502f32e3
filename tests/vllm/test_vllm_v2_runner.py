"""The V2 model runner, whose kernels are Triton's: on a CPU by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.served import STRENGTHS, TEXTS, Reference, assert_all_same, expected, expert, guided, of_prompts

TESTS = Path(__file__).resolve().parents[1]
# Before vLLM is imported, which else finds no driver for Triton.
RUN = """
import json, sys, types
import triton.backends
sys.path[:0] = [sys.argv[1]]
class Driver:
    is_active = staticmethod(lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
from support.served import engine, submit, tokens_of
recipe, options, texts, extra = json.loads(sys.argv[2])
with engine(recipe, **options) as llm:
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    tokens = tokens_of(submit(llm, texts, extra))
    again = [tokens_of(submit(llm, [text], [one]))[0] for text, one in zip(texts, extra)]
kinds = [kind.__module__ for kind in type(runner).__mro__]
print("FOUND", json.dumps([kinds, tokens, again]))
"""


def on_v2(recipe, extra, **options):
    """Greedy tokens of all texts in one batch, and of each text alone."""
    asked = json.dumps([str(recipe), {"block_size": 32, "max_model_len": 256, **options}, TEXTS, extra])
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(TESTS), asked],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert told, done.stdout[-2000:] + done.stderr[-2000:]
    kinds, tokens, again = json.loads(told[0].removeprefix("FOUND "))
    assert "vllm.v1.worker.gpu.model_runner" in kinds, f"{kinds} is not the V2 runner"
    return tokens, again


def test_one_prompt_for_all(shelf):
    """Alphas, rules and gates of requests in one batch."""
    experts = [expert("e", "llama-small", "llama-anti", 0.6), expert("f", "qwen2-small", "qwen2-anti", 0.4)]
    recipe = shelf.recipe("of-v2", "llama", experts=experts, gate={"warmup": 6})
    extra = [{}, {"alpha.e": 2.0}, {"combine": "union"}, {"gate": "decay=5"}, {"gate": "unsure=0.5"}, {"alpha": 0.0}]
    wanted = expected(Reference(recipe), TEXTS, extra)
    for tokens in on_v2(recipe, extra):
        assert_all_same(tokens, wanted)


@pytest.mark.parametrize("kind", ["prompts", "guidance", "slides"])
def test_prompts_of_their_own(shelf, kind):
    """In chunks, with prefix caching; guidance on one set of weights; layers that slide."""
    name, long = f"{kind}-of-v2", "the quick brown fox jumps over the lazy dog, and the dog sleeps. " * 6 + "{prompt}"
    if kind == "guidance":
        recipe = guided(shelf, name, template="the lazy {prompt}")
    else:
        base, other = ("llama", "qwen2") if kind == "prompts" else ("gemma3", "mistral")
        recipe = of_prompts(shelf, name, base, other, expert="chat", anti_expert=long)
    wanted = expected(Reference(recipe), TEXTS, STRENGTHS)
    for tokens in on_v2(recipe, STRENGTHS, max_num_batched_tokens=24, enable_prefix_caching=True):
        assert_all_same(tokens, wanted)
