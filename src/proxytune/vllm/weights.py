"""A member's weights for vLLM: with the names in its checkpoint, and with a LoRA adapter merged while reading.

Adapters are merged at loading instead of using vLLM's own LoRA, because a recipe's adapter never changes. Merged, it
costs nothing per token, works with every kind of parallelism, and needs no adapter slots. The price is a second copy of
the small model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from proxytune.errors import MemberError
from proxytune.recipe.adapters import APART, judge, read_config, refuse
from proxytune.recipe.members import Loading, adapter_directory, loading_of
from proxytune.recipe.source import Source

__all__ = ["Adapter", "read_adapter", "with_adapter"]

PREFIX = "base_model.model."


class Adapter:
    """A LoRA adapter: what it adds to which tensor of the checkpoint.

    Raises:
        MemberError: for what cannot be merged into plain weights.
    """

    def __init__(self, owner: str, config: Any, tensors: dict[str, Tensor]) -> None:
        self.owner, self.config = owner, config
        self.pairs: dict[str, dict[str, Tensor]] = {}  # module -> {"A": ..., "B": ...}
        self.embeddings: set[str] = set()
        self.whole: dict[str, Tensor] = {}  # tensors that replace the checkpoint's (modules_to_save)
        self._refuse()
        for name, tensor in tensors.items():
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if half := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\..*)?", plain):
                module, is_embedding, side, _ = half.groups()
                self.pairs.setdefault(module, {})[side] = tensor
                if is_embedding:
                    self.embeddings.add(module)
            elif "lora_" in plain:
                raise MemberError(f"the adapter of {owner} has {name!r}, which cannot be merged into plain weights")
            else:
                self.whole[plain.replace(".modules_to_save.", ".")] = tensor

    def _refuse(self) -> None:
        terms = judge(self.config)
        if terms.refused:
            refuse(self.owner, terms.refused)
        kind = str(getattr(self.config.peft_type, "value", self.config.peft_type))
        if kind != "LORA":
            raise MemberError(f"the adapter of {self.owner} is {kind}; vLLM serves only LoRA adapters")
        if others := [name for name in terms.options if name != "modules_to_save"]:
            reason = APART.get(others[0], f"it sets {others[0]}")
            raise MemberError(f"the adapter of {self.owner} is not merged, because {reason}; merge it with PEFT")

    def touches_vocabulary(self, vocab_size: int) -> bool:
        """Whether it changes the embeddings or the head, which have one row per token."""
        tensors = [pair["B"] for pair in self.pairs.values()] + list(self.whole.values())
        return bool(self.embeddings) or any(tensor.shape[0] == vocab_size for tensor in tensors)

    def scaling(self, module: str) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (2312.03732)."""
        from peft.utils.other import get_pattern_key

        alpha = self.config.alpha_pattern.get(
            get_pattern_key(self.config.alpha_pattern.keys(), module), self.config.lora_alpha
        )
        rank = self.pairs[module]["A"].shape[0]
        return float(alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank)

    def delta(self, module: str, like: Tensor) -> Tensor:
        """The tensor to add to ``module.weight``, float32, with the shape of ``like``."""
        down, up = (self.pairs[module][side].float() for side in "AB")
        delta = (up @ down) * self.scaling(module)  # (n_out, n_in); of an embedding (n_dim, n_vocab)
        if module in self.embeddings or self.config.fan_in_fan_out:
            delta = delta.T
        if delta.shape != like.shape:
            raise MemberError(
                f"the adapter of {self.owner} has shape {tuple(delta.shape)} for {module!r}, but the model has "
                f"{tuple(like.shape)}; it belongs to another model"
            )
        return delta


def read_adapter(owner: str, source: Source) -> Adapter:
    """Read a PEFT directory or hub repository."""
    with loading_of(owner, source.path):
        directory = adapter_directory(owner, source, Loading())
        from peft.utils import load_peft_weights

        return Adapter(owner, read_config(owner, directory), load_peft_weights(directory, device="cpu"))


def with_adapter(weights: Iterable[tuple[str, Tensor]], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The weights with the adapter merged in: ``W + s B A``, computed in float32.

    Raises:
        MemberError: at the end, if some tensor of the adapter belongs to no weight.
    """
    left = set(adapter.pairs) | set(adapter.whole)
    for name, tensor in weights:
        module = name.removesuffix(".weight")
        if name in adapter.whole:
            left.discard(name)
            tensor = adapter.whole[name].to(tensor.dtype)  # noqa: PLW2901
        if name.endswith(".weight") and module in adapter.pairs:
            left.discard(module)
            delta = adapter.delta(module, tensor).to(tensor.device)
            tensor = (tensor.to(torch.float32) + delta).to(tensor.dtype)  # noqa: PLW2901
        yield name, tensor
    if left:
        raise MemberError(
            f"the adapter of {adapter.owner} has weights for {sorted(left)[0]!r}, which the model's checkpoint lacks"
        )
