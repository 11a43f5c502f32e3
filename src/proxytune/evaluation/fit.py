"""The alpha under which gold answers are most probable, from one pass over them.

After a prompt and the gold tokens before it, the gold token's log-probability at some alpha is

    base[gold] + alpha * delta[gold] - log sum_v exp(base[v] + alpha * delta[v]),  delta = expert - anti_expert

Summed over an answer it is concave in alpha (under the rules sum and mean). So it is kept on a grid of alphas, which
takes a few dozen numbers per answer in place of the logits, and the maximum is that of the parabola through the best
point and its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.answers.generation import Encoded
from proxytune.decoding.mixing import Members, mix
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.statistics import bootstrap_of
from proxytune.recipe.rules import Steering

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["ALL", "GRID", "Fit", "check_fit", "curves", "fit", "fits", "gold_ids", "log_likelihoods", "read_gold"]

GRID = tuple(round(0.1 * step, 1) for step in range(31))  # alphas from 0 to 3
ALL = "all"  # the curve along which all experts have the same alpha


@dataclass(frozen=True)
class Fit:
    """The most likely alpha.

    Attributes:
        best: between 0 and the end of the grid. low, high: its 95 % interval, over answers drawn again; None for a
            single answer. at_end: whether the best one is the end of the grid, so that a larger one may be better.
        gain: by how many nats per token the answers are more probable there than at alpha 0.
    """

    best: float
    low: float | None
    high: float | None
    at_end: bool
    gain: float


def gold_ids(tokenizer: Any, encoded: Encoded, text: str) -> list[int]:
    """The ids of a gold answer, encoded separately from its prompt, without an end token.

    Raises:
        ProxyTuneError: for a text without a token, and for one that does not fit the members' contexts.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ProxyTuneError("a completion has no token")
    if encoded.room is not None and len(ids) > encoded.room:
        raise ProxyTuneError(f"a completion has {len(ids)} tokens, but there is room for {encoded.room}")
    return ids


@torch.inference_mode()
def read_gold(model: ProxyTunedForCausalLM, encoded: Encoded, ids: Sequence[int]) -> dict[str, Tensor]:
    """Every member's logits at the places of gold ``ids``, (1, n_tokens, n_vocab) each, from one pass of each.

    Args:
        encoded: the prompt. ids: the gold answer, at least one id; each is read after those before it.
    """
    read = torch.tensor([[*encoded.ids, *ids[:-1]]], device=model.device)
    own = {name: torch.tensor([row], device=model.device) for name, row in encoded.own.items()}
    more: dict[str, Any] = {"member_input_ids": own, "prompt_length": len(encoded.ids)} if own else {}
    return model(
        read, output_member_logits=True, gate="none", use_cache=False, logits_to_keep=len(ids), **more
    ).member_logits


def check_fit(steering: Steering) -> None:
    """Raise :class:`ProxyTuneError` for a rule whose alphas cannot be any number on the grid."""
    if steering.rule == "convex":
        raise ProxyTuneError("under the rule convex alphas sum to at most 1, so no alpha is fitted; use another rule")


def log_likelihoods(members: Members, gold: Tensor, alphas: Sequence[float], **how: Any) -> Tensor:
    """The log-probability of each gold token in the mixture, (n_tokens,), in nats; -inf where it can't be chosen.

    Args:
        members: logits of one row, (1, n_tokens, n_vocab) each. gold: ids, (n_tokens,). alphas: one value per expert.
        how: the other arguments of :func:`proxytune.decoding.mixing.mix`.
    """
    base, experts = members
    mixed = mix(base, experts, torch.tensor([list(alphas)], dtype=torch.float32), **how)[0]
    return mixed.log_softmax(dim=-1).gather(1, gold[:, None])[:, 0]


def curves(
    members: Members, gold: Tensor, names: Sequence[str], alphas: Sequence[float], **how: Any
) -> dict[str, list[float]]:
    """The log-probability of a gold answer along the grid: of :data:`ALL`, and of each of several experts.

    An expert's own curve leaves the others at ``alphas``. Tokens that can't be chosen at some alpha are left out.

    Args:
        members, gold, how: see :func:`log_likelihoods`. names: of the experts.
    """
    lines = {ALL: [(alpha,) * len(names) for alpha in GRID]}
    if len(names) > 1:
        for at, name in enumerate(names):
            lines[name] = [(*alphas[:at], alpha, *alphas[at + 1 :]) for alpha in GRID]
    found = {}
    for name, line in lines.items():
        of_tokens = torch.stack([log_likelihoods(members, gold, each, **how) for each in line])  # (n_alphas, n_tokens)
        possible = of_tokens.isfinite().all(dim=0)
        found[name] = of_tokens[:, possible].double().sum(dim=1).tolist()
    return found


def fit(of_answers: Sequence[Sequence[float]], n_tokens: int, seed: int = 0) -> Fit:
    """The most likely alpha of a set of answers.

    Args:
        of_answers: each answer's log-probability on the grid, see :func:`curves`. n_tokens: of all answers together.
        seed: of the bootstrap.
    """
    columns = list(zip(*of_answers))
    total = np.array(columns).sum(axis=1)
    best = float(_peak(total))
    low, high = bootstrap_of(lambda *means: _peak(np.stack(means)), columns, seed) or (None, None)
    return Fit(best, low, high, best >= GRID[-1], float(total.max() - total[0]) / max(n_tokens, 1))


def fits(of_answers: Sequence[Mapping[str, Sequence[float]]], n_tokens: int, seed: int = 0) -> dict[str, Any]:
    """The :func:`fit` of one alpha that all experts share, as JSON, and under ``by_expert`` that of each of several."""
    found = {name: asdict(fit([each[name] for each in of_answers], n_tokens, seed)) for name in of_answers[0]}
    return {**found.pop(ALL), "by_expert": found}


def _peak(heights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where curves over the grid are highest, (n_alphas, …) -> (…); the lowest alpha of a level curve."""
    step = GRID[1] - GRID[0]
    at = np.clip(heights.argmax(axis=0), 1, len(GRID) - 2)
    left, middle, right = (np.take_along_axis(heights, (at + by)[None], axis=0)[0] for by in (-1, 0, 1))
    bend = left - 2 * middle + right
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.array(GRID)[at] + 0.5 * step * (left - right) / bend
    vertex = np.where(bend < 0, vertex, np.array(GRID)[heights.argmax(axis=0)])
    return np.clip(vertex, GRID[0], GRID[-1])
