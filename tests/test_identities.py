"""Laws that hold whatever the models: the strength zero is the base, equals cancel, a batch is its rows."""

from __future__ import annotations

import math

import pytest
import torch

from proxytune import ProxyTunedForCausalLM
from support import tiny
from support.decoding import QUIET, ROWS
from support.oracle import Oracle, assert_same_tokens

MODES = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
]


def same_as_base(model, base, **options):
    """The composite's answers to a ragged batch are the base's own, in the same mode from the same seed.

    Without drafts, which draw other samples from one seed.
    """
    batch, answers = tiny.padded(ROWS), []
    for each in (model, base):
        torch.manual_seed(0)
        plain = {"speculate": False} if each is model else {}
        answers.append(each.generate(**batch, **{**QUIET, "max_new_tokens": 12, **options, **plain}))
    return torch.equal(*answers)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def base(request):
    return tiny.model(request.param, "base", 1)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_alpha_zero_is_the_base(base, trio, options):
    model = ProxyTunedForCausalLM.from_members(base, trio.expert, trio.anti_expert, alpha=0.0)
    assert same_as_base(model, base, **options)
    steered = ProxyTunedForCausalLM.from_members(base, trio.expert, trio.anti_expert)
    assert not same_as_base(steered, base, **options), "steered, the answers differ"


@pytest.mark.parametrize("options", MODES, ids=str)
def test_an_expert_that_is_the_anti_expert_cancels(base, trio, options):
    """Its copy too: equal weights in two models."""
    for expert in (trio.anti_expert, tiny.qwen2("small", 3)):
        model = ProxyTunedForCausalLM.from_members(base, expert, trio.anti_expert, alpha=0.5)
        assert same_as_base(model, base, **options)


@torch.no_grad()
def test_alpha_zero_has_the_bases_logits(base, trio):
    ids = torch.tensor([ROWS[0]])
    model = ProxyTunedForCausalLM.from_members(base, trio.expert, trio.anti_expert, alpha=0.0)
    torch.testing.assert_close(model(ids).logits, base(ids).logits)


@torch.no_grad()
def test_a_batch_equals_its_rows(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    batch = tiny.padded(ROWS)
    together = model.generate(**batch, **QUIET, max_new_tokens=16)
    for row, tokens in zip(ROWS, together):
        alone = model.generate(torch.tensor([row]), **QUIET, max_new_tokens=16)[0, len(row) :]
        assert torch.equal(tokens[len(ROWS[0]) :], alone)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, -0.7, 2.5])
