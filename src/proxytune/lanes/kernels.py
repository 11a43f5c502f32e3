"""Linear layers with weights in oneDNN's own layout: several times faster on a CPU at decoding's sizes.

PyTorch's float32 ``linear`` on a CPU rearranges the weight in each call with two or more rows, which makes a pass over
a few drafted tokens as slow as several single ones. A weight that is rearranged once is read at memory speed, whatever
the number of rows. It is the layout that ``torch.compile`` with freezing would choose, without compiling anything.

:class:`QuickHead` is for drafts only: a head that is nearly exact and reads a quarter of the bytes.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from proxytune.errors import MemberError

__all__ = ["PackedLinear", "QuickHead", "compile_model", "pack"]

ROWS = 8  # the layout is chosen for this number of rows; other numbers work too
BLOCK = 32  # the int8 kernel reads whole blocks of weights, even beyond their end


# A compiled graph cannot hold an opaque tensor. So it holds a handle, and finds the weights by it when it runs.
_PACKED: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_HANDLES = itertools.count()
_LIBRARY = torch.library.Library("proxytune", "DEF")
_LIBRARY.define("packed_linear(Tensor x, int handle, int out_features) -> Tensor")


def _packed_linear(x: Tensor, handle: int, out_features: int) -> Tensor:
    return _PACKED[handle](x)  # type: ignore[no-any-return]


def _shape_of_packed_linear(x: Tensor, handle: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake("proxytune::packed_linear", _shape_of_packed_linear, lib=_LIBRARY)


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W`` in oneDNN's own layout. For inference: no gradient flows through it."""

    handle: int

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
        if torch.compiler.is_compiling():  # by `compile_model`, which has given it the handle
            return torch.ops.proxytune.packed_linear(x, self.handle, self.out_features)  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuickHead(nn.Module):
    """A float32 head with its weights rounded to int8, one scale per token: it guesses the logits.

    In a step, a small member mostly reads its head. Drafts may be chosen with this head, since the mixture verifies
    every draft, whatever it was drawn from. Its logits are never mixed. For a bfloat16 head it would save almost
    nothing.
    """

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        weight = head.weight
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(dim=1).clamp_(min=torch.finfo(weight.dtype).tiny) / 127
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        beyond_rows, beyond_columns = -self.out_features % BLOCK, -self.in_features % BLOCK
        self.register_buffer("rounded", nn.functional.pad(rounded, (0, beyond_columns, 0, beyond_rows)))
        self.register_buffer("scale", nn.functional.pad(scale, (0, beyond_rows)).to(torch.bfloat16))
        self.bias = head.bias

    def forward(self, x: Tensor) -> Tensor:
        """Float32 logits, shape = (..., out_features), of hidden states, (..., in_features)."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)  # the kernel is fast only for this dtype
        rows = nn.functional.pad(rows, (0, -self.in_features % BLOCK))
        y = torch.ops.aten._weight_int8pack_mm(rows, self.rounded, self.scale)[:, : self.out_features].float()
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def pack(model: nn.Module) -> None:
    """Replace a model's linear layers by packed ones, in place; for inference on a CPU.

    Adapters and layers that are not plain ``nn.Linear`` (quantized ones) stay as they are. A head that is tied to
    the embeddings gets a copy of its own.

    Raises:
        MemberError: if this PyTorch or machine has no such kernel for the model's device or dtype.
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


def compile_model(model: Any, how: bool | str) -> None:
    """Compile a model in place with ``torch.compile``, which fuses the operations between linear layers. The first
    calls compile.

    The decoder is compiled, with dynamic shapes. The head is not: it is a product without anything to fuse. Kernels are
    made for one token and for several, for one row and for several, at the first call of each kind, which takes seconds
    to minutes. A model that is already compiled stays as it is.

    Args:
        how: True, or one of ``torch.compile``'s modes.

    Raises:
        MemberError: for an unknown mode, and for a PyTorch that would count the recompilations of all members together.
    """
    modes = list(torch._inductor.list_mode_options())
    if how is not True and how not in modes:
        raise MemberError(f"compile is True or one of torch.compile's modes, {', '.join(modes)}, not {how!r}")
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise MemberError(f"compile needs PyTorch 2.13 or newer, and this is {torch.__version__}; leave it out")
    if model.base_model._compiled_call_impl is not None:
        return
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.handle = next(_HANDLES)
            _PACKED[module.handle] = module
    mode = None if how is True else how
    model.base_model.compile(dynamic=True, mode=mode, isolate_recompiles=True)


def _refuse_unfit(weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise MemberError(f"pack=True is for members on the CPU, and this one is on {weight.device}; leave it out")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise MemberError("pack=True needs a PyTorch built with oneDNN; leave it out")
    if weight.dtype != torch.float32 and not (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        raise MemberError(f"pack=True has no kernel for {weight.dtype} on this machine; use float32 or bfloat16")
