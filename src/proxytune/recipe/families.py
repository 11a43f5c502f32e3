"""Can a model's cache be used beside other members' caches? Its class and its cache decide; loading tests it.

Members are read column by column through caches that the composite makes. Most families keep keys and values, which
gives exact results. Others keep a running state, keep it where no caller can reach it, or have a decoding step that
differs from reading the whole text. Nothing here depends on a model's name.
"""

from __future__ import annotations

import inspect
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

__all__ = ["idle_embeddings", "keeps_states", "new_cache", "obstacle_of", "read_columns", "unused_cache"]

# Layers that can be cropped, or at least selected and repeated by rows, as the composite needs.
KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether some layer keeps one running state in place of keys and values for each token."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def obstacle_of(model: Any) -> str | None:
    """Why a model's cache cannot be used, as far as its class and its cache's layers show; None if they show no reason.

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
    except Exception as error:  # a type of layer without a cache in transformers, or a config without layers
        return f"no cache can be made for {kind} ({first_line(error)})"
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) not in KNOWN_LAYERS})
    if unknown:
        return f"{kind} has layers of caches ({', '.join(unknown)}) that have not been verified with several members"
    if getattr(model, "device", None) == torch.device("meta"):
        try:
            cache = new_cache(model)
            answered = read_columns(model, torch.zeros(1, 3, dtype=torch.long, device="meta"), cache=cache)
        except Exception:  # a model that looks at values: loading it will test this
            return None
        return unused_cache(model, cache, answered, 3)
    return None


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for a model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def read_columns(model: Any, ids: Tensor, start: int = 0, *, mask: Tensor | None = None, cache: Any = None) -> Any:
    """A forward in the form that lanes use, of ids from position ``start`` on. The mask is needed if there may be
    padding."""
    if mask is None:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    else:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(input_ids=ids, use_cache=cache is not None, **inputs)


def unused_cache(model: Any, cache: DynamicCache, output: Any, n_read: int) -> str | None:
    """Why a model did not use the cache that it was given; None if it did."""
    attention = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    lengths = {layer.get_seq_length() for layer in attention if layer.is_initialized}
    if getattr(output, "past_key_values", None) is cache and (lengths == {n_read} or not attention):
        return None
    return f"{type(model).__name__} does not store what it reads in the cache that it is given"


def idle_embeddings(model: Any) -> Tensor | None:
    """The input embeddings of a model if its head is another weight. Then a token reads only one row of them."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is getattr(model.get_output_embeddings(), "weight", None) else weight
