"""LoRA on a block of rows: several adapters, and their model's weights as they are, in one forward.

A batch is stacked from blocks of equal size, one per *seat*. A layer knows each seat's adapter and finds the blocks in
its rows. Nothing is kept between calls, so threads do not interfere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from proxytune.errors import MemberError

__all__ = ["RowLoRA", "apply_by_rows", "refuse_unlike", "same_weights"]

ROWS, COLUMNS = 3, 5  # rows of the trial batch: a module that gets only some of them is found by the number


class RowLoRA(nn.Module):
    """A PEFT LoRA layer whose adapters each touch one block of rows: ``y = W x``, then ``y[block] += s B A x[block]``.

    It is added to the class of PEFT's layer, so all names stay. PEFT's own batches with mixed adapters gather rows in
    every layer; blocks need only views.
    """

    seats: tuple[str | None, ...]  # the adapter of each block of rows, in order

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` has n_seats * n_batch rows, or n_seats * n_batch * n_columns if the model flattens them."""
        layer = cast(Any, self)  # PEFT's side of it
        n_rows = x.shape[0] // len(self.seats)  # no divmod(): a compiled graph would break at it
        if x.shape[0] % len(self.seats):
            raise MemberError(f"{x.shape[0]} rows are not {len(self.seats)} equal blocks; load the recipe unshared")
        y = layer.base_layer(x, *args, **kwargs)
        for block, adapter in enumerate(self.seats):
            rows = slice(block * n_rows, (block + 1) * n_rows)
            if adapter in layer.lora_A:
                down, up = layer.lora_A[adapter], layer.lora_B[adapter]
                taken = x[rows].to(down.weight.dtype)
                delta = up(down(layer.lora_dropout[adapter](taken) if self.training else taken))
            elif adapter in layer.lora_embedding_A:  # x are ids; A and B are kept transposed
                down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
                delta = layer._embed(x[rows], down.T) @ up.T
                if (scale := layer._get_embed_scale()) is not None:  # Gemma's embeddings scale themselves
                    delta = delta * scale.to(delta.dtype)
            else:
                continue
            y[rows].add_(delta, alpha=layer.scaling[adapter])
        return y  # type: ignore[no-any-return]


@cache
def _row_class(layer: type) -> type:
    return type(f"Row{layer.__name__}", (RowLoRA, layer), {})


def apply_by_rows(model: nn.Module, seats: Sequence[str | None]) -> None:
    """Change a model's LoRA layers in place, so that each block of rows goes through its adapter (None: through
    none)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, RowLoRA):
                module.__class__ = _row_class(type(module))
            cast(RowLoRA, module).seats = tuple(seats)


def same_weights(model: Any) -> Any:
    """A second module tree over the same parameters and buffers as ``model``, with its own configs and hooks."""
    weights = [*model.parameters(), *model.buffers()]
    weights += [held for module in model.modules() for held in vars(module).values() if isinstance(held, Tensor)]
    try:
        return copy.deepcopy(model, {id(weight): weight for weight in weights})
    except Exception as error:  # objects in a model that cannot be copied: locks, open files
        raise MemberError(f"the modules of a {type(model).__name__} in memory cannot be copied: {error}") from error


@torch.no_grad()
def refuse_unlike(model: Any, seats: Sequence[str | None]) -> str | None:
    """Why adapters on blocks of rows would give other results than alone, or None. It is tested on a few tokens.

    Some modules do not get whole rows (the experts of a mixture-of-experts model get only their own tokens).
    """
    n_rows = ROWS * len(seats)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(n_rows * COLUMNS, device=model.device).view(n_rows, COLUMNS) * 7919) % vocab_size
    given: set[int] = set()
    layers = [module for module in model.modules() if isinstance(module, RowLoRA)]
    hooks = [layer.register_forward_pre_hook(lambda _, x: given.add(x[0].shape[0])) for layer in layers]
    try:
        together = model(input_ids=ids, use_cache=False).logits
    except MemberError:
        given.add(-1)
    finally:
        for hook in hooks:
            hook.remove()
    if not given <= {n_rows, n_rows * COLUMNS}:
        return "some of its layers are not given whole rows"
    for adapter in set(seats):
        alone = same_weights(model)
        apply_by_rows(alone, [adapter])
        expected = alone(input_ids=ids, use_cache=False).logits
        bound = max(1e-3, 16 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
        for block, other in enumerate(seats):
            rows = slice(block * ROWS, (block + 1) * ROWS)
            if other == adapter and not torch.allclose(together[rows], expected[rows], rtol=0, atol=bound):
                return "its rows do not stay apart in this model"
    return None
