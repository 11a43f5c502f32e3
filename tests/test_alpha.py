"""Alpha at load, per call, per row, per expert and by name, in every mode that multiplies rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune import AlphaError, ProxyTunedForCausalLM
from support import tiny
from support.decoding import QUIET, ROWS
from support.oracle import Oracle, assert_same_tokens


@pytest.fixture(scope="module")
def two(trio):
    """Two experts, ``a`` with an anti-expert and ``b`` without."""
    oracle = Oracle(trio.base, [("a", trio.expert, trio.anti_expert, 1.0), ("b", tiny.gemma3("mini", 5), None, 0.4)])
    return SimpleNamespace(oracle=oracle, model=tiny.compose(oracle))


@pytest.fixture(scope="module")
def one(trio):
    oracle = Oracle(trio.base, [("a", trio.expert, trio.anti_expert, 1.0)])
    return SimpleNamespace(oracle=oracle, model=tiny.compose(oracle))


@pytest.mark.parametrize(
    ("alpha", "rows"),
    [
        (None, [[1.0, 0.4]] * 3),
        (0.3, [[0.3, 0.3]] * 3),
        ([0.3, -1.0], [[0.3, -1.0]] * 3),
        ({"b": -1.0}, [[1.0, -1.0]] * 3),
        ({"a": [0.0, 0.5, 2.0]}, [[0.0, 0.4], [0.5, 0.4], [2.0, 0.4]]),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.5]]), [[0.0, 1.0], [1.0, 0.0], [-1.0, 0.5]]),
    ],
    ids=repr,
)
def test_alpha_per_call(two, alpha, rows):
    out = two.model.generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=8, alpha=alpha)
    for row, tokens, values in zip(ROWS, out[:, len(ROWS[0]) :], rows):
        assert_same_tokens(tokens, two.oracle.greedy(row, 8, values))


@pytest.mark.parametrize(("said", "alphas"), tiny.SPELLINGS, ids=repr)
@torch.no_grad()
def test_spellings_that_every_engine_takes(two, said, alphas):
    ids = torch.tensor([ROWS[0]])
    expected = two.oracle.greedy(ROWS[0], 4, alphas)
    assert_same_tokens(two.model.generate(ids, **QUIET, max_new_tokens=4, **said)[0, len(ROWS[0]) :], expected)
    torch.testing.assert_close(two.model(ids, **said).logits[0, -1], expected[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("said", "message"), tiny.MISSPELLINGS, ids=repr)
def test_misspellings_are_refused(two, said, message):
    with pytest.raises(AlphaError, match=message):
        two.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=1, **said)


def test_a_named_alpha_one_a_row(two):
    out = two.model.generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=6, alpha=0.5, **{"alpha.a": [0.0, 1.0, -1.5]})
    for row, tokens, values in zip(ROWS, out[:, len(ROWS[0]) :], [[0.0, 0.5], [1.0, 0.5], [-1.5, 0.5]]):
        assert_same_tokens(tokens, two.oracle.greedy(row, 6, values))


def test_names_beside_a_tensor_are_refused(two):
    with pytest.raises(AlphaError, match=r"together with 'alpha\.a'"):
        two.model.generate(torch.tensor([ROWS[0]]), **QUIET, alpha=torch.ones(1, 2), **{"alpha.a": 1.0})


def test_one_value_a_row(one):
    values = [0.0, 1.0, -1.5]
    out = one.model.generate(**tiny.padded(ROWS), **QUIET, max_new_tokens=8, alpha=values)
    for row, tokens, value in zip(ROWS, out[:, len(ROWS[0]) :], values):
        assert_same_tokens(tokens, one.oracle.greedy(row, 8, [value]))


@torch.no_grad()
def test_alpha_of_a_bare_forward(two):
    ids = torch.tensor([ROWS[0]] * 2)
    logits = two.model(ids, alpha={"a": [0.2, 0.9]}).logits
    for row, values in enumerate(([0.2, 0.4], [0.9, 0.4])):
        torch.testing.assert_close(logits[row, -1], two.oracle.logits(ROWS[0], [], values)[-1], rtol=1e-4, atol=1e-4)


def test_rows_keep_their_alpha_in_beams(one):
    """Each row of a batch with its own alpha finds the beams it finds alone."""
    values, options = [0.0, 1.0, -1.5], {**QUIET, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    together = one.model.generate(**tiny.padded(ROWS), **options, alpha=values)
    for index, (row, value) in enumerate(zip(ROWS, values)):
        alone = one.model.generate(torch.tensor([row]), **options, alpha=value)
        assert torch.equal(together[2 * index : 2 * index + 2, len(ROWS[0]) :], alone[:, len(row) :])
    by_hand = one.oracle.beams(ROWS[1], 6, 3, [values[1]])[:2]
    assert together[2:4, len(ROWS[0]) :].tolist() == [tokens for _, tokens in by_hand]


def test_rows_keep_their_alpha_in_several_draws(one):
    torch.manual_seed(0)
    values = [0.0, 1.0, -1.5]
    out = one.model.generate(
        **tiny.padded(ROWS), do_sample=True, top_k=0, eos_token_id=None, max_new_tokens=4, alpha=values,
        num_return_sequences=2, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    for index, sequence in enumerate(out.sequences):
        expected = one.oracle.logits(ROWS[index // 2], sequence[len(ROWS[0]) :].tolist(), [values[index // 2]])[:-1]
        torch.testing.assert_close(logits[index], expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("draft", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "base"}], ids=str)
def test_alpha_reaches_the_verification_of_drafts(one, draft):
    if "assistant_model" in draft:
        draft = {"assistant_model": one.oracle.base}
    out = one.model.generate(torch.tensor([ROWS[0]]), **QUIET, max_new_tokens=12, alpha=-0.8, **draft)
    assert_same_tokens(out[0, len(ROWS[0]) :], one.oracle.greedy(ROWS[0], 12, [-0.8]))


@pytest.mark.parametrize(
    "alpha", [math.nan, torch.tensor([[math.inf]]), [1.0, 2.0], {"x": 1.0}, "much", torch.ones(2, 1)], ids=repr
)
def test_a_bad_alpha_is_refused_before_anything_runs(one, alpha, monkeypatch):
    for lane in one.model.lanes:
        monkeypatch.setattr(lane.model, "forward", lambda *args, **kwargs: pytest.fail("a member ran"))
    with pytest.raises(AlphaError):
        one.model.generate(torch.tensor([ROWS[0]]), alpha=alpha, max_new_tokens=2)
    with pytest.raises(AlphaError):
        one.model(torch.tensor([ROWS[0]]), alpha=alpha)


def test_a_float64_alpha_leaves_the_mixture_float32(one):
    alpha = torch.tensor([[0.5]], dtype=torch.float64)
    out = one.model(torch.tensor([ROWS[0]]), alpha=alpha).logits
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, one.model(torch.tensor([ROWS[0]]), alpha=0.5).logits)


# -- at load --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("load", [ProxyTunedForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.25, [0.25]), ([-0.5], [-0.5]), ({"expert": 2}, [2.0]), (None, [1.0])], ids=repr
)
def test_alpha_at_load(shelf, load, alpha, expected):
    model = load.from_pretrained(shelf / "recipe", alpha=alpha)
    assert model.config.alphas == expected
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(model(ids).logits, model(ids, alpha=expected[0]).logits)
    assert not torch.equal(model(ids).logits, model(ids, alpha=expected[0] + 0.5).logits)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (math.nan, "alpha must be a finite number, not nan"),
        ("0.5", "alpha must be a finite number, not '0.5'"),
        (True, "must be a finite number, not True"),
        ([1.0, 2.0], r"2 alphas for 1 expert \(expert\)"),
        ({"chat": 1.0}, "no expert is called 'chat'; the recipe has expert"),
    ],
    ids=repr,
)
def test_a_bad_alpha_at_load(shelf, alpha, message):
    with pytest.raises(AlphaError, match=message):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", alpha=alpha)


def test_a_call_does_not_change_the_recipes_alpha(one):
    ids = torch.tensor([ROWS[0]])
    before = one.model(ids).logits
    one.model.generate(ids, alpha=0.1, max_new_tokens=2, **QUIET)
    torch.testing.assert_close(one.model(ids).logits, before)
    assert one.model.config.alphas == [1.0]
