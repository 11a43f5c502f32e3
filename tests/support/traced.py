"""Traces compared with the plain loop: three forwards per token, and alphas tried one by one."""

from __future__ import annotations

import pytest
import torch

CLOSE = {"abs": 1e-3}


def top(scores, k):
    return {i for i in scores.topk(k).indices.tolist() if scores[i] > -torch.inf}


def hold(oracle, prompts, trace, alphas=None, k=5):
    """Compare a row's trace with full forwards of every member."""
    tokens = [each.id for each in trace]
    logits = oracle.member_logits(prompts, tokens)
    width = min(member.shape[-1] for member in logits.values())
    alphas = [alpha for *_, alpha in oracle.experts] if alphas is None else alphas
    for at, token in enumerate(trace):
        here = {name: member[at, :width].double() for name, member in logits.items()}
        logs = {name: member.log_softmax(dim=-1) for name, member in here.items()}
        base, mixed = logs["base"], oracle.mix(here, alphas)[:width].double()
        mixture = mixed.log_softmax(dim=-1)
        p, q = mixture.exp(), base.exp()
        possible = p > 0
        delta = {
            name: logs.get(f"{name}.expert", 0.0) - logs.get(f"{name}.anti_expert", 0.0) for name, *_ in oracle.experts
        }
        assert token.base_logprob == pytest.approx(float(base[token.id]), **CLOSE)
        assert token.mixture_logprob == pytest.approx(float(mixture[token.id]), **CLOSE)
        assert token.base_rank == 1 + int((base > base[token.id]).sum())
        assert token.base_entropy == pytest.approx(float(-(q * base).sum()), **CLOSE)
        assert token.entropy == pytest.approx(float(-(p * mixture)[possible].sum()), **CLOSE)
        assert token.kl == pytest.approx(float((p * (mixture - base))[possible].sum()), **CLOSE)
        assert token.changed == (int(base.argmax()) != int(mixture.argmax()))
        expected = {name: alpha * float(delta[name][token.id]) for name, alpha in zip(delta, alphas)}
        assert token.offsets == pytest.approx(expected, **CLOSE)

        assert {each.id for each in token.candidates} == set().union(
            *(top(each, k) for each in (mixture, *logs.values()))
        )
        for each in token.candidates:
            assert each.base_logprob == pytest.approx(float(base[each.id]), **CLOSE)
            assert each.mixture_logprob == pytest.approx(float(mixture[each.id]), **CLOSE)
            experts = {name: logs[f"{name}.expert"] for name in delta if f"{name}.expert" in logs}
            expected = {name: float(log_p[each.id]) for name, log_p in experts.items()}
            assert each.expert_logprob == pytest.approx(expected, **CLOSE)
            assert each.delta == pytest.approx({name: float(delta[name][each.id]) for name in delta}, **CLOSE)
            cut = oracle.plausibility is not None and float(q[each.id]) < oracle.plausibility * float(q.max())
            assert each.masked == cut
        order = [float(mixture[each.id]) for each in token.candidates]
        assert order == sorted(order, reverse=True)
        for index, name in enumerate(delta):
            hold_flips(oracle, here, alphas, index, token.flips[name])


def hold_flips(oracle, logits, alphas, index, steps):
    """Try alphas one by one: each has the choice that the steps say, wherever that choice is clear."""
    assert steps[0][0] == 0
    starts = [alpha for alpha, _ in steps]
    assert starts == sorted(starts)
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], 3.0])]
    n_clear = 0
    for alpha in [*(n / 50 for n in range(151)), *middles]:
        tried = [*alphas]
        tried[index] = alpha
        mixed = oracle.mix(logits, tried)
        first, second = mixed.topk(2).values.tolist()
        if first - second > 1e-3:
            n_clear += 1
            assert int(mixed.argmax()) == [i for start, i in steps if start <= alpha][-1]
    assert n_clear > 100
