"""One cache for all members of a composite: what each lane has read, with the interface of a transformers cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from proxytune.decoding.lane import Lane, LaneState, Scores
from proxytune.errors import PromptError
from proxytune.recipe.prompts import n_common

__all__ = ["ProxyTunedCache"]

Rows = Sequence[list[int]]


class ProxyTunedCache(Cache):
    """The cache of a steered model: it holds the cache of every member. What ``generate`` does to it (crop, reorder,
    repeat) is done to each member's.

    Attributes:
        states: one per lane, from the first call on.
        n_columns: how many columns of ``input_ids`` all members have read.
        prompt_length: how many of these columns are prompt, which members with prompts of their own have replaced.

    Example:
        >>> import torch
        >>> from proxytune import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe")
        >>> cache = model.new_cache()
        >>> output = model(torch.tensor([[1, 40, 41]]), past_key_values=cache)
        >>> cache.get_seq_length()
        3
        >>> cache.crop(-1)  # the last token is taken back, in every member
        >>> cache.get_seq_length()
        2
    """

    is_compileable = False  # each member is compiled by itself; its own view says so

    def __init__(self, lanes: Sequence[Lane], capacity: int | None = None) -> None:
        """
        Args:
            capacity: columns that each state has room for, see :mod:`proxytune.lanes.buffers`; None: states that grow;
                0: states for one call, which keep nothing.
        """
        super().__init__(layers=[])
        self.lanes, self.capacity = list(lanes), capacity
        self._is_user_defined = False
        self.prompt_scores: list[Scores] | None = None  # of a prompt, where `generate` mixes them itself
        self.rolls_back = False
        self.reset()

    def reset(self) -> None:
        self.states: list[LaneState] = []
        self.layers: list[Any] = []
        self.n_batch = self.n_columns = self.prompt_length = 0

    def begin(self, n_batch: int) -> None:
        """Open the lanes' states for ``n_batch`` rows, if nothing has been read yet."""
        if not self.states:
            self.states = [lane.open(n_batch, self.capacity) for lane in self.lanes]
            self._show_layers()
            if self.rolls_back:
                self.activate_past_recording()
            self.n_batch = n_batch

    def adopt(self, at: int, state: Any) -> None:
        """Let a lane continue from a copy of what a lane of the same weights and seats has read in another cache."""
        self.states[at] = copy.deepcopy(state, {id(state.lane): self.lanes[at]})
        self._show_layers()

    def _show_layers(self) -> None:
        """Make keys and values of transformers' kind visible, so that its tools find them."""
        self.layers = [layer for state in self.states for layer in getattr(state, "layers", [])]

    def activate_past_recording(self) -> None:
        self.rolls_back = True
        for state in self.states:
            state.begin_drafts()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_columns

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # the older meaning: the length to keep
            tokens_to_remove = min(tokens_to_remove - self.n_columns, 0)
        if self.n_columns + tokens_to_remove < self.prompt_length:
            raise PromptError("a cache cannot be cropped into the prompt while members have prompts of their own")
        for state in self.states:
            state.crop(-tokens_to_remove)
        self.n_columns += tokens_to_remove

    def go_on_with(self, read: Sequence[Rows], wanted: Sequence[Rows], prompt_length: int) -> int:
        """Change each seat's row, in a batch of one, from the ids that it has read to its new prompt without the last
        token.

        The beginning that all rows of a lane have in common with their new prompts is not read again.

        Args:
            read, wanted: for each lane, the ids of each seat's row, old and new.
            prompt_length: columns of the prompt in ``input_ids``.

        Returns:
            How many tokens of the first lane's first seat were not read again; 0: nothing was done, so start with a new
            cache.
        """
        new, surplus = [], []
        for before, after in zip(read, wanted):
            common = [n_common(old, row[:-1]) for old, row in zip(before, after)]
            surplus.append(max(len(old) - n for old, n in zip(before, common)))
            if surplus[-1] >= min(map(len, before)):
                return 0
            new.append([row[len(old) - surplus[-1] : -1] for old, row in zip(before, after)])
        # A sliding window has dropped columns that a moved row would need.
        if not all(state.forgets for state in self.states) or any(layer.is_sliding for layer in self.layers):
            return 0
        for state, n, rows in zip(self.states, surplus, new):
            if n:
                state.crop(n)
            if width := max(map(len, rows)):
                state.read(torch.tensor([row + [0] * (width - len(row)) for row in rows]), positions=1)
                state.keep([len(row) for row in rows])
        self.n_columns, self.prompt_length = prompt_length - 1, prompt_length
        return len(read[0][0]) - surplus[0]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.n_batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these rows, in any number and order."""
        for state in self.states:
            state.select(beam_idx)
        self.n_batch = len(beam_idx)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProxyTunedCache:
        memo |= {id(lane): lane for lane in self.lanes}  # a copy of what was read, not of the models
        copied = memo[id(self)] = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied
