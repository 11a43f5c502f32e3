"""The arithmetic of steering against the formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from proxytune.decoding.mixing import mix
from support.syncs import counted_syncs


def formula(base, experts, alpha, plausibility):
    """Equation 1 of 2401.08565, row by row and id by id."""
    sides = [side for pair in experts for side in pair if side is not None]
    width = min(logits.shape[-1] for logits in (base, *sides))
    mixed = np.full(base.shape, -np.inf)
    mixed[..., :width] = base[..., :width]
    for k, (expert, anti_expert) in enumerate(experts):
        for row in range(base.shape[0]):
            weight = alpha[row if len(alpha) > 1 else 0, k]
            if expert is not None:
                mixed[row, :, :width] += weight * expert[row, :, :width]
            if anti_expert is not None:
                mixed[row, :, :width] -= weight * anti_expert[row, :, :width]
    if plausibility is not None:
        p = np.exp(base[..., :width] - base[..., :width].max(axis=-1, keepdims=True))  # relative to the most likely
        mixed[..., :width][p < plausibility] = -np.inf
    return mixed


@st.composite
def mixtures(draw):
    n_batch, n_positions, n_experts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    value = st.floats(-30, 30, width=32)

    def member():
        shape = (n_batch, n_positions, draw(st.integers(2, 7)))
        return draw(arrays.arrays(np.float32, shape, elements=value))

    pairs = []
    for _ in range(n_experts):
        which = draw(st.sampled_from(["both", "expert", "anti-expert"]))
        pairs.append((member() if which != "anti-expert" else None, member() if which != "expert" else None))
    alpha = draw(
        arrays.arrays(np.float32, (draw(st.sampled_from([1, n_batch])), n_experts), elements=st.floats(-3, 3, width=32))
    )
    return member(), pairs, alpha, draw(st.none() | st.sampled_from([0.05, 0.3, 0.9]))


@settings(max_examples=200, deadline=None)
@given(mixtures())
def test_mix_is_the_formula(mixture):
    base, pairs, alpha, plausibility = mixture
    tensors = [tuple(None if side is None else torch.from_numpy(side) for side in pair) for pair in pairs]
    before = [side.clone() for pair in tensors for side in pair if side is not None]
    ours_base = torch.from_numpy(base.copy())
    ours = mix(ours_base, tensors, torch.from_numpy(alpha), plausibility=plausibility)

    expected = formula(base.astype(np.float64), pairs, alpha.astype(np.float64), plausibility)
    assert ours.dtype == torch.float32
    assert ours.shape == base.shape
    scale = 1e-5 * (1 + sum(abs(alpha).sum() * 30 for _ in pairs))
    if plausibility is not None:  # ids that lie on the threshold to within rounding may fall either way
        p = np.exp(base.astype(np.float64) - base[..., : ours.shape[-1]].max(axis=-1, keepdims=True))
        keep = abs(p - plausibility) > 1e-5
        np.testing.assert_allclose(ours.numpy()[keep], expected[keep], rtol=1e-4, atol=scale)
    else:
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=scale)
    after = [side for pair in tensors for side in pair if side is not None]
    assert torch.equal(ours_base, torch.from_numpy(base)), "the base's logits were changed"
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an expert's logits were changed"


def logits(*shape, seed=0, dtype=torch.float32, grad=False):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)
    return made.requires_grad_(grad)


ONE = torch.ones(1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_mixed_in_float32(dtype):
    base, expert, anti = (logits(2, 3, 50, seed=seed, dtype=dtype) for seed in range(3))
    mixed = mix(base, [(expert, anti)], 0.7 * ONE)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, base.float() + 0.7 * (expert.float() - anti.float()), rtol=1e-6, atol=1e-6)


def test_a_small_difference_survives_bfloat16_members():
    """In bfloat16, 100 + (20.125 - 20) would be 100."""
    base, expert, anti = (torch.tensor([[[value]]], dtype=torch.bfloat16) for value in (100.0, 20.125, 20.0))
    assert mix(base, [(expert, anti)], ONE).item() == 100.125


@pytest.mark.parametrize("grad", [(0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)], ids=str)
def test_gradients_flow_where_they_are_asked_for(grad):
    base, expert, anti = (logits(1, 2, 5, seed=seed, grad=bool(wanted)) for seed, wanted in enumerate(grad))
    alpha = torch.tensor([[0.5]])
    mix(base, [(expert, anti)], alpha).sum().backward()
    for tensor, wanted, slope in zip((base, expert, anti), grad, (1.0, 0.5, -0.5)):
        assert (tensor.grad is not None) == bool(wanted)
        if wanted:
            torch.testing.assert_close(tensor.grad, torch.full_like(tensor, slope))


def test_what_is_trained_in_float64_is_mixed_in_float32():
    base, expert = logits(1, 2, 5), logits(1, 2, 5, seed=1, dtype=torch.float64, grad=True)
    assert mix(base, [(expert, None)], ONE).dtype == torch.float32


def test_alpha_can_be_learned():
    base, expert, anti = (logits(1, 2, 5, seed=seed) for seed in range(3))
    alpha = torch.tensor([[0.5]], requires_grad=True)
    mix(base, [(expert, anti)], alpha).sum().backward()
    torch.testing.assert_close(alpha.grad, (expert - anti).sum().view(1, 1))


def test_nothing_is_changed_under_no_grad_or_inference():
    for context in (torch.no_grad(), torch.inference_mode()):
        base, expert, anti = (logits(1, 2, 5, seed=seed, grad=True) for seed in range(3))
        copies = [tensor.detach().clone() for tensor in (base, expert, anti)]
        with context:
            mix(base, [(expert, anti)], ONE, plausibility=0.5)
        assert all(torch.equal(a, b) for a, b in zip((base, expert, anti), copies))


def test_ids_that_some_member_lacks_are_minus_infinity():
    mixed = mix(logits(1, 1, 6), [(logits(1, 1, 4, seed=1), logits(1, 1, 8, seed=2))], ONE)
    assert mixed.shape == (1, 1, 6)
    assert torch.isfinite(mixed[..., :4]).all()
    assert (mixed[..., 4:] == -math.inf).all()


def test_the_shared_width_can_be_given():
    base, expert = logits(1, 1, 6), logits(1, 1, 6, seed=1)
    assert (mix(base, [(expert, None)], ONE, vocab_size=5)[..., 5:] == -math.inf).all()


def test_a_plausibility_of_1_keeps_the_bases_favourite():
    mixed = mix(torch.tensor([[[1.0, 2.0, 0.0]]]), [(torch.zeros(1, 1, 3), None)], ONE, plausibility=1.0)
    assert mixed.tolist() == [[[-math.inf, 2.0, -math.inf]]]


def test_plausibility_is_over_the_ids_that_can_be_chosen():
    """The base's favourite is an id that the expert lacks: the mask must not be empty."""
    base = torch.tensor([[[1.0, 2.0, 50.0]]])
    mixed = mix(base, [(torch.zeros(1, 1, 2), None)], ONE, plausibility=0.9)
    assert mixed.tolist() == [[[-math.inf, 2.0, -math.inf]]]


