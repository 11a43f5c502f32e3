"""Attention of a part that reads its own prompt: vLLM's own kernels, on the part's rows and its places in the cache.

vLLM's builders turn a batch's common metadata into those of a kernel. Here the common metadata are first those of the
part's own, smaller batch (:class:`proxytune.vllm.own_prompts.Reading`), as vLLM does it for cross-attention. Keys and
values are written where these metadata say: the forward context has the places of the whole batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend_with_overrides
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as

from proxytune.errors import MemberError
from proxytune.vllm.own_prompts import Reading

__all__ = ["BACKENDS", "Now", "read_own_prompts"]

# Run in tests: CPU_ATTN; V2's runner on a CPU takes it too. Written against their metadata: the others.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


@dataclass
class Now:
    """What a part reads in the batch at hand, None for the batch as it is; and the block size of the scheduler."""

    part: str
    reading: Reading | None = None
    block: int = 0


def read_own_prompts(owner: str, part: nn.Module, now: Now) -> None:
    """Let all attention layers of a part follow ``now``. Called after the part is built, before vLLM asks its layers.

    Raises:
        MemberError: for attention that was not tried.
    """
    made: dict[Any, Any] = {}
    for layer in part.modules():
        if not isinstance(layer, Attention):
            continue
        plain, window = layer.attn_backend, layer.sliding_window
        if plain.get_name() not in BACKENDS or plain.forward_includes_kv_cache_update:
            raise MemberError(
                f"{owner} has the attention backend {plain.get_name()}, with which prompts of members' own were not "
                f"tried; choose {' or '.join(BACKENDS)} by --attention-backend"
            )
        if (plain, window) not in made:
            made[plain, window] = own_backend(plain, now, window)
        layer.attn_backend = made[plain, window]
        layer.impl.__class__ = layer.attn_backend.get_impl_cls()
        layer.get_kv_cache_spec = keeping_all_blocks(owner, layer, now)


def keeping_all_blocks(owner: str, layer: Any, now: Now) -> Any:
    """The layer's method ``get_kv_cache_spec``, for a cache that keeps all blocks also if the layer slides.

    vLLM frees a sliding layer's blocks by the outer position, which may be ahead of the part's own. Layers of one kind
    are also one group of the cache, so that there is one block size: the scheduler's. The group has no window, because
    parts may have different ones; each layer computes with its own.
    """
    plain = layer.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> Any:
        spec, now.block = plain(vllm_config), vllm_config.cache_config.block_size
        if type(spec) is SlidingWindowSpec:
            spec = replace_as(spec, FullAttentionSpec, drop=("extra_retained_tokens",), block_size=now.block)
        if type(spec) is not FullAttentionSpec or spec.block_size != now.block:
            raise MemberError(f"{owner} has a cache of another kind ({spec}), not tried with prompts of members' own")
        return replace(spec, sliding_window=None)

    return get_kv_cache_spec


def own_backend(plain: Any, now: Now, window: int | None) -> Any:
    """A backend of one part's layers of one window. vLLM tells them from others by its name, so that they have a
    builder of their own: FlashInfer's plans one window."""
    plain_builder: Any = plain.get_builder_cls()
    plain_impl: Any = plain.get_impl_cls()

    class OwnBuilder(plain_builder):  # type: ignore[misc]
        supports_update_block_table = False  # rows are not those of other layers
        supports_draft_decode_metadata_update = False

        @classmethod
        def get_cudagraph_support(cls, *_: Any) -> Any:
            # The number of rows changes from step to step, so whole steps are never captured. The pieces between
            # attention layers are.
            return AttentionCGSupport.NEVER

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            if now.reading is None:
                return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            if not len(now.reading.positions):
                return None  # the part does not run
            block = self.kv_cache_spec.block_size  # the kernel's, a part of the scheduler's
            return super().build(0, own_metadata(now.reading, block, common_attn_metadata), *args, **kwargs)

    class OwnImpl(plain_impl):  # type: ignore[misc]
        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            shares = layer.kv_sharing_target_layer_name is not None
            if attn_metadata is not None and key is not None and not shares:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    return subclass_attention_backend_with_overrides(
        name_prefix=f"OwnPrompts_{now.part}_{window}_",
        attention_backend_cls=plain,
        overrides={
            "get_builder_cls": staticmethod(lambda: OwnBuilder),
            "get_impl_cls": staticmethod(lambda: OwnImpl),
            "forward_includes_kv_cache_update": True,
        },
    )


def own_metadata(reading: Reading, block: int, whole: Any) -> Any:
    """``CommonAttentionMetadata`` of the rows that a part reads."""
    device = whole.seq_lens.device
    there = functools.partial(async_tensor_h2d, device=device)
    table = whole.block_table_tensor[there(reading.requests)]
    if reading.begins.any():
        columns = torch.arange(table.shape[1], device=device) + there(reading.begins // block)[:, None]
        table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
    positions, of_row = there(reading.positions), there(reading.of_row)
    slots = torch.full_like(whole.slot_mapping, -1)  # as many as the rows of keys
    slots[: len(positions)] = table[of_row, positions // block].to(slots.dtype) * block + positions % block
    # What the host is to know is not copied back from the device, which would wait for it.
    lengths = torch.from_numpy(reading.lengths).to(whole.seq_lens.dtype)
    starts = torch.from_numpy(reading.starts).to(whole.query_start_loc.dtype)
    kept = torch.from_numpy(reading.requests)
    return whole.replace(
        query_start_loc=there(starts),
        query_start_loc_cpu=starts,
        seq_lens=there(lengths),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(reading.requests),
        num_actual_tokens=len(reading.positions),
        max_query_len=int(np.diff(reading.starts).max()),
        max_seq_len=int(reading.lengths.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        positions=positions,
        is_prefilling=None if whole.is_prefilling is None else whole.is_prefilling[kept],
        req_idx=None if whole.req_idx is None else whole.req_idx[reading.requests],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
