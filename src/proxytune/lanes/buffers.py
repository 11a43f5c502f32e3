"""Static caches for speculation: buffers that stay in place, and from which rejected tokens can be removed.

A compiled model needs a cache at one address and with one shape. transformers' own static layers have this, but they
cannot drop tokens or move rows. These can, in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from proxytune.errors import ProxyTuneError

__all__ = ["BufferLayer", "buffer_cache", "can_roll_back"]


class BufferLayer(StaticLayer):
    """One layer's keys and values, (n_rows, n_heads, capacity, n_values); the first ``get_seq_length()`` are read.

    The mask handles sliding windows: the layer keeps all columns, so that any of them can return to the window.
    """

    keys: Any  # tensors, once the first columns have come
    values: Any
    cumulative_length: Any  # a tensor with one number, which compiled code can change in place

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns."""
        self.cumulative_length.sub_(abs(tokens_to_remove))

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Write other contents, of the same shape."""
        self.keys.copy_(keys)
        self.values.copy_(values)

    def drop_left(self, n_columns: int) -> None:
        """Forget the first ``n_columns`` columns, and move the rest to the left."""
        self.put(self.keys.roll(-n_columns, dims=2), self.values.roll(-n_columns, dims=2))
        self.cumulative_length.sub_(n_columns)


def can_roll_back(cache: Cache) -> bool:
    """Whether rejected tokens can be taken out of this cache again, row by row."""
    return all(type(layer) in (BufferLayer, DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def buffer_cache(view: Cache, capacity: int) -> Cache:
    """A static cache in place of a dynamic one, with room for ``capacity`` columns.

    Raises:
        ProxyTuneError: if a layer holds something else than keys and values (a state space, an index).
    """
    if not can_roll_back(view):
        raise ProxyTuneError("static caches are for attention layers, and a member has others; use 'dynamic'")
    return Cache(layers=[BufferLayer(capacity) for _ in view.layers])
