"""Members with prompts of their own: what they read, and where the shared continuation begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.decoding.lane import Lane, stacked
from proxytune.errors import PromptError
from proxytune.recipe.prompts import Negative, left_pad

__all__ = ["as_tensors", "comparable", "first_columns", "last_columns", "negative_rows", "reads_its_own"]


def reads_its_own(lane: Lane) -> bool:
    """Whether a lane reads prompts of its own. It does if any of its seats does, because its rows must stay aligned."""
    return any(seat.prompt.kind != "raw" for seat in lane.seats)


def first_columns(
    lanes: Sequence[Lane],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    member_input_ids: Mapping[str, Tensor] | None,
    member_attention_mask: Mapping[str, Tensor] | None,
    prompt_length: int | None,
) -> list[tuple[Tensor, Tensor | None]]:
    """The ids and the mask that each lane reads in the first call with own prompts.

    A lane with prompts of its own reads (n_rows, n_columns): its members' prompts, and ``input_ids`` from
    ``prompt_length`` on. Other lanes read the arguments of the call, (n_batch, n_columns).
    """
    if prompt_length is None or member_input_ids is None:
        raise PromptError(
            "members have prompts of their own, so a forward needs `member_input_ids` and `prompt_length` to know "
            "where the shared continuation begins; use generate(), which makes both"
        )
    having = [name for lane in lanes for seat in lane.seats if seat.prompt.kind != "raw" for name in seat.names]
    for name in member_input_ids:
        if name not in having:
            raise PromptError(
                f"member {name!r} has no prompt of its own, so `member_input_ids` cannot give one; these have one: "
                f"{', '.join(having)}"
            )
    if not 0 < prompt_length <= input_ids.shape[1]:
        raise PromptError(
            f"members have prompts of their own, so their first forward reads the whole prompt, {prompt_length} "
            f"columns, not {input_ids.shape[1]}; do without `prefill_chunk_size`"
        )
    shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns: list[tuple[Tensor, Tensor | None]] = []
    for lane in lanes:
        if not reads_its_own(lane):
            columns.append((input_ids, attention_mask))
            continue
        prompts = []
        for seat in lane.seats:
            ids, mask = input_ids[:, :prompt_length], shown[:, :prompt_length]
            if seat.prompt.kind != "raw":
                name = seat.names[0]
                if name not in member_input_ids:
                    raise PromptError(f"`member_input_ids` has no prompt for member {name!r}")
                ids = member_input_ids[name]
                if ids.dim() != 2 or ids.shape[0] != input_ids.shape[0]:
                    raise PromptError(
                        f"the prompt of member {name!r} has shape {tuple(ids.shape)}, not ({len(input_ids)}, width)"
                    )
                mask = (member_attention_mask or {}).get(name, torch.ones_like(ids))
            prompts.append((ids, mask))
        width = max(ids.shape[1] for ids, _ in prompts)
        read = []
        for parts, outer in zip(zip(*prompts), (input_ids, shown)):
            own = torch.cat([nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]).to(outer.device)
            read.append(torch.cat([own, stacked(outer[:, prompt_length:].to(own.dtype), len(own))], dim=1))
        columns.append((read[0], read[1]))
    return columns


def last_columns(
    lanes: Sequence[Lane], input_ids: Tensor, member_input_ids: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    """The last column of every prompt, for a cache that holds all columns before it; same form as
    :func:`first_columns`."""
    last = input_ids[:, -1:]
    return [
        (torch.cat([member_input_ids.get(seat.names[0], last)[:, -1:].to(last.device) for seat in lane.seats]), None)
        if reads_its_own(lane)
        else (last, None)
        for lane in lanes
    ]


def comparable(logits_to_keep: int | Tensor, n_positions: int) -> int:
    """How many positions to compute if members have read different prompts: those of the shared columns."""
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
    tensors, found = dict(ids), dict(masks or {})
    for name, rows in ids.items():
        if not isinstance(rows, Tensor):
            if any(len(row) == 0 for row in rows):
                raise PromptError(f"the prompt of member {name!r} is empty; give at least one token")
            tensors[name], found[name] = left_pad(rows)
    return tensors, found


def negative_rows(negative: Any, n_batch: int) -> list[Negative] | None:
    """The negative prompt of each row, from the argument of ``generate``: one for all rows, or a list with one per row.

    Raises:
        PromptError: for a list of the wrong length, and for a value that is neither a text nor ids.
    """
    if negative is None:
        return None
    given = negative.tolist() if isinstance(negative, Tensor) else negative
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and given and all(map(_is_id, given))):
        return [given] * n_batch
    if not isinstance(given, (list, tuple)) or not all(
        each is None or isinstance(each, str) or (isinstance(each, (list, tuple)) and all(map(_is_id, each)))
        for each in given
    ):
        raise PromptError("negative_prompt must be a text, its ids, or a list of these with one for each row")
    if len(given) != n_batch:
        raise PromptError(f"negative_prompt has {len(given)} entries for {n_batch} rows; give one for each row, or one")
    return list(given)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
