"""From a recipe, or from members in memory, to the lanes and tokenizers of a composite."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from proxytune.errors import MemberError, RecipeError, unknown_arguments
from proxytune.lanes.completions import Budget, Endpoint
from proxytune.lanes.loading import load_lanes
from proxytune.lanes.probing import probe
from proxytune.lanes.remote import RemoteLane
from proxytune.lanes.spelling import Spelling
from proxytune.lanes.transformers import TransformersLane
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, load_config, load_tokenizer, refuse_of_api, refuse_unfit
from proxytune.recipe.parts import ApiBase, Expert, Member, Prompt, parse_base
from proxytune.recipe.store import HUB_ARGUMENTS, PLACE
from proxytune.recipe.vocabulary import compare

__all__ = ["ask_server", "config_of_members", "load_parts", "loading_of_call"]

logger = logging.getLogger(__name__)


def config_of_members(
    base: Any, experts: Sequence[Expert | Mapping[str, Any]], own: Mapping[str, Any]
) -> tuple[ProxyTuneConfig, dict[str, Any]]:
    """Make a recipe of members that are in memory, on disk or on the hub; return it, and the members in memory by name.

    ``base`` and ``experts`` are arguments of ``from_members``; ``own`` are fields of the recipe itself.
    """
    given: dict[str, Any] = {}
    listed = []
    for index, value in enumerate(experts):
        parts = dict(value) if isinstance(value, Mapping) else vars(value).copy()
        parts.setdefault("name", "expert" if index == 0 else f"expert{index + 1}")
        for side in ("expert", "anti_expert"):
            prompt = parts.pop(f"{side}_prompt", None)
            parts[side] = _placeholder(parts.get(side), f"{parts['name']}.{side}", given, prompt)
        listed.append(Expert.parse(parts, index))
    return ProxyTuneConfig(base=_placeholder(base, "base", given, None), experts=listed, **own), given


def load_parts(
    config: ProxyTuneConfig, loading: Loading, given: Mapping[str, Any], tokenizers: dict[str, Any]
) -> list[TransformersLane]:
    """Load all members except those ``given`` in memory, after checking that their vocabularies are the same.

    If ``config`` has no config of its base, it gets one. ``tokenizers``, by member name, gets those that the caller did
    not give.

    Raises:
        MemberError, VocabularyError: naming what does not fit.
    """
    base = config.base_member
    refuse_of_api(base, loading)
    widths, seen = {}, {}
    for name, member in config.members():
        if isinstance(member, ApiBase):
            tokenizers[name] = tokenizers.get(name) or load_tokenizer(config, name, member, loading)
            continue
        if name in given:
            widths[name] = given[name].config.get_text_config(decoder=True).vocab_size
            tokenizers.setdefault(name, None)
            continue
        member_config = load_config(config, name, member, loading)
        refuse_unfit(name, member, member_config)
        widths[name] = member_config.get_text_config(decoder=True).vocab_size
        if tokenizers.get(name) is None:  # members of one directory share one tokenizer
            place = (member.model, member.revision, member.gguf_file)
            if place not in seen:
                seen[place] = load_tokenizer(config, name, member, loading)
            tokenizers[name] = seen[place]
    if isinstance(base, ApiBase):
        # How many ids its head scores is not known here; only those that the members here can read are mixed.
        widths = {"base": max(len(tokenizers["base"]), min(widths.values(), default=0)), **widths}
    vocabulary = compare({"base": tokenizers["base"], **tokenizers}, widths, config.renamed_tokens)
    vocabulary.raise_for_mismatch()
    for note in vocabulary.notes:
        logger.warning(note)
    lanes = load_lanes(config, loading, given)
    if isinstance(base, ApiBase):
        config.vocab_size = widths["base"]
        endpoint = ask_server(config, loading, tokenizers["base"], widths["base"], bias=loading.way == "push")
        elsewhere: Any = RemoteLane(
            base, endpoint, widths["base"], loading.way or "auto", sample_named=bool(loading.sample_named)
        )
        return [elsewhere, *lanes]
    if config.text_config is None:
        its = next(lane for lane in lanes if any("base" in seat.names for seat in lane.seats))
        config.text_config = copy.deepcopy(its.model.config)
        config.text_config.name_or_path = ""  # the recipe must not contain paths of this machine
        config.vocab_size = widths["base"]
    return lanes


def ask_server(
    config: ProxyTuneConfig,
    loading: Loading,
    tokenizer: Any = None,
    n_vocab: int | None = None,
    *,
    bias: bool = True,
) -> Endpoint:
    """The server of a base behind an API, after finding out what it can do.

    Args:
        tokenizer: the declared tokenizer, if it is loaded. n_vocab: the base's; by default that tokenizer's.
        bias: also find out how many tokens a request can push.
    """
    base = config.base_member
    assert isinstance(base, ApiBase)
    tokenizer = tokenizer or load_tokenizer(config, "base", base, loading)
    budget = Budget(loading.max_calls, loading.max_tokens)
    endpoint = Endpoint(base, Spelling(tokenizer, n_vocab or len(tokenizer)), tokenizer, budget)
    probe(endpoint, bias=bias)
    return endpoint


def _placeholder(value: Any, name: str, given: dict[str, Any], prompt: Any) -> Member | None:
    """A member of the recipe; a model in memory is added to ``given``."""
    if value is None:
        if prompt is not None:
            raise RecipeError(f"a prompt is given for {name}, but no model; name one")
        return None
    if isinstance(value, (Member, str, Path, Mapping)):
        parse = parse_base if name == "base" else Member.parse
        member = parse(str(value) if isinstance(value, Path) else value)
        if prompt is None:
            return member
        if member.prompt not in (Prompt(), Prompt.parse(prompt)):
            raise RecipeError(f"{name} has two prompts: its member's and the one beside it; give one")
        return replace(member, prompt=Prompt.parse(prompt))
    if not isinstance(value, nn.Module) or not hasattr(value, "config"):
        raise MemberError(f"{name} must be a transformers model, a path or a hub id, not {type(value).__name__}")
    given[name] = value
    return Member(model=None, prompt=Prompt.parse(prompt))


def loading_of_call(called: Callable[..., Any], config: ProxyTuneConfig, kwargs: dict[str, Any]) -> Loading:
    """Sort the arguments of ``called``, from_pretrained or from_members. An option that nothing reads is an error."""
    not_ours = ("_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "adapter_kwargs", "code_revision")
    kwargs = {key: value for key, value in kwargs.items() if value is not None and key not in (*not_ours, *PLACE)}
    if kwargs.get("dtype") is None and "torch_dtype" in kwargs:  # beside another dtype it is refused below
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    kwargs["trust_remote_code"] = bool(kwargs.pop("member_trust_remote_code", False))  # the other is the recipe's
    kwargs.setdefault("attn_implementation", config._attn_implementation)  # AutoConfig puts it there
    ours = {field.name for field in fields(Loading)} - {"hub"}
    asked = {name: kwargs.pop(name) for name in ours & kwargs.keys()}
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    if kwargs:
        known = {"speculate", "compile", "member_trust_remote_code", *ours, *HUB_ARGUMENTS}
        raise unknown_arguments(called, kwargs, known)
    return Loading(**asked, hub=hub)
