"""Alpha per request: its forms in a request, and the columns that carry it beside the hidden states.

A request has ``extra_args`` (``vllm_xargs`` in the OpenAI API), which can hold only scalars and flat lists:

    {"alpha": 0.5}                   for all experts {"alpha": [0.5, 1.0]}            one per expert, in the recipe's
    order {"alpha.math": 0.5}              for one expert by name; others use "alpha" or the recipe's
    {"combine": "mean"}              the rule by which several experts are joined
    {"gate": "unsure=0.9"}           where to steer; not ``between``, since a worker does not know an answer's text

The transformers engine takes the same (:func:`proxytune.recipe.alpha.take_alpha`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune.errors import RecipeError
from proxytune.recipe.alpha import resolve_alpha, take_alpha
from proxytune.recipe.parts import Expert
from proxytune.recipe.rules import Steering, check_rule

__all__ = ["PIECES", "Request", "join", "requested", "split"]

PIECES = 3  # three bfloat16 with 8 bits each hold the 24 bits of a float32 exactly


@dataclass(frozen=True)
class Request:
    """What a request asks for: one alpha per expert, and how they steer."""

    alphas: tuple[float, ...]
    steering: Steering


def requested(
    extra_args: Mapping[str, Any] | None, experts: Sequence[Expert], own: Steering, *, split: bool = False
) -> Request:
    """What a request asks for. Other keys of ``extra_args`` are ignored.

    Args:
        experts, own: the recipe's experts, and how they steer. split: whether vocabularies are split over processes,
            so that a request cannot ask for what needs them whole.

    Raises:
        AlphaError: for a value that is not finite or does not fit the rule, a list of another length, or an unknown
            name. RecipeError: for a rule or gate that is unknown or not possible.
    """
    names, others = [expert.name for expert in experts], dict(extra_args or {})
    steering = own.but(others.pop("combine", None), others.pop("gate", None))
    alpha = take_alpha(others, names, others.pop("alpha", None))
    row = resolve_alpha(alpha, names, [expert.alpha for expert in experts])
    check_rule(steering.rule, experts, [row])
    if steering.gate is not None and steering.gate.kind == "between":
        raise RecipeError(f"vLLM does not know the text of an answer, so the gate {steering.gate} is not possible here")
    if split and not steering.local:
        what = f"the gate {steering.gate}" if steering.gate is not None else f"the rule {steering.rule}"
        raise RecipeError(
            f"{what} needs whole vocabularies, which are split over processes here; leave it out, or name it in the "
            "recipe"
        )
    return Request(row, steering)


def split(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Alpha as columns of another dtype that sum to it: (n, n_experts) float32 -> (n, PIECES * n_experts)."""
    pieces, rest = [], alpha.float()
    for _ in range(PIECES):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    return torch.cat(pieces, dim=-1)


def join(columns: Tensor) -> Tensor:
    """The reverse of :func:`split`, float32."""
    return columns.float().unflatten(-1, (PIECES, -1)).sum(dim=-2)
