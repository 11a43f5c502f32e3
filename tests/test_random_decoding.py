"""Drafting changes no token: random set-ups of processors, rows, alphas and drafts against decoding without drafts."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from support import tiny
from support.decoding import QUIET, family_oracle

N_NEW = 16
PROCESSORS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[token] for token in range(60, 200)]},
    {"suppress_tokens": list(range(4, 90))},
    {"begin_suppress_tokens": list(range(4, 200))},
    {"sequence_bias": {(40,): 3.0, (300,): -5.0}},
    {"eos_token_id": list(range(100, 160))},
    {"eos_token_id": list(range(100, 300)), "min_new_tokens": 6},
    {"eos_token_id": 2, "forced_eos_token_id": 2},
    {"eos_token_id": 2, "exponential_decay_length_penalty": (8, 1.6)},
]
WARPERS = [{"temperature": 0.7}, {"temperature": 1.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]


@cache
def composite(family):
    model = tiny.compose(family_oracle(family))
    model.costs = replace(model.costs, apart=0.0)  # or "auto" would not draft for batches of models so small
    return model


@pytest.mark.parametrize("case", range(16))
def test_any_set_up_writes_the_same_tokens(case):
    draw = random.Random(case)
    model = composite(draw.choice(["llama", "gemma3", "gpt2"]))
    rows = [
        [tiny.BOS, *draw.choices(range(4, tiny.VOCAB), k=draw.randint(1, 14))] for _ in range(draw.choice([1, 1, 2, 4]))
    ]
    options = {**QUIET, "max_new_tokens": N_NEW}
    for processor in draw.sample(PROCESSORS, k=draw.randint(0, 3)):
        options |= processor
    if draw.random() < 0.5:
        options |= {"do_sample": True, "top_k": 0, "seed": case}
        for warper in draw.sample(WARPERS, k=draw.randint(0, 2)):
            options |= warper
    if draw.random() < 0.5:
        options["alpha"] = [round(draw.uniform(-0.5, 1.5), 2) for _ in rows]
    plain = model.generate(**tiny.padded(rows), **options, speculate=False).tolist()
    for speculate in ("auto", draw.randint(1, 8)):
        assert model.generate(**tiny.padded(rows), **options, speculate=speculate).tolist() == plain, (
            speculate,
            options,
        )
    assert model.speculation_stats.judged > 0 or len(plain[0]) == max(map(len, rows)) + 1, "nothing was drafted"
