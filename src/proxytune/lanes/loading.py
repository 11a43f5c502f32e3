"""From a recipe's members to lanes in memory: each set of weights is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from proxytune.errors import MemberError
from proxytune.lanes.rows import same_weights
from proxytune.lanes.transformers import CannotShare, TransformersLane
from proxytune.recipe.adapters import (
    active_adapter,
    can_be_merged,
    changed_weights,
    checksums,
    judge,
    load_adapter,
    unlike_as_loaded,
)
from proxytune.recipe.checkpoints import Fit, fit_of, fit_of_gguf, read_header
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.layout import group_by_weights, seats_of
from proxytune.recipe.members import Loading, adapter_directory, adapter_source, loading_of, opened, refuse_unfit
from proxytune.recipe.parts import ApiBase, Member

__all__ = ["forget_gguf", "load_lanes", "load_member", "load_model"]

logger = logging.getLogger(__name__)


def load_lanes(config: ProxyTuneConfig, loading: Loading, given: Mapping[str, Any]) -> list[TransformersLane]:
    """Load every member of the recipe that has weights here, each set of weights once.

    ``given``: member name -> a model in memory (a PeftModel too); its weights are used, its modules stay as they are.

    Raises:
        MemberError: names the member that cannot be loaded, and why.
    """
    in_memory: dict[int, list[tuple[str, Member]]] = {}
    for name, member in config.members():
        if name in given:
            in_memory.setdefault(id(_bare(given[name])), []).append((name, member))
    named = [
        (name, member) for name, member in config.members() if name not in given and not isinstance(member, ApiBase)
    ]
    groups, reasons = group_by_weights(config, named, loading)
    for name, reason in reasons.items():
        _warn_apart(name, reason)
    lanes = [_given_lane(group, given) for group in in_memory.values()]
    for group in groups:
        lanes += _loaded_lanes(config, group, loading)
    if loading.pack:
        for lane in lanes:
            lane.pack()
    return lanes


def load_member(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> TransformersLane:
    """Load one member by itself, with its adapter merged if possible."""
    lane = _loaded_lane(config, [(name, member)], loading)
    if loading.pack:
        lane.pack()
    return lane


def _bare(model: Any) -> Any:
    """The transformers model under a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _given_lane(group: list[tuple[str, Member]], given: Mapping[str, Any]) -> TransformersLane:
    """A lane over the weights of models in memory, with a module tree of its own. The caller's models do not change."""
    adapters = {name: active_adapter(name, given[name]) for name, _ in group}
    wrappers = {id(given[name]): given[name] for name, adapter in adapters.items() if adapter is not None}
    for name, adapter in adapters.items():
        if adapter is not None and len(set(adapters.values())) > 1:
            reason = judge(given[name].peft_config[adapter]).apart
            if len(wrappers) > 1:
                reason = "two PeftModels wrap that model"
            if reason or (reason := unlike_as_loaded(given[name])):
                raise CannotShare(name, reason)
    model = same_weights(next(iter(wrappers.values()), given[group[0][0]]))
    return TransformersLane(_bare(model), seats_of(group, adapters), adapted=model if wrappers else None)


def _loaded_lanes(config: ProxyTuneConfig, group: list[tuple[str, Member]], loading: Loading) -> list[TransformersLane]:
    """One lane; if an adapter cannot share it, one lane per adapter."""
    try:
        return [_loaded_lane(config, group, loading)]
    except CannotShare as error:
        _warn_apart(error.owner, error.reason)
    parts, _ = group_by_weights(config, group, replace(loading, share=False))
    return [_loaded_lane(config, part, loading) for part in parts]


def _warn_apart(name: str, reason: str) -> None:
    logger.warning("the adapter of %s is loaded with weights of its own, because %s", name, reason)


def _loaded_lane(config: ProxyTuneConfig, group: list[tuple[str, Member]], loading: Loading) -> TransformersLane:
    name, member = group[0]
    model = load_model(config, name, member, loading)
    active_adapter(name, model)
    places = {n: adapter_source(config, m) for n, m in group}  # by place: one adapter may have several revisions
    sources = sorted({source for source in places.values() if source is not None}, key=str)
    names = {source: f"adapter{index}" for index, source in enumerate(sources)}
    adapters = {n: names[source] if source is not None else None for n, source in places.items()}
    shared = len(set(places.values())) > 1
    adapted: Any = None
    before = checksums(model.state_dict()) if shared else {}
    for source, adapter in names.items():
        owner, at = next((n, m) for n, m in group if places[n] == source)
        with loading_of(owner, at.adapter):
            adapted = load_adapter(adapted or model, owner, adapter, adapter_directory(owner, source, loading))
        if shared and (touched := changed_weights(adapted, before)):
            raise CannotShare(owner, f"it changes the model's own weights ({touched})")
    if adapted is not None:
        if not shared and can_be_merged(adapted):
            model = adapted.merge_and_unload()  # the only user of its weights: merged, it costs nothing
            adapted, adapters = None, dict.fromkeys(adapters)
        else:
            model = adapted.get_base_model()
    model.requires_grad_(False)
    return TransformersLane(model, seats_of(group, adapters), source=member, adapted=adapted)


def load_model(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> PreTrainedModel:
    """Load one member's weights (without its adapter)."""
    kwargs: dict[str, Any] = {
        "dtype": member.dtype or loading.dtype,
        "device_map": member.device_map if member.device_map is not None else loading.device_map,
        "quantization_config": member.quantization_config or loading.quantization_config,
        "attn_implementation": loading.attn_implementation,
        "tqdm_class": loading.tqdm_class,
    }
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if isinstance(kwargs.get("quantization_config"), dict):
        from transformers.quantizers.auto import AutoQuantizationConfig

        kwargs["quantization_config"] = AutoQuantizationConfig.from_dict(dict(kwargs["quantization_config"]))
    with opened(config, name, member, loading) as (path, place):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            trust_remote_code=loading.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **place,
            **kwargs,
        )
        model, info = loaded
        refuse_unfit(name, member, model.config)
        if "gguf_file" in place:
            fits = [fit_of(model, info), fit_of_gguf(model, path, place) or Fit()]
            forget_gguf(model)
        else:
            fits = [fit_of(model, info, read_header(path, place) if info["unexpected_keys"] else None)]
    for fit in fits:
        if fit.problem is not None:
            raise MemberError(f"{name} ({member.model}) {fit.problem}")
        if fit.note is not None:
            logger.warning("%s (%s) %s", name, member.model, fit.note)
    return model  # type: ignore[no-any-return]


def forget_gguf(model: Any) -> None:
    """Remove the mark that a model was quantized. transformers dequantizes GGUF, but refuses to save models with this
    mark."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
