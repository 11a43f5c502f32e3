"""Activation steering, for comparison: a vector is added to the base's hidden states.

At every position, after each layer l that the vector has:

    h_l  <-  h_l + strength * v_l

Files are GGUF with a tensor ``direction.l`` for each layer, counted from 0, as repeng writes them and
scripts/steering_vector.py does, which makes vectors from pairs of answers. docs/experiments.md says why this is our
own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.errors import ProxyTuneError, need
from proxytune.lanes.rows import same_weights

__all__ = ["read_vector", "with_vector"]

Vector = Mapping[int, Tensor]  # layer -> what is added after it, (n_hidden,)
TENSOR = "direction."


def read_vector(path: Path) -> dict[int, Tensor]:
    """Read a vector from GGUF.

    Raises:
        ProxyTuneError: if the file holds none.
    """
    need("--steering-vector", "gguf", "gguf")
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (OSError, ValueError, IndexError) as error:
        raise ProxyTuneError(f"the steering vector {path} cannot be read as GGUF: {error}") from error
    named = {tensor.name.removeprefix(TENSOR): tensor.data for tensor in tensors if tensor.name.startswith(TENSOR)}
    if not named or not all(layer.isdecimal() for layer in named):
        raise ProxyTuneError(f"{path} holds no steering vector: its tensors must be named {TENSOR}LAYER")
    return {int(layer): torch.tensor(data, dtype=torch.float32) for layer, data in named.items()}


def with_vector(model: Any, vector: Vector, strength: float) -> Any:
    """A model with a vector added to its hidden states. It shares the weights of ``model``, which stays as it is.

    Raises:
        ProxyTuneError: if the vector does not fit the model, or the model's layers are not found.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers, n_hidden = config.num_hidden_layers, config.hidden_size
    if wrong := [layer for layer in vector if layer >= n_layers]:
        raise ProxyTuneError(f"the steering vector is for layer {max(wrong)}, but the base has {n_layers} layers")
    if wrong := [len(direction) for direction in vector.values() if direction.shape != (n_hidden,)]:
        raise ProxyTuneError(
            f"the steering vector has {wrong[0]} numbers, but the base's hidden states have {n_hidden}"
        )
    steered = same_weights(model)
    stacks = [each for each in steered.modules() if isinstance(each, nn.ModuleList) and len(each) == n_layers]
    if len(stacks) != 1:
        raise ProxyTuneError(f"{len(stacks)} lists of {n_layers} modules were found in the base, not its layers alone")
    for layer, direction in vector.items():
        stacks[0][layer].register_forward_hook(_adding(strength * direction))
    return steered


def _adding(direction: Tensor) -> Any:
    """A forward hook that adds a vector to a layer's hidden states."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # hidden states, and more
            return (output[0] + direction.to(output[0]), *output[1:])
        return output + direction.to(output)

    return hook
