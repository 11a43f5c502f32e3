"""What ``proxytune check`` computes: will a recipe work, and what memory does it need?

Only configs, tokenizers and the headers of weight files are read. Models are built without storage (the meta device):
their tensors' names and shapes are held against the headers, their caches are tried, and parameters and the bytes that
one token adds to a cache are counted on them, which makes all of it right for any architecture. What cannot be told so
is listed as not checked; :mod:`proxytune.answers.selftest` loads the recipe and tries it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from proxytune.errors import MemberError, ProxyTuneError, first_line
from proxytune.recipe.adapters import try_adapter
from proxytune.recipe.checkpoints import Fit, fit_of_gguf, fit_of_header, parts_of_gguf, read_header
from proxytune.recipe.config import Member, ProxyTuneConfig
from proxytune.recipe.families import idle_embeddings, keeps_states, obstacle_of
from proxytune.recipe.generation_config import adapted, base_generation_config
from proxytune.recipe.layout import group_by_weights
from proxytune.recipe.members import (
    Loading,
    adapter_directory,
    adapter_source,
    load_config,
    load_tokenizer,
    loading_of,
    member_source,
    opened,
    refuse_unfit,
)
from proxytune.recipe.prompts import render
from proxytune.recipe.vocabulary import compare

__all__ = ["MemberReport", "Report", "check_recipe", "count_recipe"]

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


@dataclass(frozen=True)
class MemberReport:
    """One member, counted.

    Attributes:
        parameters: of its weights and its adapter.
        weight_bytes: in memory, of what it does not share with a member above it.
        read_bytes: of its weights that a forward reads, shared or not: all but input embeddings that are no head.
        head_bytes: of its output head.
        adapter_bytes: of an adapter that is kept apart, because other members use the weights without it.
        layers: decoder layers.
        kv_bytes_per_token: of cache, where it is not computed together with a member above it; None if unknown.
        sliding_window: tokens after which (some of) its layers' cache stops growing.
        shares_with: the member above it that has the same weights.
    """

    name: str
    model: str | None
    adapter: str | None
    prompt: str
    architecture: str
    dtype: str
    parameters: int
    weight_bytes: int
    read_bytes: int
    head_bytes: int
    adapter_bytes: int
    layers: int
    kv_bytes_per_token: int | None
    context: int | None
    sliding_window: int | None
    vocab_size: int
    shares_with: str | None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        works: whether the recipe can be loaded and used; None where nothing is wrong that could be checked.
        problems: why not, one sentence each.
        notes: what is worth knowing all the same.
        unchecked: what could not be checked, one clause each.
        context: the shortest member's, in tokens.
        shared_vocab: ids below it are mixed.
    """

    works: bool | None
    problems: list[str]
    notes: list[str]
    unchecked: list[str]
    members: list[MemberReport]
    alpha: dict[str, float]
    plausibility: float | None
    weight_bytes: int
    kv_bytes_per_token: int | None
    context: int | None
    shared_vocab: int | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass
class _Found:
    """What is known of a member while the report is made."""

    member: Member
    config: PreTrainedConfig
    tokenizer: Any = None
    text: PreTrainedConfig = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.config.get_text_config(decoder=True)


def check_recipe(config: ProxyTuneConfig, loading: Loading | None = None) -> Report:
    """Check a recipe without loading a weight."""
    loading = loading or Loading()
    problems: list[str] = []
    notes: list[str] = []
    unchecked: list[str] = []
    found: dict[str, _Found] = {}
    for name, member in config.members():
        try:
            found[name] = _Found(member, _member_config(config, name, member, loading))
            found[name].tokenizer = load_tokenizer(config, name, member, loading)
        except ProxyTuneError as error:
            problems.append(str(error))
    complete = len(found) == sum(1 for _ in config.members())
    shared = _check_vocabulary(config, found, problems, notes, unchecked) if complete else None
    _check_prompts(found, problems)
    _check_generation(config, found, loading, problems, notes)
    _check_parts(config, found, notes)
    _check_outputs(found, notes)
    members = _count(config, found, loading, problems, notes, unchecked)
    contexts = [report.context for report in members if report.context is not None]
    grown = [report.kv_bytes_per_token for report in members]
    return Report(
        works=False if problems else None if unchecked else True,
        problems=problems,
        notes=notes,
        unchecked=unchecked,
        members=members,
        alpha=dict(zip((expert.name for expert in config.expert_list), config.alphas)),
        plausibility=config.plausibility,
        weight_bytes=sum(report.weight_bytes for report in members),
        kv_bytes_per_token=None if None in grown else sum(size or 0 for size in grown),
        context=min(contexts, default=None),
        shared_vocab=shared,
    )


