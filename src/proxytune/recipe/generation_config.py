"""Generation configs: the settings in a model's ``generation_config.json``, and which of them recipes support.

Published models have all kinds of settings there. Settings that were tested with recipes are used. Of the others, those
in a file are left out with a note, and those in a call of ``generate`` are refused.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

from proxytune.errors import MemberError, ProxyTuneError, first_line
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, find_in, member_source
from proxytune.recipe.parts import Member

__all__ = [
    "adapted",
    "asks",
    "base_generation_config",
    "fields_of",
    "plain_generation_config",
    "read_generation_config",
    "refuse_fields",
    "valid_generation_config",
]

logger: Any = logging.getLogger(__name__)  # transformers adds warning_once

FILE = "generation_config.json"
# Every field that generate() reads, but for the ones that say where the file comes from.
FIELDS = tuple(name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version")
DEFAULTS = GenerationConfig._get_default_generation_params()
CACHES = (None, "dynamic", "static", "hybrid")  # hybrid: published by Gemma, and read by transformers as dynamic

TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# The score of a token depends on the text alone: the same for a row whatever it shares a batch with.
SCORES = {"bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"} | {
    *("exponential_decay_length_penalty", "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits"),
    *("repetition_penalty", "sequence_bias", "suppress_tokens"),
}
SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
BEAMS = {"num_beams", "num_return_sequences", "early_stopping", "length_penalty"}
LENGTHS = {"max_length", "max_new_tokens", "min_length", "min_new_tokens"}
# Without effect on a decoder that nobody compiles or assists.
IDLE = {"decoder_start_token_id", "disable_compile", "is_assistant", "num_assistant_tokens"} | {
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind")
}
OUTPUTS = {"output_logits", "output_scores", "return_dict_in_generate"}
# What a file may ask of a recipe's generate().
OF_A_FILE = TOKENS.union(SCORES, SAMPLING, BEAMS, LENGTHS, IDLE, OUTPUTS) | {
    *("cache_implementation", "forced_bos_token_id", "forced_eos_token_id", "max_time", "stop_strings", "use_cache"),
    "watermarking_config",
}
# What besides these a call may ask: it knows its batch and its prompts.
OF_A_CALL = OF_A_FILE | {
    *("guidance_scale", "max_matching_ngram_size", "prefill_chunk_size", "prompt_lookup_num_tokens"),
    *("output_attentions", "output_hidden_states"),  # forward says why not
}
# What the commands keep. They choose the token, the length and the cache themselves, and need no note to say so.
OF_A_COMMAND = TOKENS | SCORES | {"min_new_tokens", "stop_strings"}
OWN_CHOICE = SAMPLING | BEAMS | IDLE | OUTPUTS | {"cache_implementation", "max_length", "max_new_tokens", "use_cache"}
OURS = ("alpha", "combine", "gate", "member_attention_mask", "member_input_ids", "speculate")


# -- reading --------------------------------------------------------------------------------------------------
def read_generation_config(
    config: ProxyTuneConfig, name: str, member: Member, loading: Loading
) -> GenerationConfig | None:
    """A member's own generation config, or None if its directory has none.

    Raises:
        MemberError: if there is one that cannot be read. OSError: if the hub cannot be reached.
    """
    source, _ = member_source(config, name, member)
    if (path := find_in(source, FILE, loading)) is None:
        name_there, cache_dir = str(PurePosixPath(source.subfolder) / FILE), loading.hub.get("cache_dir")
        if source.is_local or (
            try_to_load_from_cache(source.path, name_there, cache_dir, source.revision) is _CACHED_NO_EXIST
        ):
            return None
        raise OSError("it is not on this machine, and the hub does not answer")
    where = f"{FILE} of {name} ({Path(path).parent if source.is_local else source.path})"
    try:
        values = json.loads(Path(path).read_text("utf-8"))
        read = GenerationConfig.from_dict(values)
        if _bad_ends := [end for end in ends_of(read) if not isinstance(end, int) or isinstance(end, bool)]:
            raise TypeError(f"eos_token_id cannot hold {_bad_ends[0]!r}")
    except Exception as error:  # not JSON, not an object, a value that transformers refuses
        raise MemberError(f"{where} cannot be read: {first_line(error)}; correct or remove the file") from error
    if ours := [key for key in values if key in OURS or key.startswith("alpha.")]:
        raise MemberError(f"{where} has {ours[0]!r}, which has no effect there; alpha belongs to the recipe's experts")
    return read


def base_generation_config(config: ProxyTuneConfig, loading: Loading, *, base: bool = True) -> GenerationConfig | None:
    """What a recipe generates with by default: its own file, or else its ``base``'s where that has a place."""
    places = [("the recipe", Member("."))] if config.name_or_path else []
    for name, member in [*places, *([("base", config.base_member)] if base else [])]:
        try:
            found = read_generation_config(config, name, member, loading)
        except OSError as error:
            logger.warning("%s of %s cannot be reached (%s); going on without it", FILE, name, first_line(error))
            continue
        if found is not None:
            return found
    return None


