"""Members that run in transformers: one set of weights, and all members that are computed with it.

Members that use the same weights share one :class:`TransformersLane` and are computed in one forward, each as a block
of rows of the batch: the anti-expert and the LoRA expert on top of it, or one model under two prompts. A LoRA adapter
then touches only its own block, so the shared weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate

from proxytune.decoding.cost import QUICK_HEAD, Cost, cost_of_weights
from proxytune.decoding.lane import Scores, stacked
from proxytune.errors import MemberError, PromptError
from proxytune.lanes.buffers import BufferLayer, buffer_cache, can_roll_back
from proxytune.lanes.kernels import PackedLinear, QuickHead, pack
from proxytune.lanes.reading import has_read, one_by_one, reading_of
from proxytune.lanes.rows import apply_by_rows, refuse_unlike, same_weights
from proxytune.recipe.adapters import checksums
from proxytune.recipe.families import idle_embeddings
from proxytune.recipe.layout import Seat
from proxytune.recipe.parts import Member

__all__ = ["CannotShare", "TransformersLane", "TransformersState", "kept_positions"]

GROWTH = 512  # columns by which masks grow: rarely enough to cost nothing


class TransformersLane(nn.Module):
    """One set of weights and the seats that are computed with it.

    A forward takes the seats' rows stacked, shape = (n_seats * n_batch, n_columns), block by block. It is for training;
    otherwise a lane is read through :meth:`open`, see :mod:`proxytune.decoding.lane`.
    """

    complete = True
    adapted: Any

    def __init__(
        self, model: PreTrainedModel, seats: Sequence[Seat], source: Member | None = None, adapted: Any = None
    ) -> None:
        """
        Args:
            model: a module tree that belongs to the lane.
            source: its place; None for a model that was given in memory.
            adapted: the ``PeftModel`` around ``model``, if its layers have adapters.
        """
        super().__init__()
        self.model: Any = model.eval()
        self.seats = tuple(seats)
        self.source = source
        vars(self)["adapted"] = adapted  # not a submodule: its modules belong to the model
        self._alone: dict[str | None, Any] = {}  # adapter -> the model with only this adapter
        self.packed = any(isinstance(module, PackedLinear) for module in model.modules())
        self.read_bytes = _bytes_read(model)
        self.quick_head: QuickHead | None = None
        self.compiled = False
        self.narrow = False  # whether other lanes have ids that it lacks
        self.reading = reading_of(model)
        if self.reading.obstacle is not None:
            names = ", ".join(name for seat in seats for name in seat.names)
            raise MemberError(f"{names} cannot be used in a recipe: {self.reading.obstacle}; name another model")
        self.by_rows = len({seat.adapter for seat in seats}) > 1
        if self.by_rows:
            adapters = [seat.adapter for seat in seats]
            apply_by_rows(model, adapters)
            if reason := refuse_unlike(model, adapters):
                owner = next(seat.names[0] for seat in seats if seat.adapter is not None)
                raise CannotShare(owner, reason)
        self._as_loaded = _marks(model)

    @property
    def changed(self) -> bool:
        """Whether the weights are trainable, or have changed since loading."""
        marks = _marks(self.model)
        if any(p.requires_grad for p in self.model.parameters()) or marks.keys() != self._as_loaded.keys():
            return True
        before = self._as_loaded  # in another dtype they are the same weights, rounded
        return any(mark[0] == before[name][0] and mark != before[name] for name, mark in marks.items())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._alone.clear()  # it may give a module other parameters and buffers
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> TransformersLane:
        self._alone.clear()
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config(decoder=True)

    @property
    def cost(self) -> Cost:
        """The cost of a forward, from the bytes that it reads; with the quick head, if there is one."""
        fast = self.packed or self.model.dtype != torch.float32
        n_bytes = self.read_bytes - (0 if self.quick_head is None else (1 - QUICK_HEAD) * self.head_bytes)
        layers = getattr(self.config, "num_hidden_layers", 1)
        return cost_of_weights(n_bytes, layers, self.device.type, packed=fast)

    @property
    def head_cost(self) -> Cost | None:
        """The cost of its own head, if there is a quick head."""
        return None if self.quick_head is None else cost_of_weights(self.head_bytes, 0, self.device.type)

    @property
    def n_vocab(self) -> int:
        """How many ids it scores."""
        return int(self.config.vocab_size)

    @property
    def context(self) -> int | None:
        """How many tokens it can read; None if its config sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def tolerance(self) -> float:
        """How far logits may differ if one text is read in two ways, as a share of the largest logit."""
        return {torch.float32: 1e-4, torch.float64: 1e-4}.get(self.model.dtype, 0.1)

    def open(self, n_batch: int, capacity: int | None = None) -> TransformersState:
        return TransformersState(self, n_batch, capacity)

    def pack(self) -> None:
        """Rearrange the weights for fast inference on a CPU; see :func:`proxytune.lanes.kernels.pack`."""
        pack(self.model)
        self._alone.clear()
        self.packed = True
        self._as_loaded = _marks(self.model)

    def prepare_drafts(self) -> None:
        """Make a quick head for drafting, if the head is packed, float32, and its output is used as logits
        unchanged."""
        head = self.model.get_output_embeddings()
        quick = isinstance(head, PackedLinear) and head.packed.dtype == torch.float32
        if quick and _ends_with_its_head(self.model, len(self.seats)):
            self.quick_head = QuickHead(head)

    @property
    def head_bytes(self) -> int:
        """The bytes of the head if it is packed, otherwise 0."""
        head = self.model.get_output_embeddings()
        return head.packed.numel() * head.packed.dtype.itemsize if isinstance(head, PackedLinear) else 0

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """The last hidden states of the stacked rows, (n_seats * n_batch, n_columns, n_hidden), for :meth:`head`."""
        self._make_masks(input_ids, inputs)
        return self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state

    def _make_masks(self, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        """Make the attention masks for a static cache, as ``generate`` does. They depend on the cache's contents, which
        a compiled model cannot look at.
        """
        cache = inputs.get("past_key_values")
        if cache is None or not cache.is_compileable:
            return
        make = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)  # some families' own
        shapes = torch.empty((*input_ids.shape, 0), dtype=self.model.dtype, device=input_ids.device)
        inputs["attention_mask"] = make(
            config=self.model.config,
            inputs_embeds=shapes,
            attention_mask=inputs.get("attention_mask"),
            past_key_values=cache,
            position_ids=inputs.get("position_ids"),
        )

    def head(self, hidden: Tensor) -> Tensor:
        """The logits for hidden states, as in :meth:`forward`; for lanes with a quick head."""
        return self.model.get_output_embeddings()(hidden)

    def alone(self, name: str) -> Any:
        """The model of member ``name`` by itself: the same weights, with its adapter on all rows."""
        if not self.by_rows:
            return self.model
        adapter = next(seat.adapter for seat in self.seats if name in seat.names)
        if adapter not in self._alone:
            model = same_weights(self.model)
            apply_by_rows(model, [adapter])
            self._alone[adapter] = model
        return self._alone[adapter]

    def forward(self, input_ids: Tensor, *, logits_to_keep: int | Tensor, **inputs: Any) -> Tensor:
        """Logits of the stacked rows, shape = (n_seats * n_batch, n_kept, n_vocab), in the model's dtype.

        Raises:
            PromptError: for a row with padding, if the model is not exact with padding.
        """
        if not self.reading.padded and (mask := inputs.get("attention_mask")) is not None and not bool(mask.all()):
            raise PromptError(
                f"{type(self.model).__name__} ({', '.join(self.seats[0].names)}) gives other logits behind padding; "
                "give it one prompt at a time, or prompts of one length"
            )
        cache = inputs.get("past_key_values")
        if not self.reading.in_pieces and input_ids.shape[1] > 1 and has_read(cache):
            logits = one_by_one(lambda ids, **own: self(ids, logits_to_keep=0, **own), input_ids, inputs)
            return logits[:, kept_positions(logits_to_keep)]
        self._make_masks(input_ids, inputs)
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = logits_to_keep
            return self.model(input_ids=input_ids, **inputs).logits
        return self.model(input_ids=input_ids, **inputs).logits[:, kept_positions(logits_to_keep)]