def count_recipe(config: ProxyTuneConfig, loading: Loading | None = None) -> tuple[list[MemberReport], list[str]]:
    """Count a recipe's members from their configs alone, without tokenizers and whether or not there are weights.

    Returns:
        The members, and what is worth knowing of the figures.

    Raises:
        MemberError: for the first member that cannot be counted.
    """
    loading = loading or Loading()
    problems: list[str] = []
    notes: list[str] = []
    found = {}
    for name, member in config.members():
        own = load_config(config, name, member, loading)
        refuse_unfit(name, member, own)
        found[name] = _Found(member, own)
    members = _count(config, found, loading, problems, notes, None)
    if problems:
        raise MemberError(problems[0])
    return members, notes


def _member_config(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> PreTrainedConfig:
    found = load_config(config, name, member, loading)
    refuse_unfit(name, member, found)
    source, _ = member_source(config, name, member)
    if source.is_local and not any(
        any((Path(source.path) / source.subfolder).glob(pattern)) for pattern in WEIGHT_FILES
    ):
        raise MemberError(f"{name} ({member.model}) has no weights in its directory")
    return found


# -- will it work? --------------------------------------------------------------------------------------------
def _check_vocabulary(
    config: ProxyTuneConfig,
    found: Mapping[str, _Found],
    problems: list[str],
    notes: list[str],
    unchecked: list[str],
) -> int:
    report = compare(
        {name: one.tokenizer for name, one in found.items()},
        {name: one.text.vocab_size for name, one in found.items()},
        config.renamed_tokens,
    )
    try:
        report.raise_for_mismatch()
    except ProxyTuneError as error:
        problems.append(str(error))
    for name, extra in report.extra.items():
        notes.append(f"{name} has {extra} ids that another member lacks (from {report.shared} on); never chosen")
    for index, name, ours, theirs in report.renamed:
        notes.append(f"id {index} is {ours!r} in the base and {theirs!r} in {name}; the recipe accepts that")
    for name in report.unchecked:
        unchecked.append(f"whether the tokens of {name} are the base's, since it has no tokenizer")
    return report.shared


def _check_parts(config: ProxyTuneConfig, found: Mapping[str, _Found], notes: list[str]) -> None:
    for name, one in found.items():
        _, file = member_source(config, name, one.member)
        if file is not None and (n_parts := parts_of_gguf(file)) > 1:
            notes.append(
                f"{name} is split into {n_parts} shards, which are put together in a temporary file at each loading; "
                f"`llama-gguf-split --merge {file} WHOLE.gguf` does it once"
            )


def _check_prompts(found: Mapping[str, _Found], problems: list[str]) -> None:
    base = found["base"].tokenizer if "base" in found else None
    for name, one in found.items():
        if one.member.prompt.kind == "raw":
            continue
        try:
            render(one.member.prompt, one.tokenizer or base, "Hello", f"member {name!r}")
        except ProxyTuneError as error:
            problems.append(f"the prompt of {name} cannot be made: {error}")


def _check_generation(
    config: ProxyTuneConfig, found: Mapping[str, _Found], loading: Loading, problems: list[str], notes: list[str]
) -> None:
    """What the recipe generates with by default: its own generation config, or the base's."""
    if "base" not in found:
        return
    try:
        generation = base_generation_config(config, loading)
        if generation is not None:
            notes += adapted(generation, found["base"].text.vocab_size, "the generation config")[1]
    except ProxyTuneError as error:
        problems.append(str(error))


def _check_outputs(found: Mapping[str, _Found], notes: list[str]) -> None:
    caps = {name: getattr(one.text, "final_logit_softcapping", None) for name, one in found.items()}
    if len(set(caps.values())) > 1:
        capped = ", ".join(name for name, cap in caps.items() if cap)
        notes.append(f"only some members cap their logits ({capped}), so their differences are of unlike scale")


def _check_weights(
    config: ProxyTuneConfig,
    name: str,
    one: _Found,
    model: PreTrainedModel,
    loading: Loading,
    notes: list[str],
    unchecked: list[str],
) -> None:
    """Hold a member's cache and files against the empty ``model`` that its config describes.

    Raises:
        MemberError: for what is wrong with them.
    """
    of = f"{name} ({one.member.model})"
    if (obstacle := obstacle_of(model)) is not None:
        raise MemberError(f"{of} cannot be used in a recipe: {obstacle}; name another model")
    if keeps_states(one.text):
        unchecked.append(f"whether {of} decodes with its states what it reads without them: loading tries it")
    fit: Fit | None = None
    why = "its files are on the hub, and their headers cannot be read there"
    with opened(config, name, one.member, loading, with_data=False) as (path, place):
        if "gguf_file" in place:
            fit = fit_of_gguf(model, path, place) if _is_at_hand(path) else None
            why = "transformers takes its tensors apart while it loads them" if _is_at_hand(path) else why
        elif getattr(one.config, "quantization_config", None):
            why = "its files are quantized"
        elif (header := read_header(path, place)) is not None:
            fit = fit_of_header(model, header)
    if fit is None:
        unchecked.append(f"the tensors of {of}, because {why}")
    elif fit.problem is not None:
        raise MemberError(f"{of} {fit.problem}")
    elif fit.note is not None:
        notes.append(f"{of} {fit.note}")


def _is_at_hand(path: str) -> bool:
    return Path(path).is_dir()


# -- what does it need? ---------------------------------------------------------------------------------------
def _count(
    config: ProxyTuneConfig,
    found: Mapping[str, _Found],
    loading: Loading,
    problems: list[str],
    notes: list[str],
    unchecked: list[str] | None,
) -> list[MemberReport]:
    """Count the members, and, where ``unchecked`` is a list, hold their files and caches against their configs."""
    reports: list[MemberReport] = []
    own_weights = _weights(config, found, loading, notes)
    weights_of: dict[Any, str] = {}  # a set of weights -> the first member that has it
    seats: set[Any] = set()
    for name, one in found.items():
        member, key = one.member, own_weights[name]
        try:
            model = _empty(one.config, loading)
        except Exception as error:  # an architecture that transformers lacks, remote code
            problems.append(f"{name} ({member.model}) cannot be built: {first_line(error)}")
            continue
        if unchecked is not None and key not in weights_of:
            try:
                _check_weights(config, name, one, model, loading, notes, unchecked)
            except ProxyTuneError as error:
                problems.append(str(error))
        dtype = _dtype(config, name, one, loading)
        n_weights, n_bytes = _weigh(model, one, loading, dtype, name, notes)
        n_head, tied = _head(model)
        idle = idle_embeddings(model)
        copied = n_head * dtype.itemsize if loading.pack and tied else 0  # a packed head is none of the embeddings
        n_adapter, kept, place = 0, False, None
        if member.adapter is not None:
            try:
                place = adapter_source(config, member)
                n_adapter = _adapter_parameters(
                    config, name, member, one, loading, notes if unchecked is None else unchecked
                )
            except ProxyTuneError as error:
                problems.append(str(error))
            kept = any(other != name and own_weights[other] == key for other in found)  # alone, it is merged
        adapter_bytes = n_adapter * 4 if kept else 0  # PEFT keeps an adapter in float32
        shares = weights_of.get(key)
        seat = (key, place, member.prompt)
        reports.append(
            MemberReport(
                name=name,
                model=member.model,
                adapter=member.adapter,
                prompt=member.prompt.kind,
                architecture=type(model).__name__,
                dtype=str(dtype).removeprefix("torch."),
                parameters=n_weights + n_adapter,
                weight_bytes=(0 if shares else n_bytes + copied) + adapter_bytes,
                read_bytes=n_bytes - (0 if idle is None else idle.numel()) * dtype.itemsize,
                head_bytes=n_head * dtype.itemsize,
                adapter_bytes=adapter_bytes,
                layers=int(getattr(one.text, "num_hidden_layers", 0)),
                kv_bytes_per_token=0 if seat in seats else _kv_bytes(model, dtype),
                context=getattr(one.text, "max_position_embeddings", None),
                sliding_window=_window(one.text),
                vocab_size=one.text.vocab_size,
                shares_with=shares,
            )
        )
        weights_of.setdefault(key, name)
        seats.add(seat)
    return reports


def _weights(
    config: ProxyTuneConfig, found: Mapping[str, _Found], loading: Loading, notes: list[str]
) -> dict[str, Any]:
    """Member name -> a key that members with one set of weights in memory have in common.

    The rule is :func:`proxytune.recipe.layout.group_by_weights`'s.
    """
    members = [(name, one.member) for name, one in found.items()]
    try:
        groups, reasons = group_by_weights(config, members, loading)
    except ProxyTuneError:  # an adapter that cannot be read is reported where its parameters are counted
        return {name: name for name, _ in members}
    notes += [f"{name} has weights of its own, because {why}" for name, why in reasons.items()]
    return {name: index for index, group in enumerate(groups) for name, _ in group}


def _empty(config: PreTrainedConfig, loading: Loading) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=loading.trust_remote_code)
    return model  # type: ignore[no-any-return]


