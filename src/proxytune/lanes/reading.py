"""Tests how a loaded model can be read: whole or in pieces, with padding or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxytune.errors import MemberError, first_line
from proxytune.recipe.families import new_cache, obstacle_of, read_columns, unused_cache

__all__ = ["Reading", "has_read", "one_by_one", "reading_of", "refuse_unequal_lengths", "rotations", "unlike_in_pieces"]

N_TRIED, N_PREFIX = 14, 11  # tokens that a test reads, and how many of them at first
# How far two ways of computing the same logits may differ (root mean square), as a share of the logits' spread.
EXACT = {torch.float32: 2e-4, torch.float64: 2e-4}
ROUNDED = 0.2  # in half precision and quantized; another prefix gives about 1


@dataclass(frozen=True)
class Reading:
    """How a model can be read.

    Attributes:
        obstacle: why its cache cannot be used at all; None if it can.
        in_pieces: whether several tokens can be read at once after others; otherwise one at a time.
        padded: whether padding on the left changes nothing.
    """

    obstacle: str | None = None
    in_pieces: bool = True
    padded: bool = True


_tried: dict[Any, Reading] = {}  # the answer depends on the class and its config


@torch.no_grad()
def reading_of(model: Any) -> Reading:
    """How a loaded model can be read, found by reading a few tokens in several ways and comparing the logits."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return Reading(obstacle_of(model))
    key = (type(model), model.dtype, model.config.to_json_string())
    if key not in _tried:
        modes = [module for module in model.modules() if module.training]
        model.eval()
        try:
            _tried[key] = _try(model)
        finally:
            for module in modes:
                module.training = True
    return _tried[key]


def _try(model: Any) -> Reading:
    kind = type(model).__name__
    if (obstacle := obstacle_of(model)) is not None:
        return Reading(obstacle)
    n_vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(1, N_TRIED + 1, device=model.device) * 7919 % n_vocab)[None]
    ones = torch.ones_like(ids)
    tolerance = EXACT.get(model.dtype, ROUNDED) if getattr(model, "hf_quantizer", None) is None else ROUNDED

    def agree(logits: Tensor, expected: Tensor) -> bool:
        apart = (logits.float() - expected.float()).pow(2).mean(dim=-1).sqrt()
        return bool((apart / expected.float().std(dim=-1)).mean() <= tolerance)

    try:
        whole = read_columns(model, ids, mask=ones).logits
        cache = new_cache(model)
        answered = read_columns(model, ids[:, :N_PREFIX], mask=ones[:, :N_PREFIX], cache=cache)
        if (unused := unused_cache(model, cache, answered, N_PREFIX)) is not None:
            return Reading(unused)
        # Nothing is padding, so lanes give no mask.
        stepped = [read_columns(model, ids[:, at : at + 1], at, cache=cache).logits for at in (N_PREFIX, N_PREFIX + 1)]
        same = agree(answered.logits, whole[:, :N_PREFIX])
        if not same or not agree(torch.cat(stepped, dim=1), whole[:, N_PREFIX : N_PREFIX + 2]):
            return Reading(f"{kind} gives other logits with a cache than without one")
    except Exception as error:  # a cache of another kind, positions that only its own generate() knows
        return Reading(f"{kind} cannot be read with a cache ({first_line(error)})")

    def tried(read: Callable[[], Tensor], expected: Tensor) -> bool:
        try:
            return agree(read(), expected)
        except Exception:  # errors only show that the model cannot do it
            return False

    def piece() -> Tensor:
        cache = new_cache(model)
        read_columns(model, ids[:, :N_PREFIX], mask=ones[:, :N_PREFIX], cache=cache)
        return read_columns(model, ids[:, N_PREFIX:], mask=ones, cache=cache).logits

    def behind_padding() -> Tensor:
        pad = torch.zeros_like(ids[:, :2])
        return read_columns(model, torch.cat([pad, ids], dim=1), mask=torch.cat([pad, ones], dim=1)).logits[:, 2:]

    return Reading(in_pieces=tried(piece, whole[:, N_PREFIX:]), padded=tried(behind_padding, whole))


def has_read(cache: Any) -> bool:
    """Whether some column has been read into a cache."""
    return cache is not None and any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def one_by_one(read: Callable[..., Tensor], ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The logits of columns after others, read one at a time, for models that are not ``in_pieces``.

    ``read`` gives the logits of ids, (n_rows, k), and ``inputs``, in which a mask is (n_rows, n_read + n_columns).
    """
    parts = []
    n_columns, mask, positions = ids.shape[1], inputs.get("attention_mask"), inputs.get("position_ids")
    for at in range(n_columns):
        own = {
            "attention_mask": None if mask is None else mask[:, : mask.shape[1] - n_columns + at + 1],
            "position_ids": None if positions is None else positions[:, at : at + 1],
        }
        parts.append(read(ids[:, at : at + 1], **{**inputs, **own}))
    return torch.cat(parts, dim=1)


# Rotations of positions (rope_type) that depend only on the position. Others ("dynamic", "longrope") also depend on the
# longest position of the call, so a token after drafts is read differently from one read alone.
ROTATIONS = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


def unlike_in_pieces(lanes: Iterable[Any]) -> str | None:
    """Why some lane may read several tokens at once differently from one by one; None if all are known not to."""
    for lane in lanes:
        if lane.model is None:  # it runs elsewhere, where each text is read anew
            continue
        names = ", ".join(name for seat in lane.seats for name in seat.names)
        if not type(lane.model).__module__.startswith("transformers."):
            return f"{names} runs code that is not transformers' own ({type(lane.model).__name__})"
        if kinds := sorted(rotations(lane.model) - ROTATIONS):
            return f"{names} may rotate positions by the length of the text (rope_type {kinds[0]!r})"
    return None


def refuse_unequal_lengths(lane: Any) -> None:
    """Raise :class:`MemberError` if one pass reads prompts of several lengths with a rotation that depends on the
    length."""
    if len({seat.prompt for seat in lane.seats}) == 1:
        return
    if kinds := sorted(rotations(lane.model) - ROTATIONS):
        names = " and ".join(name for seat in lane.seats for name in seat.names)
        raise MemberError(
            f"{names} are computed together and read prompts of their own, but how positions are rotated may depend "
            f"on the longest (rope_type {kinds[0]!r}); give them one prompt, or each a copy of the model"
        )


def rotations(model: Any) -> set[str]:
    """The rope types that a model's modules and config name."""
    found: set[str] = set()
    for source in (*model.modules(), model.config.get_text_config(decoder=True)):
        for name in ("rope_type", "rope_parameters", "rope_scaling"):
            found |= _rope_types(getattr(source, name, None))
    return found


def _rope_types(value: Any) -> set[str]:
    """The rope types in a rope type, in rope parameters, or in a mapping from kinds of layers to either."""
    if isinstance(value, str):
        return {value}
    if not isinstance(value, Mapping):
        return set()
    kind = value.get("rope_type", value.get("type"))
    if isinstance(kind, str):
        return {kind}
    return set().union(*(_rope_types(each) for each in value.values() if isinstance(each, (str, Mapping))))
