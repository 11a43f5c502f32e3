"""vLLM's side that computes: each batch's alphas and prompts, cache blocks, the gathering of logits.

Written for vLLM 0.32 (see ``SUPPORTED``); tests check the interfaces named here. What is wrapped in the engine's core:
``Request.from_engine_core_request``, which makes the outer prompt, and ``generate_block_hash_extra_keys``, which says
what a block of the cache depends on. In the V1 runner, which knows nothing about a model's requests:
``GPUModelRunner._prepare_inputs`` and ``_model_forward``, and the n-gram drafter. (The V2 runner asks the model for a
class that gets each request.)
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from proxytune.vllm.alpha import Request, Row
from proxytune.vllm.own_prompts import block_keys, ids_in, outer_prompt

__all__ = ["shards_of", "state_class", "wrap_core", "wrap_v1_runner"]


# -- the engine's core ------------------------------------------------------------------------------------------
def wrap_core() -> None:
    """Lengthen prompts to the longest of a request's members, and tell their blocks apart. Other requests stay as they
    are."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.request import Request as CoreRequest

    make, keys = CoreRequest.from_engine_core_request.__func__, kv_cache_utils.generate_block_hash_extra_keys
    if getattr(keys, "asks_members", False):
        return
    numbers = itertools.count()

    @functools.wraps(make)
    def from_engine_core_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if own := prompts_of(request):
            request = copy.copy(request)  # without a process of the core's own, it is the frontend's too
            request.prompt_token_ids = outer_prompt(request.prompt_token_ids, own)
        return make(cls, request, *args, **kwargs)

    @functools.wraps(keys)
    def generate_block_hash_extra_keys(request: Any, start_token_idx: int, end_token_idx: int, *args: Any) -> Any:
        found, *more = keys(request, start_token_idx, end_token_idx, *args)
        if own := prompts_of(request):
            if not hasattr(request, "proxytune_number"):
                request.proxytune_number = next(numbers)  # its id may be that of an earlier request
            n_outer, number = request.num_prompt_tokens, request.proxytune_number
            added = block_keys(own, n_outer, number, start_token_idx, end_token_idx)
            found = (*(found or ()), *added)
        return found, *more

    generate_block_hash_extra_keys.asks_members = True  # type: ignore[attr-defined]
    CoreRequest.from_engine_core_request = classmethod(from_engine_core_request)
    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    block_pool.generate_block_hash_extra_keys = generate_block_hash_extra_keys


def prompts_of(request: Any) -> dict[str, Sequence[int]]:
    """Part -> the prompt that a request carries for it."""
    return ids_in(getattr(request.sampling_params, "extra_args", None))


# -- the V1 runner --------------------------------------------------------------------------------------------
def wrap_v1_runner() -> None:
    """Tell composites about each batch before it is computed, and drafters about prompts that were lengthened."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    prepare, forward, propose = GPUModelRunner._prepare_inputs, GPUModelRunner._model_forward, NgramProposer.propose
    if getattr(prepare, "tells_members", False):
        return

    @functools.wraps(prepare)
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(self, scheduler_output, num_scheduled_tokens)
        model = self.get_model()
        if hasattr(model, "set_rows"):
            batch, rows = self.input_batch, []
            for at, name in enumerate(batch.req_ids[: batch.num_reqs]):
                state = self.requests[name]
                if not hasattr(state, "proxytune"):
                    state.proxytune = model.recipe.asked_by(state.sampling_params)
                n_read, n = int(batch.num_computed_tokens_cpu[at]), int(num_scheduled_tokens[at])
                n_prompt = int(batch.num_prompt_tokens[at])
                rows.append(Row(state.proxytune, n_read, n, n_prompt, batch.token_ids_cpu[at]))
            model.set_rows(rows, self.reorder_batch_threshold or 1)
            if hasattr(self, "drafter"):
                self.drafter.proxytune_rows = rows
        return prepared

    @functools.wraps(forward)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        finally:
            model = self.get_model()
            if hasattr(model, "set_rows"):
                model.set_rows(None)  # a run without requests must not find it

    @functools.wraps(propose)
    def _propose(self: Any, k: int, sampled: Any, n_tokens: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        filled = [(at, *row.filled) for at, row in enumerate(getattr(self, "proxytune_rows", ())) if row.filled]
        if filled:  # drafts are copied from what the base has read
            n_tokens = n_tokens[: len(sampled)].copy()
            tokens = tokens[: len(sampled), : n_tokens.max()].copy()
            for at, start, end in filled:
                n = n_tokens[at] - (end - start)
                tokens[at, start:n] = tokens[at, end : n_tokens[at]]
                n_tokens[at] = n
        drafts = propose(self, k, sampled, n_tokens, tokens, *args, **kwargs)
        for at, start, end in filled:  # room is counted with what was taken out
            drafts[at] = drafts[at][: max(self.max_model_len - int(n_tokens[at]) - (end - start), 0)]
        return drafts

    _prepare_inputs.tells_members = True  # type: ignore[attr-defined]
    GPUModelRunner._prepare_inputs, GPUModelRunner._model_forward = _prepare_inputs, _model_forward
    NgramProposer.propose = _propose


# -- the V2 runner --------------------------------------------------------------------------------------------
@functools.cache
def state_class() -> Any:
    """The ``ModelState`` class that the V2 runner informs about requests and batches."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class RecipeState(DefaultModelState):  # type: ignore[misc]
        """Keeps what each request asks for in its slot, and tells the composite about the next batch."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.slots: dict[int, tuple[str, Request, int]] = {}  # the request's id, and the length of its prompt

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            asked = self.model.recipe.asked_by(new_req_data.sampling_params)
            self.slots[req_index] = (new_req_data.req_id, asked, len(new_req_data.prompt_token_ids))

        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            rows, n_tokens = [], np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])
            for at, name in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
                known, asked, n_prompt = self.slots.get(int(input_batch.idx_mapping_np[at]), (None, None, 0))
                if known == name and asked is not None:
                    n_read = int(input_batch.num_computed_tokens_np[at])
                    rows.append(Row(asked, n_read, int(n_tokens[at]), n_prompt, None))
            # A batch without real requests is a trial.
            self.model.set_rows(rows if len(rows) == input_batch.num_reqs else None)
            return super().prepare_attn(input_batch, *args, **kwargs)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
            self.model.set_rows(None)
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    return RecipeState


# -- tensor parallelism ---------------------------------------------------------------------------------------
def shards_of(model: Any) -> tuple[Any, int] | None:
    """The ``LogitsProcessor`` that gathers a model's logits, and the number of ids per rank; None for an unusual
    head."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    head = getattr(model, "lm_head", None)
    if len(processors) != 1 or not isinstance(head, VocabParallelEmbedding):
        return None
    processor, width = processors[0], head.num_embeddings_per_partition
    if head.num_embeddings != head.org_vocab_size or width > processor.org_vocab_size:
        return None  # it would be cut as if it were whole
    return processor, width
