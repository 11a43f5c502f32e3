"""Two workers: tensor and pipeline parallelism."""

from __future__ import annotations

import pytest

from served import ROWS, Reference, assert_all_same, engine, expert, generate

EXTRA = [{}, {"alpha": 0.0}, {"alpha": [-0.5, 1.0]}, {"alpha.e": 2}]
ALPHAS = [[0.8, 0.3], [0.0, 0.0], [-0.5, 1.0], [2.0, 0.3]]


# vLLM's CPU runner makes room for what a stage receives only while it warms up, which eager engines skip.
@pytest.mark.parametrize(
    ("ways", "gathers"),
    [({"tensor_parallel_size": 2}, True), ({"pipeline_parallel_size": 2, "enforce_eager": False}, False)],
    ids=["tensor", "pipeline"],
)
def test_two_workers(shelf, monkeypatch, ways, gathers):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    recipe = shelf.recipe(
        f"of-two-{gathers}",
        "llama",
        experts=[expert("e", "qwen2-small", "qwen2-anti", 0.8), expert("f", "mistral-small", "mistral-anti", 0.3)],
    )
    with engine(recipe, **ways, distributed_executor_backend="mp") as llm:
        tokens = generate(llm, ROWS, alphas=EXTRA)
        gathered = llm.apply_model(has_one_gather)
    assert_all_same(tokens, Reference(recipe).greedy(ROWS, alpha=ALPHAS))
    assert gathered == [gathers, gathers], "heads that are split alike are mixed first and gathered once"


def has_one_gather(model):
    return model.gather is not None
