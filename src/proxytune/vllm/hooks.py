"""All changes to vLLM itself: the alphas of a batch, the check of a request, the gathering of logits.

Written for vLLM 0.32 (see ``SUPPORTED``); tests check the interfaces named here. Two methods are wrapped:
``GPUModelRunner._model_forward`` of the V1 runner, which otherwise knows nothing about requests (the V2 runner asks the
model for a class that gets each request), and ``BaseRenderer.validate_token_ids``, the only place where a prompt's ids
are checked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.renderers.base import BaseRenderer
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from proxytune.errors import ProxyTuneError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.rules import Steering
from proxytune.vllm.alpha import Request, requested

__all__ = ["AlphaCheck", "Recipe", "alpha_state_class", "serve", "serve_split", "shards_of", "wrap_v1_runner"]

logger = init_logger(__name__)


class Recipe:
    """A recipe's experts, and how they are mixed unless a request says otherwise; read once.

    Attributes:
        own: what a request asks for that says nothing. split: see :func:`proxytune.vllm.alpha.requested`.
    """

    def __init__(self, config: ProxyTuneConfig) -> None:
        self.experts = config.expert_list
        self.names = [expert.name for expert in self.experts]
        self.own = requested({}, self.experts, Steering().but(config.combine, config.gate))
        self.split = False

    def requested(self, extra_args: Mapping[str, Any] | None) -> Request:
        """What a request asks for; see :func:`proxytune.vllm.alpha.requested`."""
        return requested(extra_args, self.experts, self.own.steering, split=self.split)

    def asked_by(self, sampling_params: Any) -> Request:
        """What a request asks for that the frontend accepted.

        Nothing is raised here: an exception in a worker ends the engine for all requests.
        """
        extra_args = getattr(sampling_params, "extra_args", None)
        if not extra_args:
            return self.own
        try:
            return self.requested(extra_args)
        except ProxyTuneError as error:
            logger.error("a request reached the worker with bad values, the recipe's are used: %s", error)
            return self.own


# -- the frontend: bad requests are answered with 400 -----------------------------------------------------------
_frontend: tuple[Recipe, str, int] | None = None  # the recipe, the member with the fewest ids, and how many


def serve(config: ProxyTuneConfig, widths: Mapping[str, int]) -> None:
    """Remember the recipe that this process serves. (vLLM has one engine per process.)

    ``widths``: member -> how many ids it has.
    """
    global _frontend  # noqa: PLW0603 - vLLM gives a check nothing but the request
    _frontend = (Recipe(config), *min(widths.items(), key=lambda item: item[1]))
    _wrap_id_check()


def serve_split() -> None:
    """Remember that vocabularies are split over processes, unless the recipe itself needs them whole."""
    if _frontend is not None:
        _frontend[0].split = _frontend[0].own.steering.local


def _wrap_id_check() -> None:
    """Check the ids of prompts with every member; vLLM checks them only with the tokenizer."""
    original = BaseRenderer.validate_token_ids
    if getattr(original, "asks_members", False):
        return

    @functools.wraps(original)
    def validate_token_ids(self: Any, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        original(self, token_ids, parameter=parameter)
        if _frontend is not None and token_ids:
            _, member, width = _frontend
            if (highest := max(token_ids)) >= width:
                reason = f"the prompt has token id {highest}, but member {member!r} has only {width} tokens"
                raise VLLMValidationError(reason, parameter=parameter)

    validate_token_ids.asks_members = True  # type: ignore[attr-defined]
    BaseRenderer.validate_token_ids = validate_token_ids


class AlphaCheck(V1LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]
    """Checks a request's alphas when it arrives (entry point ``vllm.logits_processors``).

    It changes no logits: a logits processor is vLLM's way for a plugin to refuse a request. It inherits the interfaces
    of both runners, since each runner refuses classes of the other one. If no recipe is served, it accepts everything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise :class:`AlphaError` or :class:`RecipeError`, which vLLM answers with 400, as ``ValueError``."""
        if _frontend is not None:
            _frontend[0].requested(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        return logits


# -- the V1 runner --------------------------------------------------------------------------------------------
def wrap_v1_runner() -> None:
    """Give composites the alphas of each batch before it is computed."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._model_forward
    if getattr(original, "tells_alphas", False):
        return

    @functools.wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.get_model()
        if hasattr(model, "set_alphas"):
            n_requests = self.input_batch.num_reqs
            starts = self.query_start_loc.np[: n_requests + 1]
            rows = [
                model.recipe.asked_by(self.requests[request].sampling_params)
                for request in self.input_batch.req_ids[:n_requests]
            ]
            model.set_alphas(rows, np.diff(starts), self.input_batch.num_prompt_tokens[:n_requests])
        return original(self, *args, **kwargs)

    _model_forward.tells_alphas = True  # type: ignore[attr-defined]
    GPUModelRunner._model_forward = _model_forward


# -- the V2 runner --------------------------------------------------------------------------------------------
@functools.cache
def alpha_state_class() -> Any:
    """The ``ModelState`` class that the V2 runner informs about requests and batches."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class AlphaState(DefaultModelState):  # type: ignore[misc]
        """Keeps each request's alphas in its slot, and sets them for the next batch."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.slots = [self.model.recipe.own for _ in range(self.max_num_reqs)]

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.slots[req_index] = self.model.recipe.asked_by(new_req_data.sampling_params)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            n_requests = input_batch.num_reqs
            rows = [self.slots[slot] for slot in input_batch.idx_mapping_np[:n_requests]]
            n_prompt = req_states.prompt_len.np[input_batch.idx_mapping_np[:n_requests]]
            self.model.set_alphas(rows, np.diff(input_batch.query_start_loc_np[: n_requests + 1]), n_prompt)
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            return inputs

    return AlphaState


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