def test_logits_are_linear_in_alpha(trio, alpha):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    ids = torch.tensor([ROWS[0]])
    zero, one, other = (model(ids, alpha=value).logits for value in (0.0, 1.0, alpha))
    torch.testing.assert_close(other, zero + alpha * (one - zero), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_negative_alpha_swaps_expert_and_anti_expert(trio):
    ids = torch.tensor([ROWS[0]])
    away = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, alpha=-0.8)
    swapped = ProxyTunedForCausalLM.from_members(trio.base, trio.anti_expert, trio.expert, alpha=0.8)
    torch.testing.assert_close(away(ids).logits, swapped(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_experts_of_one_strength_are_one_of_twice_it(trio):
    ids = torch.tensor([ROWS[0]])
    half = {"expert": trio.expert, "anti_expert": trio.anti_expert, "alpha": 0.5}
    twice = ProxyTunedForCausalLM.from_members(trio.base, experts=[half, half])
    once = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert, alpha=1.0)
    torch.testing.assert_close(twice(ids).logits, once(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("plausibility", [0.1, 0.5, 1.0])
def test_contrastive_decoding(trio, plausibility):
    """No expert, a weak anti-expert, and only what the base finds plausible (2210.15097)."""
    oracle = Oracle(trio.base, [("e", None, trio.anti_expert, 0.8)], plausibility)
    model = tiny.compose(oracle)
    for row in ROWS:
        out = model.generate(torch.tensor([row]), **QUIET, max_new_tokens=10)
        assert_same_tokens(out[0, len(row) :], oracle.greedy(row, 10))
    if plausibility == 1.0:  # only the base's own first choice is left
        assert same_as_base(model, trio.base)


@torch.no_grad()
def test_the_plausibility_mask_is_its_formula(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, None, trio.anti_expert, plausibility=0.2)
    ids = torch.tensor([ROWS[0]])
    logits, p = model(ids).logits, trio.base(ids).logits.softmax(dim=-1)
    assert torch.equal(logits == -math.inf, p < 0.2 * p.amax(dim=-1, keepdim=True))


@torch.no_grad()
def test_the_mean_of_logits_is_a_recipe(trio):
    """base + 1/2 expert - 1/2 base, the control that has no anti-expert in it."""
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.base, alpha=0.5)
    ids = torch.tensor([ROWS[0]])
    mean = (trio.base(ids).logits + trio.expert(ids).logits) / 2
    torch.testing.assert_close(model(ids).logits, mean, rtol=1e-4, atol=1e-4)
    assert len(model.lanes) == 2, "the base is loaded and run once"


@torch.no_grad()
def test_an_ensemble_is_an_expert_without_anti_expert(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, alpha=0.3)
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(
        model(ids).logits, trio.base(ids).logits + 0.3 * trio.expert(ids).logits, rtol=1e-4, atol=1e-4
    )


# -- the same weights are computed once -----------------------------------------------------------------------
def count_forwards(model, rows=1):
    """Rows that each lane's model read in one forward of the composite."""
    seen, handles = [], []
    for lane in model.lanes:
        handles.append(
            lane.model.register_forward_pre_hook(
                lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
            )
        )
    model(torch.tensor([ROWS[0]] * rows))
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_one_model_in_two_places_runs_once(trio):
    model = ProxyTunedForCausalLM.from_members(
        trio.base,
        experts=[
            {"name": "a", "expert": trio.expert, "anti_expert": trio.anti_expert},
            {"name": "b", "expert": tiny.llama("mini", 5), "anti_expert": trio.anti_expert},
            {"name": "c", "expert": trio.base},
        ],
    )
    assert len(model.lanes) == 4
    assert count_forwards(model, rows=3) == [3, 3, 3, 3]
    assert model.member("a.anti_expert") is model.member("b.anti_expert")
    assert model.member("c.expert") is model.base
    for name, given in (("a.anti_expert", trio.anti_expert), ("base", trio.base)):
        ours = dict(model.member(name).named_parameters())
        assert all(ours[weight] is parameter for weight, parameter in given.named_parameters()), "no copy of a weight"


@torch.no_grad()
def test_one_directory_in_two_places_is_loaded_once(shelf):
    model = ProxyTunedForCausalLM.from_members(
        str(shelf / "base"),
        experts=[
            {"name": "a", "expert": str(shelf / "expert"), "anti_expert": str(shelf / "anti")},
            {"name": "b", "anti_expert": str(shelf / "anti"), "alpha": 0.2},
        ],
    )
    assert len(model.lanes) == 3
    assert count_forwards(model) == [1, 1, 1]


@torch.no_grad()
def test_member_logits_are_each_members_own(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    ids = torch.tensor([ROWS[0]])
    assert model(ids).member_logits is None
    out = model(ids, output_member_logits=True)
    assert list(out.member_logits) == ["base", "expert.expert", "expert.anti_expert"]
    for name, member in (("base", trio.base), ("expert.expert", trio.expert), ("expert.anti_expert", trio.anti_expert)):
        torch.testing.assert_close(out.member_logits[name], member(ids).logits)


# -- the shape of a forward -----------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(trio, keep):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    ids = torch.tensor([ROWS[0]])
    full = model(ids).logits
    kept = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, kept)


@torch.no_grad()
def test_a_tuple_on_request(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    ids = torch.tensor([ROWS[0]])
    logits, _cache = model(ids, return_dict=False)[:2]
    assert torch.equal(logits, model(ids).logits)


@torch.no_grad()
def test_the_loss_is_that_of_the_mixed_logits(trio):
    model = ProxyTunedForCausalLM.from_members(trio.base, trio.expert, trio.anti_expert)
    ids = torch.tensor(ROWS[:1])
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, 2:-1], ids[0, 3:])
    torch.testing.assert_close(out.loss, expected)


def test_gradients_reach_only_what_is_trained():
    base, expert, anti = tiny.llama("small", 1), tiny.qwen2("mini", 2), tiny.qwen2("mini", 3)
    expert.requires_grad_(True)
    model = ProxyTunedForCausalLM.from_members(base, expert, anti)
    model(torch.tensor(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss.backward()
    assert all(p.grad is not None for p in expert.parameters())
    assert all(p.grad is None for frozen in (base, anti) for p in frozen.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.float16)], ids=str)
def test_mixing_is_float32_whatever_the_members_are(dtypes):
    members = [
        build(size, seed).to(dtype)
        for build, size, seed, dtype in zip(
            (tiny.llama, tiny.qwen2, tiny.qwen2), ("base", "small", "small"), (1, 2, 3), dtypes
        )
    ]
    ids = torch.tensor([ROWS[0]])
    out = ProxyTunedForCausalLM.from_members(*members, alpha=1.5)(ids, output_member_logits=True)
    base, expert, anti = (member(ids).logits for member in members)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, base.float() + 1.5 * (expert.float() - anti.float()), rtol=1e-6, atol=1e-6)
