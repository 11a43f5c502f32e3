"""The recipe's members as vLLM configs, and the checks before an engine starts.

Each part gets a ``ModelConfig`` of its own, which vLLM makes from the member's directory. So it has its own context,
quantization and sliding window, and nothing from the base.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from proxytune.errors import MemberError, ProxyTuneError, reason_of
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, load_tokenizer
from proxytune.recipe.vocabulary import compare
from proxytune.vllm import frontend
from proxytune.vllm.alpha import Recipe
from proxytune.vllm.plan import Part, parts_of, reads_own_prompts, refuse
from proxytune.vllm.weights import read_adapter

__all__ = ["Fitted", "RecipeArchitecture", "RecipeRules", "fit", "part_config"]

logger = init_logger(__name__)

SPECULATORS = ("ngram", "ngram_gpu", "suffix", "draft_model")  # other methods read the hidden states of one model


@dataclass(frozen=True)
class Fitted:
    """A part and its vLLM config."""

    part: Part
    config: Any


def fit(model_config: Any) -> list[Fitted]:
    """Every part of a recipe with a ``ModelConfig`` of its own.

    Raises:
        MemberError: naming the member that vLLM cannot take, and why.
    """
    fitted = []
    for part in parts_of(model_config.hf_config):
        with naming(part):
            config = ModelConfig(
                model=part.source.path,
                revision=part.source.revision,
                skip_tokenizer_init=True,
                dtype=model_config.dtype,
                seed=model_config.seed,
                enforce_eager=model_config.enforce_eager,
                hf_token=model_config.hf_token,
                model_impl=model_config.model_impl,
                disable_sliding_window=model_config.disable_sliding_window,
                generation_config="vllm",
            )
        fitted.append(Fitted(part, config))
    return fitted


@contextmanager
def naming(part: Part) -> Iterator[None]:
    """Turn vLLM's errors about a member into one sentence that names it."""
    try:
        yield
    except ProxyTuneError:
        raise
    except Exception as error:  # pydantic's ValidationError, OSError, RuntimeError of remote code
        who = f"{part.owner} ({part.member.model})"
        raise MemberError(f"{who} cannot be served by vLLM: {reason_of(error)}") from error


def part_config(vllm_config: Any, fitted: Fitted) -> Any:
    """The ``VllmConfig`` that a part is built under.

    vLLM reads much about a model from the parent's configs: the sliding window from the cache config, the quantization
    from the quant config, and the key of the compile cache from ``additional_config``. (What is compiled differs where
    members read prompts of their own: attention itself writes the keys and values.)
    """
    config = fitted.config
    config.is_submodel_config = True  # the parent's checks have run already, and do not run again for this view
    config.max_model_len = vllm_config.model_config.max_model_len
    config.maybe_untie_word_embeddings()
    cache_config = copy.copy(vllm_config.cache_config)
    kinds = getattr(config.hf_text_config, "layer_types", None)  # vLLM's own rule, from its configuration of engines
    slides = kinds is None or all(kind == "sliding_attention" for kind in kinds)
    cache_config.sliding_window = config.get_sliding_window() if slides else None
    return replace(
        vllm_config,
        model_config=config,
        cache_config=cache_config,
        quant_config=VllmConfig.get_quantization_config(config, vllm_config.load_config),
        additional_config={
            **(vllm_config.additional_config or {}),
            "proxytune_part": fitted.part.name,
            "proxytune_own_prompts": reads_own_prompts(vllm_config.model_config.hf_config),
        },
    )