def _dtype(config: ProxyTuneConfig, name: str, one: _Found, loading: Loading) -> torch.dtype:
    """The dtype that loading gives: what is asked for, or what the config or the checkpoint says."""
    asked = one.member.dtype or loading.dtype
    if asked not in (None, "auto"):
        return asked if isinstance(asked, torch.dtype) else getattr(torch, str(asked))  # type: ignore[no-any-return]
    said = getattr(one.config, "dtype", None) or getattr(one.text, "dtype", None)
    if said is not None:
        return said if isinstance(said, torch.dtype) else getattr(torch, str(said))  # type: ignore[no-any-return]
    source, gguf = member_source(config, name, one.member)
    if source.is_local and gguf is None:
        for path in sorted((Path(source.path) / source.subfolder).glob("*.safetensors")):
            return _file_dtype(path)
    return torch.float32


def _file_dtype(path: Path) -> torch.dtype:
    """The dtype of a safetensors file's first floating tensor, from its header alone."""
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = (value.get("dtype") for name, value in header.items() if name != "__metadata__")
    return next((known[kind] for kind in kinds if kind in known), torch.float32)


def _weigh(
    model: PreTrainedModel, one: _Found, loading: Loading, dtype: torch.dtype, name: str, notes: list[str]
) -> tuple[int, int]:
    """A model's parameters and the bytes they take, quantized where the recipe or the checkpoint says so."""
    total = sum(parameter.numel() for parameter in model.parameters())
    quantization = (
        one.member.quantization_config
        or loading.quantization_config
        or getattr(one.config, "quantization_config", None)
    )
    n_bytes = total * dtype.itemsize
    if quantization:
        said = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method, bits = str(said.get("quant_method", "")), _bits(said)
        if bits is None:
            notes.append(f"{name} is quantized ({method or 'unknown method'}); its bytes are an upper bound")
        else:  # the linear layers are quantized; the embeddings and the head are not
            head = model.get_output_embeddings()
            inner = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
            n_bytes = (total - inner) * dtype.itemsize + inner * bits // 8
            notes.append(f"{name} is quantized to {bits} bits ({method}); scales are not counted")
    return total, n_bytes


