"""The rule by which drafts are accepted, as pure functions of tensors, against exact numbers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from proxytune.decoding.acceptance import accept_greedy, accept_sampled

N_VOCAB = 5


def one_hot(*rows):
    """Scores whose best token is the one named, (n_batch, γ, n_vocab)."""
    return torch.nn.functional.one_hot(torch.tensor(rows), N_VOCAB).float()


# -- greedy ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_drafts", [1, 2, 3])
def test_greedy_accepts_the_longest_prefix_that_agrees(n_drafts):
    """Every draft against every best token, all of them rows of one batch."""
    pairs = list(product(product(range(3), repeat=n_drafts), repeat=2))
    drafts, best = (torch.tensor([pair[side] for pair in pairs]) for side in range(2))
    n_accepted, tokens = accept_greedy(drafts, one_hot(*best.tolist()))
    assert n_accepted.shape == tokens.shape == (len(pairs),)
    assert n_accepted.dtype == tokens.dtype == torch.long
    for (drafted, chosen), n, token in zip(pairs, n_accepted.tolist(), tokens.tolist(), strict=True):
        agree = next((at for at in range(n_drafts) if drafted[at] != chosen[at]), n_drafts)
        assert n == agree
        if agree < n_drafts:
            assert token == chosen[agree]


def test_greedy_looks_at_scores_of_any_size():
    scores = torch.tensor([[[-9.0, -3.0, -torch.inf], [0.2, 0.1, 0.15]]])
    assert [each.item() for each in accept_greedy(torch.tensor([[1, 2]]), scores)] == [1, 0]


# -- sampled --------------------------------------------------------------------------------------------------
def drawn(monkeypatch, number):
    """Every draft is compared with the same number in [0, 1)."""
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, number))


P = torch.tensor([[[0.5, 0.2, 0.2, 0.1, 0.0], [0.1, 0.6, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5, 0.5]]])
Q = torch.tensor([[[0.2, 0.4, 0.2, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1, 0.0], [0.2, 0.2, 0.2, 0.4, 0.0]]])


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("drafts", list(product(range(N_VOCAB), repeat=2)), ids=str)
@pytest.mark.parametrize("number", [0.0, 0.28, 0.55, 0.999])
def test_a_draft_is_accepted_with_probability_p_over_q(monkeypatch, drafts, number, looked_up):
    """And none after a rejected one, however likely it is."""
    drawn(monkeypatch, number)
    q = None if looked_up else Q
    n_accepted, _ = accept_sampled(torch.tensor([[*drafts, 3]]), P, q)
    expected = 0
    for at, draft in enumerate((*drafts, 3)):
        if not number * (1.0 if q is None else float(q[0, at, draft])) < float(P[0, at, draft]):
            break
        expected += 1
    assert n_accepted.tolist() == [expected]


def test_each_draft_of_each_row_is_compared_with_a_number_of_its_own():
    torch.manual_seed(0)
    rows = 2000
    p = torch.tensor([0.5, 0.5]).expand(rows, 2, 2)
    n_accepted, tokens = accept_sampled(torch.zeros(rows, 2, dtype=torch.long), p, None)
    assert n_accepted.shape == tokens.shape == (rows,)
    shares = torch.bincount(n_accepted, minlength=3) / rows
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.05, rtol=0)


def rests(monkeypatch):
    """What is drawn from in place of rejected drafts; the most probable token is taken."""
    seen = []

    def draw(weights, num_samples):
        seen.append(weights.clone())
        return weights.argmax(dim=1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)
    return seen


def test_a_rejected_draft_is_replaced_from_what_p_has_more_than_q(monkeypatch):
    drawn(monkeypatch, 0.999)
    seen = rests(monkeypatch)
    drafts = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]])  # rejected at 0, at 1 and at 2
    n_accepted, tokens = accept_sampled(drafts, P.expand(3, -1, -1), Q.expand(3, -1, -1))
    assert n_accepted.tolist() == [0, 1, 2]
    expected = [[0.3, 0, 0, 0, 0], [0, 0.3, 0, 0, 0], [0, 0, 0, 0.1, 0.5]]
    torch.testing.assert_close(seen[0], torch.tensor(expected))
    assert tokens.tolist() == [0, 1, 4]
    assert tokens.shape == (3,)


def test_a_rejected_lookup_is_replaced_from_all_but_itself(monkeypatch):
    drawn(monkeypatch, 0.999)
    seen = rests(monkeypatch)
    n_accepted, tokens = accept_sampled(torch.tensor([[0, 0, 0]]), P, None)
    assert n_accepted.tolist() == [0]
    torch.testing.assert_close(seen[0], torch.tensor([[0.0, 0.2, 0.2, 0.1, 0.0]]))
    assert tokens.tolist() == [1]


@pytest.mark.parametrize("looked_up", [False, True])
def test_where_p_and_q_agree_nothing_is_rejected(monkeypatch, looked_up):
    """And the token, which nobody uses then, is drawn from p, since nothing else is left to draw from."""
    seen = rests(monkeypatch)
    drawn(monkeypatch, 0.999)
    drafts = torch.tensor([[0, 1, 3], [2, 2, 4]])
    p = one_hot(*drafts.tolist()) if looked_up else P.expand(2, -1, -1)
    n_accepted, tokens = accept_sampled(drafts, p, None if looked_up else p.clone())
    assert n_accepted.tolist() == [3, 3]
    assert torch.equal(seen[0], p[:, -1])
    assert tokens.tolist() == p[:, -1].argmax(dim=-1).tolist()


def test_a_row_that_rejects_nothing_works_beside_one_that_does(monkeypatch):
    """Each row has a rest of its own to draw from."""
    seen = rests(monkeypatch)
    drawn(monkeypatch, 0.999)
    p, other = P[0, 0], Q[0, 0]
    n_accepted, tokens = accept_sampled(
        torch.tensor([[0], [1]]), torch.stack([p, p])[:, None], torch.stack([p, other])[:, None]
    )
    assert n_accepted.tolist() == [1, 0]
    torch.testing.assert_close(seen[0], torch.stack([p, (p - other).clamp(min=0)]))
    assert tokens.tolist() == [0, 0]


@pytest.mark.parametrize("looked_up", [False, True])
def test_the_first_token_has_ps_distribution(looked_up):
    """Over all drafts and all numbers, exactly: P(token) = sum over drafts of q(draft) P(token | draft) = p(token)."""
    p, q = P[0, 1], Q[0, 0]
    found = torch.zeros(N_VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        seen = rests(patch)
        for draft in range(N_VOCAB):
            chance = min(1.0, float(p[draft] / (1.0 if looked_up else q[draft])))
            for accepted, weight in ((True, chance), (False, 1 - chance)):
                if weight == 0:
                    continue
                drawn(patch, chance * 0.99 if accepted else chance + 0.01 * (1 - chance))
                n, _ = accept_sampled(torch.tensor([[draft]]), p[None, None], None if looked_up else q[None, None])
                assert bool(n) == accepted
                outcome = one_hot([draft])[0, 0] if accepted else seen[-1][0] / seen[-1].sum()
                found += (0.2 if looked_up else q[draft]) * weight * outcome
    torch.testing.assert_close(found, p)


def test_p_and_q_are_left_as_they_were():
    p, q = P.clone(), Q.clone()
    accept_sampled(torch.tensor([[1, 1, 1]]), p, q)
    accept_sampled(torch.tensor([[1, 1, 1]]), p, None)
    assert torch.equal(p, P)
    assert torch.equal(q, Q)
