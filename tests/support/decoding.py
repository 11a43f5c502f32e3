"""Rows to continue, models that agree with each other half of the time, and what is read off a call of generate."""

from __future__ import annotations

import copy
from functools import cache

import torch

from support import tiny
from support.oracle import Oracle

ROWS = [[1, 40, 77, 102, 9, 33, 250, 61], [1, 88, 15], [1, 7, 300, 41, 12]]
QUIET = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
N_NEW = 24


def near(model, seed, by=0.03):
    """A copy with noise on its weights: it often agrees with the model, and often does not."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return other


def family_oracle(family, alpha=1.0, **config):
    base = tiny.model(family, "base", 1, **config)
    return Oracle(base, [("e", near(base, 2), near(base, 3), alpha)])


@cache
def family_answers(family):
    """The oracle of a family, and what it answers to ROWS. They are shared: never change them."""
    oracle = family_oracle(family)
    return oracle, [oracle.greedy(row, N_NEW) for row in ROWS]


def new_tokens(model, rows=None, n_new=N_NEW, **kwargs):
    batch = tiny.padded(rows or ROWS)
    out = model.generate(**batch, **{**QUIET, "max_new_tokens": n_new, **kwargs})
    return [row[batch["input_ids"].shape[1] :].tolist() for row in out]


def partly(stats):
    """Drafts were accepted, and drafts were rejected."""
    return 0 < stats.accepted < stats.judged
