"""Members that run in transformers: one set of weights, and all members that are computed with it.

Members that use the same weights sit in one :class:`Lane` and are computed in one forward, each as a block of
rows of the batch: the anti-expert and the LoRA expert on top of it, or one model under two prompts. A LoRA
adapter then touches only its own block, so the shared weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from proxytune.errors import MemberError, PromptError
from proxytune.lanes.kernels import PackedLinear, QuickHead, pack
from proxytune.lanes.reading import has_read, one_by_one, reading_of
from proxytune.lanes.rows import apply_by_rows, refuse_unlike, same_weights
from proxytune.recipe.adapters import (
    checksums,
)
from proxytune.recipe.config import Member
from proxytune.recipe.families import idle_embeddings
from proxytune.recipe.layout import Seat

__all__ = ["CannotShare", "Lane"]


class Lane(nn.Module):
    """One set of weights and the seats that are computed with it.

    A forward takes the seats' rows stacked, shape = (n_seats * n_batch, n_columns), block by block.
    """

    def __init__(
        self, model: PreTrainedModel, seats: Sequence[Seat], source: Member | None = None, adapted: Any = None
    ) -> None:
        """
        Args:
            model: a module tree that is the lane's own.
            source: where it lies; None for a model that was given in memory.
            adapted: the ``PeftModel`` around ``model``, where its layers have adapters.
        """
        super().__init__()
        self.model: Any = model.eval()
        self.seats = tuple(seats)
        self.source = source
        self._adapted = (adapted,)  # in a tuple: its modules are the model's
        self._alone: dict[str | None, Any] = {}  # adapter -> the model under it alone
        self.packed = any(isinstance(module, PackedLinear) for module in model.modules())
        self.read_bytes = _bytes_read(model)
        self.quick_head: QuickHead | None = None
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
    def adapted(self) -> Any:
        """The ``PeftModel`` around the model, or None."""
        return self._adapted[0]

    @property
    def changed(self) -> bool:
        """Whether the weights are trained, or are no longer those that were loaded."""
        marks = _marks(self.model)
        return (
            any(p.requires_grad for p in self.model.parameters())
            or marks.keys() != self._as_loaded.keys()
            or any(_differ(mark, self._as_loaded[name]) for name, mark in marks.items())
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._alone.clear()  # it may give a module other parameters and buffers
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Lane:
        self._alone.clear()
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def config(self) -> PreTrainedConfig:
        return cast(PreTrainedConfig, self.model.config.get_text_config(decoder=True))

    def pack(self) -> None:
        """Lay the weights out for fast inference on a CPU; see :func:`proxytune.lanes.kernels.pack`."""
        pack(self.model)
        self._alone.clear()
        self.packed = True
        self._as_loaded = _marks(self.model)

    def prepare_drafts(self) -> None:
        """Make a quick head for drafting, where the weights are packed and the logits are the head's very output."""
        head = self.model.get_output_embeddings()
        if isinstance(head, PackedLinear) and _ends_with_its_head(self.model, len(self.seats)):
            self.quick_head = QuickHead.of(head)

    @property
    def head_bytes(self) -> int:
        """Of the head, where it is packed; else 0."""
        head = self.model.get_output_embeddings()
        return head.packed.numel() * head.packed.dtype.itemsize if isinstance(head, PackedLinear) else 0

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """The last hidden states of the stacked rows, (n_seats * n_batch, n_columns, n_hidden), for :meth:`head`."""
        self._make_masks(input_ids, inputs)
        return cast(Tensor, self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state)

    def _make_masks(self, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        """Over a static cache the attention's masks are made here, as ``generate`` does: they depend on its contents,
        which a compiled model cannot look at.
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
        """The logits of hidden states, as :meth:`forward` gives them; for lanes with a quick head."""
        return cast(Tensor, self.model.get_output_embeddings()(hidden))

    def alone(self, name: str) -> Any:
        """The model of member ``name`` by itself, for calls of its own: the very weights, its adapter on all rows."""
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
            PromptError: for a row with padding, where the model is not exact with it.
        """
        if not self.reading.padded and (mask := inputs.get("attention_mask")) is not None and not bool(mask.all()):
            raise PromptError(
                f"{type(self.model).__name__} ({', '.join(self.seats[0].names)}) gives other logits behind padding; "
                "give it one prompt at a time, or prompts of one length"
            )
        cache = inputs.get("past_key_values")
        if not self.reading.in_pieces and input_ids.shape[1] > 1 and has_read(cache):
            logits = one_by_one(lambda ids, **own: self(ids, logits_to_keep=0, **own), input_ids, inputs)
            return _kept(logits, logits_to_keep)
        self._make_masks(input_ids, inputs)
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = logits_to_keep
            return cast(Tensor, self.model(input_ids=input_ids, **inputs).logits)
        return _kept(self.model(input_ids=input_ids, **inputs).logits, logits_to_keep)


def _kept(logits: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Some positions of logits, by transformers' argument of that name: how many of the last, 0 for all, or which."""
    return logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]


class CannotShare(MemberError):
    """An adapter of ``owner`` turns out to need weights of its own, for ``reason``."""

    def __init__(self, owner: str, reason: str) -> None:
        super().__init__(
            f"{owner} shares its weights with another member, but its adapter cannot be applied to a part of the batch "
            f"because {reason}; give members with weights of their own"
        )
        self.owner, self.reason = owner, reason


def _marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What shows that a parameter was written to: PyTorch's count of writes, and a sample of its bits.

    Optimizers that are fused leave the count alone, and change every value.
    """
    return {
        name: (p.dtype, 0 if p.is_inference() else p._version, *checksums({"": _sample(p)}).values())
        for name, p in model.named_parameters()
    }


def _sample(weight: Tensor, n: int = 65536) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // n)]


def _differ(mark: tuple[Any, ...], loaded: tuple[Any, ...]) -> bool:
    return mark[0] == loaded[0] and mark != loaded  # another dtype is the same weights, rounded


@torch.no_grad()
def _ends_with_its_head(model: Any, n_rows: int) -> bool:
    """Whether the logits are what the head gives: some families scale or cap them, or norm what the head reads."""
    if model.base_model is model:
        return False
    ids = torch.tensor([[0, 1]] * n_rows, device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)


def _bytes_read(model: nn.Module) -> int:
    """What a token's forward reads of the weights: all of them, but of input embeddings only a row."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    sizes.pop(id(idle_embeddings(model)), None)
    packed = (module.packed for module in model.modules() if isinstance(module, PackedLinear))
    return sum(sizes.values()) + sum(weight.numel() * weight.dtype.itemsize for weight in packed)
