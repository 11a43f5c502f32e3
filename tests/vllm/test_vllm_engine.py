"""One engine in this process: its greedy tokens are the transformers engine's, whatever vLLM does with the batch."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from served import N_NEW, ROWS, Reference, assert_all_same, engine, expert, generate


@pytest.mark.parametrize("base", tiny.FAMILIES)
def test_families_ragged_mixed_alpha(shelf, base):
    """A base of each family, steered by an expert of another; three strengths in one batch."""
    families = list(tiny.FAMILIES)
    other = families[(families.index(base) + 1) % len(families)]
    recipe = shelf.recipe(f"of-{base}", base, experts=[expert("e", f"{other}-small", f"{other}-anti", 0.8)])
    with engine(recipe) as llm:
        extra = [{}, {"alpha": 0.0}, {"alpha": [-0.5]}, {"alpha.e": 2.0}]
        tokens = generate(llm, ROWS, alphas=extra)
    assert_all_same(tokens, Reference(recipe).greedy(ROWS, alpha=[[0.8], [0.0], [-0.5], [2.0]]))