def ends_of(generation: GenerationConfig | None) -> list[int]:
    """The end-of-sequence ids."""
    ends = None if generation is None else generation.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


# -- what can be done -----------------------------------------------------------------------------------------
def adapted(generation: GenerationConfig, width: int, where: str) -> tuple[GenerationConfig, list[str]]:
    """A copy without what a recipe's ``generate`` cannot do, and notes on what was left out.

    ``width`` is the base's vocabulary; errors and notes call the config ``where``.

    Raises:
        MemberError: for a value with which transformers cannot generate.
    """
    generation = copy.deepcopy(generation)
    left_out = [name for name in FIELDS if name not in OF_A_FILE and asks(name, getattr(generation, name))]
    if generation.cache_implementation not in CACHES:
        left_out.append("cache_implementation")
    said = ", ".join(f"{name}={getattr(generation, name)!r}" for name in left_out)
    for name in left_out:
        setattr(generation, name, None)
    if generation.cache_implementation == "hybrid":
        generation.cache_implementation = None
    _try_out(generation, width, where)
    return generation, [f"{where} asks for {said}, which recipes do not support; it is left out"] if said else []


def refuse_fields(asked: Mapping[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    """Raise :class:`ProxyTuneError` if a call asks for what several members cannot do together.

    What the call itself leaves open is looked up in ``configs``, in order. The result is what is asked for of
    ``cache_implementation``, ``guidance_scale`` and ``stop_strings``.
    """
    fields = {}
    told = ("cache_implementation", "guidance_scale", "stop_strings")
    for name in (each for each in FIELDS if each not in OF_A_CALL or each in told):
        values = (getattr(each, name, None) for each in configs if each is not None)
        value = asked[name] if name in asked else next((value for value in values if value is not None), None)
        if not asks(name, value):
            continue
        if name == "cache_implementation" and value not in CACHES:
            raise ProxyTuneError(f"{name}={value!r} is not available for several members; use 'dynamic' or 'static'")
        if name not in OF_A_CALL:
            raise ProxyTuneError(f"{name}={value!r} is not available for several members; leave it out")
        fields[name] = value
    return fields


def plain_generation_config(model: Any, max_new_tokens: int) -> GenerationConfig:
    """The model's generation config with the choice of tokens, the length and the cache left to the caller.

    Every field is set: ``generate`` fills what is None with the model's own, so pass it by :func:`fields_of`.
    """
    own = model.generation_config
    if left_out := [n for n in FIELDS if n not in OF_A_COMMAND | OWN_CHOICE and asks(n, getattr(own, n, None))]:
        said = ", ".join(f"{name}={getattr(own, name)!r}" for name in left_out)
        logger.warning_once(f"the generation config asks for {said}, which the commands do not support; it is left out")
    config = GenerationConfig(**DEFAULTS)
    for name in OF_A_COMMAND:
        if (value := getattr(own, name, None)) is not None:
            setattr(config, name, copy.deepcopy(value))
    config.max_new_tokens, config.max_length = max_new_tokens, None
    if config.pad_token_id is None and (ends := ends_of(config)):
        config.pad_token_id = ends[0]
    return config


def fields_of(config: GenerationConfig) -> dict[str, Any]:
    """A config as arguments of ``generate``, which then looks up nothing in the model's own."""
    return {name: getattr(config, name) for name in FIELDS}


def valid_generation_config(generation: GenerationConfig) -> GenerationConfig:
    """A generation config that transformers agrees to write.

    Older checkpoints (Llama-2 as first published) set a temperature without ``do_sample``. They decode greedily all
    the same, but transformers refuses to save such a file; without the idle flags it says what it did.
    """
    generation = copy.deepcopy(generation)
    for _ in FIELDS:
        try:
            generation.validate(strict=True)
        except ValueError as error:
            idle = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
            if not idle:
                raise
            for name in idle:
                setattr(generation, name, None)
    return generation


def asks(name: str, value: Any) -> bool:
    """Whether a field's value asks for something."""
    return bool(value) and value != DEFAULTS.get(name)


class _Blank(GenerationMixin):
    """As much of a model as transformers needs to make its processors."""

    def __init__(self, width: int) -> None:
        self.config = PreTrainedConfig.from_dict({"vocab_size": width})


def _try_out(generation: GenerationConfig, width: int, where: str) -> None:
    """Let transformers make its processors of a config, and run them once."""
    blank: Any = _Blank(width)
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    scores: Any = torch.zeros(1, width)
    tried = copy.deepcopy(generation)
    try:
        tried.update(**DEFAULTS, defaults_only=True)
        stops = tried.stop_strings or []
        if not all(isinstance(stop, str) and stop for stop in ([stops] if isinstance(stops, str) else stops)):
            raise TypeError(f"stop_strings cannot be {stops!r}")
        blank._prepare_special_tokens(tried, True, device="cpu", batch_size=1)
        processors = blank._get_logits_processor(
            tried, input_ids_seq_length=1, encoder_input_ids=ids, logits_processor=[], device="cpu"
        )
        processors(ids, scores)
    except Exception as error:  # each processor raises what it likes
        raise MemberError(f"{where} cannot be used: {first_line(error)}; correct the file") from error
