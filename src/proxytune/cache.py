"""One cache for all members of a composite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
)
from transformers.cache_utils import Cache, DynamicCache

from proxytune.errors import PromptError
from proxytune.lanes.buffers import buffers_like

__all__ = ["LanePrompt", "ProxyTunedCache"]


@dataclass
class LanePrompt:
    """The prompts that a lane's seats read instead of ``input_ids``, stacked like the lane's rows.

    ids, mask: shape = (n_seats * n_batch, width), left-padded.
    """

    ids: Tensor
    mask: Tensor

    def map(self, change: Any) -> LanePrompt:
        return LanePrompt(change(self.ids), change(self.mask))


class ProxyTunedCache(Cache):
    """One cache for all members: every lane's layers in a row, and a view of them for each lane.

    The views hold the very layer objects, so what ``generate`` does to the whole (crop, reorder, repeat) happens
    to each member. A lane of k seats holds k blocks of rows, which is why rows are selected block by block.
    """

    is_compileable = False  # members are compiled, each for itself; their views say so

    def __init__(
        self, configs: Sequence[PreTrainedConfig], n_seats: Sequence[int], capacity: int | None = None
    ) -> None:
        """
        Args:
            configs, n_seats: of each lane.
            capacity: columns that each layer has room for, see :mod:`proxytune.lanes.buffers`; None: layers that grow.
        """
        self.views: list[Cache] = [DynamicCache(config=config) for config in configs]
        if capacity is not None:
            self.views = buffers_like(self.views, capacity)
        super().__init__(layers=[layer for view in self.views for layer in view.layers])
        self.n_seats = list(n_seats)
        self.prompts: list[LanePrompt | None] = [None] * len(self.views)
        self.prompt_length = 0
        self.n_batch = 0
        self._is_user_defined = False
        self.n_columns = 0  # columns of the outer input_ids that all members have read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_columns

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # the older meaning: the length to keep
            tokens_to_remove = min(tokens_to_remove - self.n_columns, 0)
        if self.n_columns + tokens_to_remove < self.prompt_length and self._has_prompts():
            raise PromptError("a cache cannot be cropped into the prompt while members have prompts of their own")
        super().crop(tokens_to_remove)
        self.n_columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.n_batch).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self.prompts = [None] * len(self.views)
        self.n_columns = self.prompt_length = 0

    def _has_prompts(self) -> bool:
        return any(prompt is not None for prompt in self.prompts)

    def _select(self, rows: Tensor) -> None:
        """Carry on with these rows, in any number and order; every kind of layer can do that by `reorder_cache`."""
        for index, (view, n_seats) in enumerate(zip(self.views, self.n_seats)):
            stacked = torch.cat([rows + block * self.n_batch for block in range(n_seats)])
            view.reorder_cache(stacked)  # type: ignore[arg-type]
            if (prompt := self.prompts[index]) is not None:
                self.prompts[index] = prompt.map(lambda t, at=stacked: t[at.to(t.device)])
        self.n_batch = len(rows)
