"""Activation steering, for comparison: a vector is added to the base's hidden states.

At every position, after each layer l that the vector has:

    h_l  <-  h_l + strength * v_l

The vectors are made from pairs of answers to the same prompts, one wanted and one not (contrastive activation
addition, 2312.06681, with the mean over an answer's tokens instead of its one token):

    v_l  =  mean over pairs (mean of h_l over the wanted answer - mean of h_l over the other)

Files are GGUF with a tensor ``direction.l`` for each layer, counted from 0, as repeng writes them. Neither repeng nor
steering-vectors can be used by this package: repeng 0.4 needs NumPy below 2, steering-vectors 0.12 transformers below
5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.errors import ProxyTuneError, need
from proxytune.lanes.rows import same_weights

__all__ = ["mean_difference", "read_vector", "with_vector", "write_vector"]

Vector = Mapping[int, Tensor]  # layer -> what is added after it, (n_hidden,)
TENSOR, KIND = "direction.", "controlvector"


@torch.no_grad()
def mean_difference(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]]) -> dict[int, Tensor]:
    """The vector of every layer but the last one, whose output the model gives only after its norm.

    Args:
        pairs: a prompt, the wanted answer, and the other one. Prompt and answer are encoded apart.

    Returns:
        float32 (n_hidden,) by layer.
    """
    sums: Any = 0.0
    for prompt, *answers in pairs:
        begun = list(tokenizer(prompt)["input_ids"])
        for sign, answer in zip((1, -1), answers):
            ids = torch.tensor([begun + list(tokenizer(answer, add_special_tokens=False)["input_ids"])])
            # The first hidden states are the embeddings.
            layers = model(ids.to(model.device), output_hidden_states=True, use_cache=False).hidden_states[1:-1]
            sums = sums + sign * torch.stack([layer[0, len(begun) :].float().mean(dim=0).cpu() for layer in layers])
    return dict(enumerate(sums / len(pairs)))


def write_vector(path: Path, vector: Vector, model_type: str) -> None:
    """Write a vector as GGUF.

    Args:
        model_type: that of the model's config.
    """
    need("a steering vector", "gguf", "gguf")
    from gguf import GGUFWriter

    writer = GGUFWriter(path, KIND)
    writer.add_string(f"{KIND}.model_hint", model_type)
    writer.add_uint32(f"{KIND}.layer_count", len(vector))
    for layer, direction in vector.items():
        writer.add_tensor(f"{TENSOR}{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
