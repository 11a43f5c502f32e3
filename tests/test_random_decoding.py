"""Drafting changes no token: random set-ups of processors, rows, alphas, rules, gates and drafts against no drafts."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from support import tiny
from support.decoding import QUIET, family_oracle, near
from support.oracle import Oracle

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


class Noisy(LogitsProcessor):
    """Noise and bans that a seed, a row's last tokens and, if asked, its length decide: a user's own processor."""

    row_by_row = True  # it may be called for drafts

    def __init__(self, seed, n_last, by_length):
        self.seed, self.n_last, self.by_length = seed, n_last, by_length

    def __call__(self, input_ids, scores):
        length = input_ids.shape[1] if self.by_length else 0
        noisy = scores.clone()
        for row, ids in zip(noisy, input_ids.tolist()):
            noise = torch.Generator().manual_seed(hash((self.seed, length, *ids[len(ids) - self.n_last :])) % 2**63)
            row += torch.randn(row.shape, generator=noise)
            row[torch.rand(row.shape, generator=noise) < 0.3] = -torch.inf
        return noisy


def several_experts():
    """Two experts with both sides, and one without an anti-expert."""
    base = tiny.llama("base", 1)
    pairs = [("a", near(base, 2), near(base, 3), 0.7), ("b", near(base, 4), near(base, 5), -0.4)]
    return Oracle(base, [*pairs, ("c", near(base, 6), None, 0.2)])


@cache
def composite(family):
    model = tiny.compose(several_experts() if family == "several" else family_oracle(family))
    model.costs = replace(model.costs, apart=0.0)  # or "auto" would not draft for batches of models so small
    return model


@pytest.mark.parametrize("case", range(24))
def test_any_set_up_writes_the_same_tokens(case):
    draw = random.Random(case)
    model = composite(draw.choice(["llama", "gemma3", "gpt2", "several", "several"]))
    rows = [
        [tiny.BOS, *draw.choices(range(4, tiny.VOCAB), k=draw.randint(1, 14))] for _ in range(draw.choice([1, 1, 2, 4]))
    ]
    options = {**QUIET, "max_new_tokens": N_NEW}
    for processor in draw.sample(PROCESSORS, k=draw.randint(0, 3)):
        options |= processor
    if draw.random() < 0.5:
        own = [Noisy(draw.randrange(1000), draw.randint(1, 2), draw.random() < 0.5) for _ in range(draw.randint(1, 2))]
        options["logits_processor"] = LogitsProcessorList(own)
    if draw.random() < 0.5:
        options |= {"do_sample": True, "top_k": 0, "seed": case}
        for warper in draw.sample(WARPERS, k=draw.randint(0, 2)):
            options |= warper
    if draw.random() < 0.5:
        options["alpha"] = [[round(draw.uniform(-0.5, 1.5), 2) for _ in model.experts] for _ in rows]
    if draw.random() < 0.6:
        options["gate"] = draw.choice(["unsure=0.12", "entropy=4.2", "kl=0.2"])
    whole = all(expert.expert is not None and expert.anti_expert is not None for expert in model.experts)
    options["combine"] = draw.choice(["sum", "mean", *(("dynamic", "union", "intersection") if whole else ())])
    plain = model.generate(**tiny.padded(rows), **options, speculate=False).tolist()
    for speculate in ("auto", draw.randint(1, 8)):
        assert model.generate(**tiny.padded(rows), **options, speculate=speculate).tolist() == plain, (
            speculate,
            options,
        )
    assert model.speculation_stats.judged > 0 or len(plain[0]) == max(map(len, rows)) + 1, "nothing was drafted"