# -- tokens that a member excludes ----------------------------------------------------------------------------
def by_the_rule(base, pairs, alphas):
    """One token's mixture, as the docstring of ``mix`` says it."""
    if base == -math.inf:
        return -math.inf
    total = base
    for (expert, anti_expert), weight in zip(pairs, alphas):
        by_expert, by_anti_expert = expert == -math.inf, anti_expert == -math.inf
        if by_expert != by_anti_expert and ((weight > 0 and by_expert) or (weight < 0 and by_anti_expert)):
            return -math.inf
        if not (by_expert or by_anti_expert):
            total += weight * ((expert or 0.0) - (anti_expert or 0.0))
    return total


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_minus_infinity_excludes_and_never_gives_nan(data):
    value = st.floats(-30, 30, width=32) | st.just(-math.inf)
    side = st.none() | st.lists(value, min_size=4, max_size=4)
    base = data.draw(st.lists(value, min_size=4, max_size=4))
    pairs = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    alphas = data.draw(st.lists(st.sampled_from([-1.5, 0.0, 1.0]), min_size=len(pairs), max_size=len(pairs)))
    tensors = [tuple(one and torch.tensor([[one]]) for one in pair) for pair in pairs]
    mixed = mix(torch.tensor([[base]]), tensors, torch.tensor([alphas]))
    expected = [
        by_the_rule(base[i], [tuple(one and one[i] for one in pair) for pair in pairs], alphas) for i in range(4)
    ]
    np.testing.assert_allclose(mixed[0, 0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_an_exclusion_changes_no_other_logit():
    """Nor a row beside it: not even by rounding."""
    base, expert, anti = (logits(2, 3, 50, seed=seed) for seed in range(3))
    alpha = torch.tensor([[0.7], [-0.3]])
    plain = mix(base, [(expert, anti)], alpha)
    excluding = expert.clone()
    excluding[0, 1, 7] = -math.inf
    mixed = mix(base, [(excluding, anti)], alpha)
    assert mixed[0, 1, 7] == -math.inf
    mixed[0, 1, 7] = plain[0, 1, 7]
    assert torch.equal(mixed, plain)


def test_gradients_pass_by_an_excluded_token():
    base, expert, anti = (logits(1, 2, 5, seed=seed) for seed in range(3))
    expert[0, 0, 2] = anti[0, 1, 3] = base[0, 1, 1] = -math.inf
    for side in (base, expert, anti):
        side.requires_grad_(True)
    mixed = mix(base, [(expert, anti)], ONE)
    mixed.softmax(dim=-1)[..., 0].sum().backward()
    assert all(torch.isfinite(side.grad).all() for side in (base, expert, anti))


def test_a_members_nan_is_not_hidden():
    base, expert = logits(1, 1, 4), logits(1, 1, 4, seed=1)
    expert[0, 0, 2] = math.nan
    assert mix(base, [(expert, None)], ONE).isnan().tolist() == [[[False, False, True, False]]]
    assert mix(base, [(torch.full_like(expert, -math.inf), expert)], ONE).isnan().tolist()[0][0][2]


def test_mixing_never_waits_for_the_device():
    """Not even with excluded tokens, other widths and a mask."""
    base, expert, anti = logits(2, 3, 50), logits(2, 3, 40, seed=1), logits(2, 3, 60, seed=2)
    expert[0, 1, 7] = -math.inf
    with counted_syncs() as syncs:
        mix(base, [(expert, anti), (None, anti)], torch.ones(2, 2), plausibility=0.1)
    assert syncs == []