def _head(model: PreTrainedModel) -> tuple[int, bool]:
    """The parameters of a model's output head, and whether they are its input embeddings too."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    tied = weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)
    return (0 if weight is None else int(weight.numel())), tied


def _bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits a weight, or None where the config does not say."""
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return 4
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return 8
    known = {"fp8": 8, "fbgemm_fp8": 8, "finegrained_fp8": 8, "mxfp4": 4}.get(str(quantization.get("quant_method")))
    bits = quantization.get("bits", quantization.get("w_bit", known))
    return bits if isinstance(bits, int) else None


def _kv_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int | None:
    """Bytes that one token adds to the cache: what a forward without storage leaves in it."""
    n_tokens = 4
    ids = torch.zeros(1, n_tokens, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    except Exception:  # a model that looks at values, or keeps another kind of state
        return _kv_bytes_by_config(model.config.get_text_config(decoder=True), dtype)
    return sum(tensor.numel() for tensor in states) // n_tokens * dtype.itemsize


def _kv_bytes_by_config(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "hidden_size", None)
    if not (layers and heads and width):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    return int(2 * layers * kv_heads * head * dtype.itemsize)


def _window(config: PreTrainedConfig) -> int | None:
    """The sliding window, where some layer has one."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return window if window and slides else None


def _adapter_parameters(
    config: ProxyTuneConfig, name: str, member: Member, one: _Found, loading: Loading, unchecked: list[str]
) -> int:
    """Try the adapter on an empty model: that shows whether it fits, and counts it."""
    with loading_of(name, member.adapter):
        directory = adapter_directory(config, name, member, loading)
        count, tried = try_adapter(name, directory, _empty(one.config, loading))
    if not tried:
        unchecked.append(f"whether the adapter of {name} fits its model: loading tries it")
    return count
