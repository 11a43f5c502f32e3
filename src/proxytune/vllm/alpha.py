"""Alpha per request: its forms in a request, and the columns that carry it beside the hidden states.

A request has ``extra_args`` (``vllm_xargs`` in the OpenAI API), which can hold only scalars and flat lists:

    {"alpha": 0.5}                   for all experts {"alpha": [0.5, 1.0]}            one per expert, in the recipe's
    order {"alpha.math": 0.5}              for one expert by name; others use "alpha" or the recipe's

The transformers engine takes the same (:func:`proxytune.recipe.alpha.take_alpha`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.recipe.alpha import resolve_alpha, take_alpha

__all__ = ["PIECES", "join", "requested", "split"]

PIECES = 3  # three bfloat16 with 8 bits each hold the 24 bits of a float32 exactly


def requested(extra_args: Mapping[str, Any] | None, names: Sequence[str], default: Sequence[float]) -> list[float]:
    """The alpha of each expert for one request. Other keys of ``extra_args`` are ignored.

    Raises:
        AlphaError: for a value that is not finite, a list of another length, or an unknown name.
    """
    others = dict(extra_args or {})
    alpha = take_alpha(others, names, others.pop("alpha", None))
    return list(resolve_alpha(alpha, names, default))


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
