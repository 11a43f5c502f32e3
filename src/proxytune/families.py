"""Can a model's cache be driven beside other members'? Told by its class and its cache, and by trying.

Members are read column by column through caches that the composite makes. Most families keep keys and values, and are
exact so. Others keep a state that tokens flow into, keep it where no caller can reach it, or have a decoding step that
differs from reading the whole text. Nothing here looks at a model's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from proxytune.errors import first_line

__all__ = ["Reading", "has_read", "keeps_states", "obstacle_of", "one_by_one", "reading_of"]

# Layers whose contents can be cropped, or at least selected and repeated by rows, as the composite needs.
KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
N_TRIED, N_PREFIX = 14, 11  # tokens that a trial reads, and how many of them at first
# How far two ways of computing the same logits may lie apart (root mean square), as a share of the logits' spread.
EXACT = {torch.float32: 2e-4, torch.float64: 2e-4}
ROUNDED = 0.2  # in half precision and quantized; another prefix gives about 1


@dataclass(frozen=True)
class Reading:
    """How a model is to be read.

    Attributes:
        obstacle: why its cache cannot be driven at all; None where it can.
        in_pieces: whether several tokens can be read at once behind others; else one at a time.
        padded: whether padding on the left changes nothing.
    """

    obstacle: str | None = None
    in_pieces: bool = True
    padded: bool = True


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether some layer keeps a state that tokens flow into, in place of keys and values for each of them."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def obstacle_of(model: Any) -> str | None:
    """Why a model's cache cannot be driven, as far as its class and its cache's layers tell; None where they do not.

    ``model`` may be empty (on the meta device).
    """
    kind = type(model).__name__
    takes = set(inspect.signature(model.forward).parameters)
    if not {"past_key_values", "use_cache"} <= takes:
        return f"{kind} takes no `past_key_values`: its state cannot be kept beside other members' caches"
    if "encoder_hidden_states" in takes and getattr(model.config, "is_decoder", None) is False:
        return f"{kind} looks at the tokens that follow, since its config does not set is_decoder"
    if not model._supports_default_dynamic_cache():
        return f"{kind} has a cache of its own kind, which other members cannot be read beside"
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception as error:  # a type of layer that transformers has no cache for, a config without layers
        return f"no cache can be made for {kind} ({first_line(error)})"
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) not in KNOWN_LAYERS})
    if unknown:
        return f"{kind} has layers of caches ({', '.join(unknown)}) that have not been verified with several members"
    if getattr(model, "device", None) == torch.device("meta"):
        try:
            cache = _new_cache(model)
            answered = _read(model, torch.zeros(1, 3, dtype=torch.long, device="meta"), cache=cache)
        except Exception:  # a model that looks at values: loading it will tell
            return None
        return _unused(model, cache, answered, 3)
    return None


_tried: dict[Any, Reading] = {}  # the answer depends on the class and its config


@torch.no_grad()
def reading_of(model: Any) -> Reading:
    """How a loaded model is to be read, by reading a few tokens in several ways and comparing the logits."""
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
        whole = _logits(_read(model, ids, mask=ones))
        cache = _new_cache(model)
        answered = _read(model, ids[:, :N_PREFIX], mask=ones[:, :N_PREFIX], cache=cache)
        if (unused := _unused(model, cache, answered, N_PREFIX)) is not None:
            return Reading(unused)
        stepped = [
            _logits(_read(model, ids[:, at : at + 1], at, cache=cache))  # nothing is padding, so lanes give no mask
            for at in range(N_PREFIX, N_PREFIX + 2)
        ]
        same = agree(_logits(answered), whole[:, :N_PREFIX])
        if not same or not agree(torch.cat(stepped, dim=1), whole[:, N_PREFIX : N_PREFIX + 2]):
            return Reading(f"{kind} decodes other logits with a cache than it reads without one")
    except Exception as error:  # a cache of another kind, positions that only its own generate() knows
        return Reading(f"{kind} cannot be read with a cache ({first_line(error)})")

    def tried(read: Callable[[], Tensor], expected: Tensor) -> bool:
        try:
            return agree(read(), expected)
        except Exception:  # what cannot be done need not be done
            return False

    def piece() -> Tensor:
        cache = _new_cache(model)
        _read(model, ids[:, :N_PREFIX], mask=ones[:, :N_PREFIX], cache=cache)
        return _logits(_read(model, ids[:, N_PREFIX:], mask=ones, cache=cache))

    def behind_padding() -> Tensor:
        pad = torch.zeros_like(ids[:, :2])
        return _logits(_read(model, torch.cat([pad, ids], dim=1), mask=torch.cat([pad, ones], dim=1)))[:, 2:]

    return Reading(in_pieces=tried(piece, whole[:, N_PREFIX:]), padded=tried(behind_padding, whole))


def _new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _read(model: Any, ids: Tensor, start: int = 0, *, mask: Tensor | None = None, cache: Any = None) -> Any:
    """A forward as lanes make it, of ids from position ``start`` on; a mask is given where something may be padding."""
    if mask is None:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    else:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(input_ids=ids, use_cache=cache is not None, **inputs)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _unused(model: Any, cache: DynamicCache, output: Any, n_read: int) -> str | None:
    """Why a cache that a model has been given is not what it keeps; None where it is."""
    attention = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    lengths = {layer.get_seq_length() for layer in attention if layer.is_initialized}
    if getattr(output, "past_key_values", None) is cache and (lengths == {n_read} or not attention):
        return None
    return f"{type(model).__name__} does not keep what it has read in the cache that it is given"


def has_read(cache: Any) -> bool:
    """Whether some column has been read into a cache."""
    return cache is not None and any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def one_by_one(read: Callable[..., Tensor], ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The logits of columns that are read behind others one at a time, as models must be that are not ``in_pieces``.

    Args:
        read: gives the logits of ids, (n_rows, k), and ``inputs``.
        ids: shape = (n_rows, n_columns). inputs: with ``attention_mask`` (n_rows, n_read + n_columns) and
            ``position_ids`` (n_rows, n_columns), or None in their places.
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
