"""LoRA on a block of rows: several adapters, and their model's weights as they are, in one forward.

A batch is stacked from blocks of equal size, one a *seat*. A layer knows each seat's adapter and finds the blocks in
the rows that it is given. Nothing is kept between calls, so threads do not meet.
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

ROWS, COLUMNS = 3, 5  # of the trial batch: a module that is given part of it can be told by the number


class RowLoRA(nn.Module):
    """A PEFT LoRA layer whose adapters each touch one block of rows: ``y = W x``, then ``y[block] += s B A x[block]``.

    It is mixed into the class of PEFT's layer, which keeps its names. PEFT's own mixed-adapter batch gathers rows layer
    by layer; blocks need only views.
    """

    seats: tuple[str | None, ...]  # the adapter of each block of rows, in order

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` has n_seats * n_batch rows, or n_seats * n_batch * n_columns where a model flattens them."""
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
    """Let a model's LoRA layers, in place, each pass the blocks of rows through these adapters (None: through none)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, RowLoRA):
                module.__class__ = _row_class(type(module))
            cast(RowLoRA, module).seats = tuple(seats)


def same_weights(model: Any) -> Any:
    """A second module tree over the very parameters and buffers of ``model``, with configs and hooks of its own."""
    weights = [*model.parameters(), *model.buffers()]
    weights += [held for module in model.modules() for held in vars(module).values() if isinstance(held, Tensor)]
    try:
        return copy.deepcopy(model, {id(weight): weight for weight in weights})
    except Exception as error:  # whatever a model keeps that cannot be copied: locks, open files
        raise MemberError(f"the modules of a {type(model).__name__} in memory cannot be copied: {error}") from error


@torch.no_grad()
def refuse_unlike(model: Any, seats: Sequence[str | None]) -> str | None:
    """Why adapters on blocks of rows would not be what they are alone, or None; tried on a few tokens.

    Some modules are not given whole rows (the experts of a mixture get the tokens that are routed to them).
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