class RecipeArchitecture(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """A recipe's shape for vLLM: the base's, except for what must fit all members."""

    def __new__(cls, hf_config: Any, hf_text_config: Any, *args: Any, **kwargs: Any) -> Any:
        # Some families have a rule of their own for their shape, registered under the base's model type.
        family = MODEL_ARCH_CONFIG_CONVERTORS.get(getattr(hf_text_config, "model_type", None), None)
        if family is None or family is cls:
            return super().__new__(cls)
        return type("RecipeArchitecture", (cls, family), {"__new__": object.__new__})(
            hf_config, hf_text_config, *args, **kwargs
        )

    def get_vocab_size(self) -> int:
        """Ids below it are in every member; the mixture has no logits for others."""
        return min(shape.get_vocab_size() for shape in self.shapes)

    def get_head_size(self) -> int:
        """The largest: Triton's attention makes room for its intermediate results by it, for all members."""
        return max(shape.get_head_size() for shape in self.shapes)

    @functools.cached_property
    def shapes(self) -> list[Any]:
        """The members' shapes."""
        return shapes_of(self.hf_config)


def shapes_of(config: ProxyTuneConfig) -> list[Any]:
    """The parts' shapes, as vLLM reads them from their configs."""
    from vllm.transformers_utils.config import get_config

    refuse(config)  # vLLM asks for the shape before it asks for the rules
    shapes = []
    for part in parts_of(config):
        with naming(part):
            found = get_config(part.source.path, trust_remote_code=False, revision=part.source.revision)
        kind = MODEL_ARCH_CONFIG_CONVERTORS.get(found.model_type, ModelArchConfigConvertorBase)
        shapes.append(kind(found, found.get_text_config()))
    return shapes


class RecipeRules(VerifyAndUpdateConfig):  # type: ignore[misc]
    """The checks after vLLM has read a recipe, in the process that takes requests. A failure stops the start."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the members, and set the context to the shortest one among them."""
        recipe = model_config.hf_config
        refuse(recipe)
        if model_config.runner_type != "generate":
            raise ProxyTuneError(f"a recipe only generates, so --runner {model_config.runner_type} does not fit it")
        if model_config.enable_prompt_embeds:
            raise ProxyTuneError("--enable-prompt-embeds does not fit a recipe: each member has embeddings of its own")
        if model_config.quantization is not None or model_config.quantization_config is not None:
            raise ProxyTuneError(
                "--quantization does not fit a recipe: its members are quantized as their checkpoints say; leave it out"
            )
        if model_config.hf_overrides:
            raise ProxyTuneError(
                "--hf-overrides does not fit a recipe: members have configs of their own; leave it out"
            )
        fitted = fit(model_config)
        for one in fitted:
            _refuse_part(one, model_config.dtype)
        contexts = _set_context(model_config, fitted)
        frontend.serve(recipe, [one.part for one in fitted], *_check_vocabularies(recipe), contexts)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the options of the engine."""
        loading = vllm_config.load_config.load_format
        if loading not in ("auto", "hf", "safetensors", "pt", "dummy"):
            raise ProxyTuneError(f"--load-format {loading} does not load a recipe's members; leave it out")
        _check_gate(vllm_config)
        if vllm_config.parallel_config.enable_dbo:
            raise ProxyTuneError("--enable-dbo halves the batch, which a recipe's alphas do not follow; leave it out")
        if vllm_config.weight_transfer_config is not None:
            raise ProxyTuneError("--weight-transfer-config does not fit a recipe: each member has weights of its own")
        if vllm_config.offload_config.prefetch.offload_group_size:
            raise ProxyTuneError(
                "--offload-group-size does not fit a recipe, because vLLM offloads the layers of one model; leave "
                "it out"
            )
        if vllm_config.lora_config is not None:
            raise ProxyTuneError("--enable-lora does not fit a recipe; name the adapter in the recipe instead")
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method not in SPECULATORS:
            raise ProxyTuneError(
                f"speculation by {speculative.method} reads the hidden states of one model, and a recipe has several; "
                "use ngram or a draft model (the expert)"
            )
        if reads_own_prompts(vllm_config.model_config.hf_config):
            _refuse_beside_own_prompts(vllm_config)
        for one in fit(vllm_config.model_config):
            with naming(one.part):
                one.config.verify_with_parallel_config(vllm_config.parallel_config)


def _check_gate(vllm_config: Any) -> None:
    """Check that the recipe's own gate can be served. One that reads answers turns asynchronous scheduling off, which
    vLLM would choose only after this."""
    recipe, scheduler = Recipe(vllm_config.model_config.hf_config), vllm_config.scheduler_config
    if recipe.default.steering.by_text and scheduler.async_scheduling is None:
        scheduler.async_scheduling = False
    recipe.requested({}, vllm_config)


def _refuse_beside_own_prompts(vllm_config: Any) -> None:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    drafts = speculative is not None and (speculative.method != "ngram" or vllm_config.use_v2_model_runner)
    refused = {
        f"speculation by {speculative and speculative.method}": drafts,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "KV offloading": vllm_config.cache_config.kv_offloading_size is not None,
        "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,  # it picks rows of the batch
        "--cpu-offload-gb": vllm_config.offload_config.uva.cpu_offload_gb > 0,  # models on one set of weights
        "a watermark": vllm_config.watermark_config is not None,  # it reads what fills a prompt
    }
    if what := next((what for what, present in refused.items() if present), None):
        hint = "use ngram with the V1 runner, or none" if drafts else "leave it out"
        raise ProxyTuneError(f"{what} does not fit this recipe, because members read prompts of their own; {hint}")


def _refuse_part(fitted: Fitted, dtype: torch.dtype) -> None:
    part, config = fitted.part, fitted.config
    who = f"{part.owner} ({part.member.model})"
    kind = config.architecture
    if kind in MODELS_CONFIG_MAP:
        raise MemberError(f"{who} is a {kind}, which vLLM sets up by rules for the whole engine; it cannot be a member")
    if config.is_encoder_decoder:
        raise MemberError(f"{who} is an encoder-decoder; members must be decoder-only")
    if config.is_multimodal_model:
        raise MemberError(f"{who} reads more than text; name a text model")
    if config.is_hybrid or config.is_attention_free:
        raise MemberError(f"{who} keeps a state in place of a KV cache, which was not tried in a recipe")
    if config.use_mla:
        raise MemberError(f"{who} has latent attention (MLA), which was not tried in a recipe")
    wanted = part.member.dtype
    if wanted not in (None, "auto") and getattr(torch, wanted) != dtype:
        served = str(dtype).removeprefix("torch.")
        raise MemberError(
            f"{who} is to be {wanted} by the recipe, but vLLM serves all members in one dtype, {served}; use --dtype "
            f"{wanted}, or remove the dtype from the recipe"
        )
    if part.member.device_map is not None:
        logger.warning("the recipe's device_map of %s is for transformers; vLLM places weights itself", part.owner)
    if part.adapter is not None:
        if config.quantization is not None:
            raise MemberError(f"{who} is quantized, so its adapter cannot be merged; name a plain or a merged model")
        adapter = read_adapter(part.owner, part.adapter)
        if config.hf_text_config.tie_word_embeddings and adapter.touches_vocabulary(config.hf_text_config.vocab_size):
            raise MemberError(
                f"the adapter of {who} changes embeddings that are tied to the head, so it cannot be merged; serve the "
                "recipe with `proxytune serve`"
            )


def _set_context(model_config: Any, fitted: list[Fitted]) -> dict[str, int]:
    """Set the context of a request; return how many tokens each part reads.

    Members that read one prompt have the shortest context among them. With prompts of their own a long one may be that
    of a member with a long context, so each request is checked with each member.
    """
    from vllm import envs

    own = reads_own_prompts(model_config.hf_config)
    bound = (max if own else min)(fitted, key=lambda one: one.config.max_model_len)
    limit = bound.config.max_model_len
    asked = model_config.original_max_model_len
    if asked in (None, -1):
        model_config.max_model_len = limit if own else min(model_config.max_model_len, limit)
    elif asked > limit and not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        raise ProxyTuneError(
            f"--max-model-len {asked} is more than {bound.part.owner} reads ({limit}); ask for {limit} or less"
        )
    return {one.part.name: one.config.max_model_len for one in fitted}


def _check_vocabularies(recipe: ProxyTuneConfig) -> tuple[dict[str, int], dict[str, Any]]:
    """Check that all tokens are the same; return the width of each part's vocabulary, and each member's tokenizer."""
    parts, widths = parts_of(recipe), [shape.get_vocab_size() for shape in shapes_of(recipe)]
    tokenizers = {name: load_tokenizer(recipe, name, member, Loading()) for name, member in recipe.members()}
    report = compare(
        {part.owner: tokenizers[part.owner] for part in parts},
        {part.owner: width for part, width in zip(parts, widths)},
        recipe.renamed_tokens,
    )
    report.raise_for_mismatch()
    for note in report.notes:
        logger.warning(note)
    return {part.name: width for part, width in zip(parts, widths)}, tokenizers
