"""Counts what would wait for a device, on a CPU too: every tensor that is turned into Python values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WAITING = {
    getattr(Tensor, name): name
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "numpy",
        "cpu",
        "nonzero",
    )
}
WAITING[torch.equal] = "equal"
WAITING[torch.nonzero] = "nonzero"


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            self.seen.append(WAITING[func])
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_syncs() -> Iterator[list[str]]:
    """The names of the calls within that wait for the device, in order."""
    with _Counting() as counting:
        yield counting.seen
