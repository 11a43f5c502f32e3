"""Alpha per request: its forms in a request, and the columns that carry it beside the hidden states.

A request has ``extra_args`` (``vllm_xargs`` in the OpenAI API), which can hold only scalars and flat lists:

    {"alpha": 0.5}                   for all experts {"alpha": [0.5, 1.0]}            one per expert, in the recipe's
    order {"alpha.math": 0.5}              for one expert by name; others use "alpha" or the recipe's
    {"combine": "mean"}              the rule by which several experts are joined

The transformers engine takes the same (:func:`proxytune.recipe.alpha.take_alpha`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.errors import RecipeError
from proxytune.recipe.alpha import resolve_alpha, take_alpha
from proxytune.recipe.parts import Expert
from proxytune.recipe.rules import RULES, Rule, check_rule, rule_of

__all__ = ["PIECES", "join", "requested", "split"]

PIECES = 3  # three bfloat16 with 8 bits each hold the 24 bits of a float32 exactly


def requested(
    extra_args: Mapping[str, Any] | None, experts: Sequence[Expert], combine: Rule, possible: Sequence[Rule]
) -> list[float]:
    """The alpha of each expert for one request, and the number of its rule. Other keys of ``extra_args`` are ignored.

    Args:
        experts, combine: the recipe's. possible: the rules that this engine can apply.

    Raises:
        AlphaError: for a value that is not finite or does not fit the rule, a list of another length, or an unknown
            name. RecipeError: for a rule that is unknown or not possible.
    """
    names, others = [expert.name for expert in experts], dict(extra_args or {})
    rule = rule_of(others.pop("combine", combine))
    alpha = take_alpha(others, names, others.pop("alpha", None))
    row = resolve_alpha(alpha, names, [expert.alpha for expert in experts])
    check_rule(rule, experts, [row])
    if rule not in possible:
        raise RecipeError(
            f"the rule {rule} needs whole vocabularies, which are split over processes here; use one of "
            f"{', '.join(possible)}, or name it in the recipe"
        )
    return [*row, float(RULES.index(rule))]


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
