"""Alpha per request: what a request may say, and the columns in which it travels with the hidden states.

A request says ``extra_args`` (``vllm_xargs`` in the OpenAI API), which hold scalars and flat lists alone:

    {"alpha": 0.5}                   for all experts
    {"alpha": [0.5, 1.0]}            one an expert, in the recipe's order
    {"alpha.math": 0.5}              for one expert by name; others keep the recipe's, or what "alpha" says
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.config import finite_alpha
from proxytune.errors import AlphaError

__all__ = ["PIECES", "join", "requested", "split"]

KEY = "alpha"
PIECES = 3  # three bfloat16 of 8 bits each hold a float32's 24 exactly


def requested(extra_args: Mapping[str, Any] | None, names: Sequence[str], default: Sequence[float]) -> list[float]:
    """The alpha of each expert for one request.

    Args:
        extra_args: the request's; keys that are not ours are left to others.
        names: the experts' names, in the recipe's order.
        default: the recipe's alphas.

    Raises:
        AlphaError: for a value that is not finite, a list of another length, or an unknown name.
    """
    alphas = list(default)
    for key, value in sorted((extra_args or {}).items()):  # "alpha" before "alpha.NAME", which is more particular
        if key == KEY and isinstance(value, (list, tuple)):
            if len(value) != len(names):
                raise AlphaError(f"{len(value)} alphas for {len(names)} experts ({', '.join(names)})")
            alphas = [finite_alpha(one, f"alpha of expert {name!r}") for name, one in zip(names, value)]
        elif key == KEY:
            alphas = [finite_alpha(value)] * len(names)
        elif key.startswith(f"{KEY}."):
            name = key.removeprefix(f"{KEY}.")
            if name not in names:
                raise AlphaError(f"no expert is called {name!r}; the recipe has {', '.join(names)}")
            alphas[names.index(name)] = finite_alpha(value, f"alpha of expert {name!r}")
    return alphas


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
