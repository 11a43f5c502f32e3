"""Linear layers whose weights lie in memory as oneDNN wants them: several times faster on a CPU at decoding's sizes.

PyTorch's float32 ``linear`` on a CPU lays the weight out anew in each call as soon as there are two rows, which
makes a pass over a few drafted tokens as slow as several single ones. A weight that is reordered once is read at
memory speed, whatever the number of rows. It is the layout that ``torch.compile`` with freezing would choose, without
compiling anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from proxytune.errors import MemberError

__all__ = ["PackedLinear", "pack"]

ROWS = 8  # the number of rows the layout is chosen for; any other number works as well


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` in oneDNN's own layout. For inference: no gradient flows through it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # No buffer: an opaque tensor has no storage to move, share or serialise.
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    @property
    def weight(self) -> Tensor:
        """The plain weight, shape = (out_features, in_features), copied at each access."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack(model: nn.Module) -> None:
    """Replace a model's linear layers by packed ones, in place; for inference on a CPU.

    Adapters and layers that are not plain ``nn.Linear`` (quantized ones) stay as they are. A head that is tied to
    the embeddings gets a copy of its own.

    Raises:
        MemberError: where this PyTorch or machine has no such kernel for the model's device or dtype.
    """
    found = [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "lora_" not in path
    ]
    for _, _, linear in found:
        _refuse_unfit(linear.weight)
    for parent, name, linear in found:
        setattr(parent, name, PackedLinear(linear))


def _refuse_unfit(weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise MemberError(f"pack=True is for members on the CPU, and this one is on {weight.device}; leave it out")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise MemberError("pack=True needs a PyTorch that is built with oneDNN; leave it out")
    if weight.dtype != torch.float32 and not (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        raise MemberError(f"pack=True has no kernel for {weight.dtype} on this machine; use float32 or bfloat16")
