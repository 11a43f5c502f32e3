"""Prompts of their own: what members read in place of ``input_ids``, and where the shared continuation begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.cache import LanePrompt
from proxytune.decoding.lane import Lane, stacked
from proxytune.errors import PromptError
from proxytune.recipe.prompts import left_pad

__all__ = ["as_tensors", "comparable", "lane_prompts", "own_columns", "reads_its_own"]


def reads_its_own(lane: Lane) -> bool:
    """Whether a lane reads prompts of its own. It does as soon as one of its seats does: its rows must stay aligned."""
    return any(seat.prompt.kind != "raw" for seat in lane.seats)


def lane_prompts(
    lanes: Sequence[Lane],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    member_input_ids: Mapping[str, Tensor] | None,
    member_attention_mask: Mapping[str, Tensor] | None,
    prompt_length: int | None,
) -> list[LanePrompt | None]:
    """Each lane's own prompts, or None where it reads ``input_ids``.

    Args:
        input_ids, attention_mask: the outer ones, (n_batch, n_columns).
        member_input_ids, member_attention_mask: member name -> its prompt and mask, (n_batch, its width).
        prompt_length: how many outer columns are prompt.
    """
    if prompt_length is None or member_input_ids is None:
        raise PromptError(
            "members have prompts of their own, so a forward needs `member_input_ids` and `prompt_length` to know "
            "where the shared continuation begins; use generate(), which makes both"
        )
    if not 0 < prompt_length <= input_ids.shape[1]:
        raise PromptError(
            f"members have prompts of their own, so their first forward reads the whole prompt, {prompt_length} "
            f"columns, not {input_ids.shape[1]}; do without `prefill_chunk_size`"
        )
    prompts: list[LanePrompt | None] = []
    for lane in lanes:
        if not reads_its_own(lane):
            prompts.append(None)
            continue
        blocks = []
        for seat in lane.seats:
            if seat.prompt.kind == "raw":
                ids = input_ids[:, :prompt_length]
                mask = None if attention_mask is None else attention_mask[:, :prompt_length]
            else:
                name = seat.names[0]
                if name not in member_input_ids:
                    raise PromptError(f"`member_input_ids` has no prompt for member {name!r}")
                ids = member_input_ids[name]
                mask = (member_attention_mask or {}).get(name)
                if ids.dim() != 2 or ids.shape[0] != input_ids.shape[0]:
                    raise PromptError(
                        f"the prompt of member {name!r} has shape {tuple(ids.shape)}, not ({len(input_ids)}, width)"
                    )
            blocks.append((ids, torch.ones_like(ids) if mask is None else mask))
        width = max(ids.shape[1] for ids, _ in blocks)
        stacks = [
            torch.cat([nn.functional.pad(block[part], (width - block[part].shape[1], 0)) for block in blocks])
            for part in (0, 1)
        ]
        prompts.append(LanePrompt(*(tensor.to(input_ids.device) for tensor in stacks)))
    return prompts


def own_columns(
    own: LanePrompt, input_ids: Tensor, attention_mask: Tensor | None, prompt_length: int
) -> tuple[Tensor, Tensor]:
    """The ids and the mask of a lane with prompts of its own, in a call that begins with them, (n_rows, n_columns).

    Args:
        own: the lane's prompts, (n_rows, width).
        input_ids, attention_mask: the outer ones, (n_batch, n_columns); their part from ``prompt_length`` on is shared.
    """
    shared = input_ids[:, prompt_length:]
    shown = torch.ones_like(shared) if attention_mask is None else attention_mask[:, prompt_length:].to(own.mask.dtype)
    n_rows = own.ids.shape[0]
    return torch.cat([own.ids, stacked(shared, n_rows)], dim=1), torch.cat([own.mask, stacked(shown, n_rows)], dim=1)


def comparable(logits_to_keep: int | Tensor, n_positions: int) -> int:
    """How many positions to compute where members have read different prompts: those of the shared columns."""
    if not isinstance(logits_to_keep, int) or logits_to_keep > n_positions:
        raise PromptError(
            f"members have prompts of their own, so only the last {n_positions} positions can be mixed; "
            "give that number or fewer as `logits_to_keep`"
        )
    return logits_to_keep or n_positions


def as_tensors(
    ids: Mapping[str, Any], masks: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Own prompts as left-padded tensors with their masks."""
    tensors, found = {}, dict(masks or {})
    for name, rows in ids.items():
        if isinstance(rows, Tensor):
            tensors[name] = rows
            found.setdefault(name, torch.ones_like(rows))
        else:
            if any(len(row) == 0 for row in rows):
                raise PromptError(f"the prompt of member {name!r} is empty; give at least one token")
            tensors[name], found[name] = left_pad(rows)
    return tensors, found