class TransformersState:
    """The state of a :class:`TransformersLane`; see :mod:`proxytune.decoding.lane`.

    Attributes:
        view: the lane's cache, with transformers' own layers; None: nothing is kept.
        mask: (n_rows, n_columns or more), 0 at padding; None while there is no padding.
        position: the position of the next token, (n_rows, 1).
    """

    def __init__(self, lane: TransformersLane, n_batch: int, capacity: int | None = None) -> None:
        self.lane, self.n_batch, self.capacity = lane, n_batch, capacity
        self.n_seats = len(lane.seats)
        self.view: Any = None
        if capacity != 0:
            view = DynamicCache(config=lane.config)
            self.view = view if capacity is None else buffer_cache(view, capacity)
        self.n_columns = self.pending = 0
        self.mask: Tensor | None = None
        self.position = torch.zeros(self.n_seats * n_batch, 1, dtype=torch.long, device=lane.device)
        self.ahead: Tensor | int = 0  # for each row, the tokens among the columns read since the last `keep`
        self.last: Tensor | None = None  # nothing is kept beyond this position, (n_rows, 1)
        self.rolls_back = False

    @property
    def layers(self) -> list[Any]:
        """The cache's layers, for transformers' own tools."""
        return [] if self.view is None else self.view.layers

    @property
    def forgets(self) -> bool:
        """Whether every layer keeps keys and values of each column."""
        return can_roll_back(self.view)

    def begin_drafts(self, room: int | None = None) -> None:
        self.rolls_back = True
        self.last = None if room is None else self.position + max(room - 1, 0)
        self.view.activate_past_recording()

    def end_drafts(self) -> None:
        self.rolls_back, self.last = False, None
        for layer in self.view.layers:
            if type(layer) is DynamicSlidingWindowLayer:
                layer.record_past = False

    def read(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: int = 0, want: Tensor | None = None
    ) -> Scores:
        """See :class:`proxytune.decoding.lane.LaneState`; all is scored, whatever is wanted."""
        rows, inputs = self._inputs(ids, mask)
        # Prompts have many lengths and are read once, so nothing is compiled for them.
        eager = self.lane.compiled and self.n_columns + self.pending == ids.shape[1]
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            return Scores(self.lane(rows, **inputs, logits_to_keep=positions))

    def read_hidden(self, ids: Tensor) -> Tensor:
        """Like :meth:`read`, but returns the hidden states that the lane's head turns into logits, (n_rows, k,
        n_hidden)."""
        rows, inputs = self._inputs(ids, None)
        return self.lane.hidden(rows, **inputs)

    def _inputs(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The model's arguments for the next columns; it also counts the columns."""
        n_rows, k = self.n_seats * self.n_batch, ids.shape[1]
        before = self.n_columns + self.pending
        if self.lane.narrow:  # an id that it lacks is never chosen, and refused in a prompt, so it can only be padding
            ids = ids.clamp(max=self.lane.n_vocab - 1)
        rows = stacked(ids, n_rows).to(self.lane.device)
        if mask is not None and bool(mask.all()):
            mask = None
        width = self.capacity or before + k
        if mask is not None and self.mask is None:
            self.mask = rows.new_ones(n_rows, before)
        if self.mask is not None and self.mask.shape[1] < width:  # new columns are padding only where the mask says so
            self.mask = torch.nn.functional.pad(self.mask, (0, max(GROWTH, width - self.mask.shape[1])), value=1)
        start = self.position + self.ahead
        if mask is None:
            position_ids = start + torch.arange(k, device=self.lane.device)
            self.ahead = self.ahead + k
        else:
            shown = stacked(mask, n_rows).to(self.lane.device)
            cast(Tensor, self.mask)[:, before : before + k] = shown
            position_ids = (start + shown.cumsum(dim=1) - 1).clamp_(min=0)
            self.ahead = self.ahead + shown.sum(dim=1, keepdim=True)
        if self.last is not None:
            position_ids = torch.minimum(position_ids, self.last)
        self.pending += k
        return rows, {
            "attention_mask": None if self.mask is None else self.mask[:, :width],
            # Without a cache and a mask transformers would look for packed texts in the positions, and make a mask.
            "position_ids": None if self.view is None and self.mask is None else position_ids,
            "past_key_values": self.view,
            "use_cache": self.view is not None,
        }

    def keep(self, counts: Sequence[int] | None = None) -> None:
        if counts is None:
            self.n_columns, self.position = self.n_columns + self.pending, self.position + self.ahead
            self.pending = self.ahead = 0
            return
        longest = max(counts)
        kept: Tensor | int = longest
        if unequal := min(counts) < longest:
            kept = torch.tensor(counts, device=self.lane.device)
            kept = kept.repeat(self.n_seats * self.n_batch // len(counts))[:, None]  # of each row
            self._shift(longest - kept[:, 0])
        if self.rolls_back:
            self.view.crop(longest - self.pending)  # crop(0) still lets sliding windows drop columns outside them
        self.n_columns += longest
        self.pending = self.ahead = 0
        self.position = self.position + kept
        if unequal:
            self._trim()

    def crop(self, n_columns: int) -> None:
        self.view.crop(-n_columns)
        self.n_columns -= n_columns
        self.position = self.position - n_columns

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.lane.device)
        at = torch.cat([rows + seat * self.n_batch for seat in range(self.n_seats)])
        self.view.reorder_cache(at)  # every kind of layer supports this, for any number of rows
        self.position = self.position[at]
        self.last = None if self.last is None else self.last[at]
        self.n_batch = len(rows)
        if self.mask is not None:
            self.mask = self.mask[at]
            if self.rolls_back:  # rows that were moved by different amounts
                self._trim()

    def _shift(self, by: Tensor) -> None:
        """Move each row ``by`` columns to the right. The dropped columns on the right were rejected; the new ones on
        the left are padding."""
        for layer in self.view.layers:
            n_heads, width, n_values = layer.keys.shape[1:]
            source = (torch.arange(width, device=by.device) - by[:, None]).clamp_(min=0)[:, None, :, None]
            source = source.to(layer.keys.device)  # a lane may be spread over devices
            keys = layer.keys.gather(2, source.expand(-1, n_heads, -1, n_values))
            values = layer.values.gather(2, source.expand(-1, n_heads, -1, layer.values.shape[-1]))
            if isinstance(layer, BufferLayer):
                layer.put(keys, values)
            else:
                layer.keys, layer.values = keys, values
        columns = torch.arange(self.n_columns + self.pending, device=by.device)
        if self.mask is None:
            self.mask = columns.new_ones(len(by), self.capacity or len(columns))
        source = columns - by[:, None]
        moved = self.mask[:, : len(columns)].gather(1, source.clamp(min=0))
        self.mask[:, : len(columns)] = moved.masked_fill(source < 0, 0)

    def _trim(self) -> None:
        """Drop columns on the left that are padding in every row."""
        assert self.mask is not None
        if (surplus := int(self.mask.any(dim=0).long().argmax())) == 0:
            return
        self.mask = self.mask[:, surplus:]
        self.n_columns -= surplus
        for layer in self.view.layers:
            if isinstance(layer, BufferLayer):
                layer.drop_left(surplus)
                continue
            # A sliding window holds only the last columns, and counts the others.
            n_held = min(layer.keys.shape[2], self.n_columns)
            layer.keys, layer.values = layer.keys[:, :, -n_held:], layer.values[:, :, -n_held:]
            if layer.is_sliding:
                layer.cumulative_length = self.n_columns


def kept_positions(logits_to_keep: int | Tensor) -> Any:
    """An index of the positions that transformers' ``logits_to_keep`` asks for: the number of last ones, 0 for all, or
    their indices."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu()


class CannotShare(MemberError):
    """An adapter of ``owner`` needs separate weights, because of ``reason``."""

    def __init__(self, owner: str, reason: str) -> None:
        super().__init__(
            f"{owner} shares its weights with another member, but its adapter cannot be applied to a part of the batch "
            f"because {reason}; give members with weights of their own"
        )
        self.owner, self.reason = owner, reason


def _marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Marks of a parameter that show writes to it: PyTorch's count of writes, and a sample of its bits.

    Fused optimizers do not change the count, but change every value.
    """
    marks = {}
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        sample = checksums({"": flat[:: max(1, len(flat) // 65536)]})
        marks[name] = (p.dtype, 0 if p.is_inference() else p._version, *sample.values())
    return marks


@torch.no_grad()
def _ends_with_its_head(model: Any, n_rows: int) -> bool:
    """Whether the logits are the head's output unchanged. Some families scale or cap them, or normalise the head's
    input."""
    if model.base_model is model:
        return False
    ids = torch.tensor([[0, 1]] * n_rows, device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)


def _bytes_read(model: nn.Module) -> int:
    """The bytes of weights that a token's forward reads: all of them, but only one row of the input embeddings."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    sizes.pop(id(idle_embeddings(model)), None)
    packed = (module.packed for module in model.modules() if isinstance(module, PackedLinear))
    return sum(sizes.values()) + sum(weight.numel() * weight.dtype.itemsize for weight in packed)
