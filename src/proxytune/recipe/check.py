"""The checks of ``proxytune check``: will a recipe work, and how much memory does it need?

Only configs, tokenizers and the headers of weight files are read. Models are built without storage (the meta device).
Names and shapes of their tensors are compared with the headers, their caches are tested, and parameters and the cache's
bytes per token are counted. So all of it works for any architecture. What cannot be found out this way is listed as not
checked; :mod:`proxytune.answers.selftest` loads the recipe and tests it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from proxytune.errors import MemberError, ProxyTuneError, first_line
from proxytune.recipe.adapters import try_adapter
from proxytune.recipe.checkpoints import Fit, fit_of_gguf, fit_of_header, parts_of_gguf, read_header
from proxytune.recipe.config import ProxyTuneConfig
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
from proxytune.recipe.parts import ApiBase, Member
from proxytune.recipe.prompts import render
from proxytune.recipe.source import Source
from proxytune.recipe.vocabulary import compare

__all__ = ["MemberReport", "Report", "cache_bytes", "check_recipe", "count_recipe"]

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


@dataclass(frozen=True)
class MemberReport:
    """The sizes of one member.

    Attributes:
        prompt: the kind of its prompt. reads: the prompt in words; "" for the raw prompt.
        parameters: number of parameters of its weights and its adapter.
        weight_bytes: bytes in memory that it does not share with a member above it.
        read_bytes: bytes of its weights that a forward reads, shared or not: all except input embeddings that are not
            the head too.
        head_bytes: bytes of its output head.
        adapter_bytes: bytes of an adapter that is kept separate, because other members use the weights without it.
        layers: decoder layers.
        kv_bytes_per_token: bytes of cache per token; 0 if a member above it shares the cache; None if unknown.
        sliding_window: tokens after which (some of) its layers' cache stops growing.
        shares_with: the member above it that has the same weights.
    """

    name: str
    model: str | None
    adapter: str | None
    prompt: str
    reads: str
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
    """The result of a check.

    Attributes:
        works: whether the recipe can be loaded and used; None if no problem was found, but not everything could be
            checked.
        problems: why not, one sentence each.
        notes: other facts worth knowing.
        unchecked: what could not be checked, one clause each.
        context: the shortest member's, in tokens.
        shared_vocab: ids below it are mixed.
        description, examples: the recipe's description and its prompts to try; None and [] if it has none.
    """

    works: bool | None
    problems: list[str]
    notes: list[str]
    unchecked: list[str]
    members: list[MemberReport]
    alpha: dict[str, float]
    combine: str
    gate: dict[str, float] | None
    plausibility: float | None
    weight_bytes: int
    kv_bytes_per_token: int | None
    context: int | None
    shared_vocab: int | None
    description: str | None
    examples: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass
class _Found:
    """What is known about a member while the report is made."""

    member: Member
    config: PreTrainedConfig
    tokenizer: Any = None

    @property
    def text(self) -> PreTrainedConfig:
        """The config of the part that reads and writes text."""
        return self.config.get_text_config(decoder=True)

    @property
    def quantization(self) -> Any:
        return getattr(self.config, "quantization_config", None)


def check_recipe(config: ProxyTuneConfig, loading: Loading | None = None, *, asked: bool = False) -> Report:
    """Check a recipe without loading a weight.

    Args:
        asked: whether the caller asks the server of a base behind an API what it offers.
    """
    check = _Check(config, loading)
    for name, member in config.members():
        if isinstance(member, ApiBase):
            with check.telling():
                check.declared = load_tokenizer(config, name, member, check.loading)
            if not asked:
                check.unchecked.append(f"what the server of the base offers ({member.api}): loading asks it")
            continue
        with check.telling():
            own = check.config_of(name, member)
            check.refuse_without_weights(name, member)
            check.found[name] = _Found(member, own)
            check.found[name].tokenizer = load_tokenizer(config, name, member, check.loading)
    n_found = len(check.found) + (check.declared is not None)
    shared = check.vocabulary() if n_found == len(list(config.members())) else None
    check.prompts()
    check.generation()
    check.parts()
    check.outputs()
    members = check.count(files=True)
    return Report(
        works=False if check.problems else None if check.unchecked else True,
        problems=check.problems,
        notes=check.notes,
        unchecked=check.unchecked,
        members=members,
        alpha=dict(zip(config.expert_names, config.alphas)),
        combine=config.combine,
        gate=config.gate,
        plausibility=config.plausibility,
        weight_bytes=sum(report.weight_bytes for report in members),
        kv_bytes_per_token=cache_bytes(members),
        context=min((report.context for report in members if report.context is not None), default=None),
        shared_vocab=shared,
        description=config.description,
        examples=config.examples or [],
    )


def count_recipe(config: ProxyTuneConfig, loading: Loading | None = None) -> tuple[list[MemberReport], list[str]]:
    """Count a recipe's members from only their configs, with or without weights. Returns also notes.

    A base behind an API is left out.

    Raises:
        MemberError: for the first member that cannot be counted.
    """
    check = _Check(config, loading)
    for name, member in config.members():
        if isinstance(member, ApiBase):
            continue
        check.found[name] = _Found(member, check.config_of(name, member))
    members = check.count(files=False)
    if check.problems:
        raise MemberError(check.problems[0])
    return members, check.notes + check.unchecked


class _Check:
    """A running check: what is known about the members, and the results so far (see :class:`Report`)."""

    def __init__(self, config: ProxyTuneConfig, loading: Loading | None) -> None:
        self.config, self.loading = config, loading or Loading()
        self.found: dict[str, _Found] = {}
        self.declared: Any = None  # the tokenizer of a base behind an API
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unchecked: list[str] = []

    @contextmanager
    def telling(self, beginning: str = "") -> Iterator[None]:
        """Turn expected errors into problems of the report."""
        try:
            yield
        except ProxyTuneError as error:
            self.problems.append(f"{beginning}{error}")

    def config_of(self, name: str, member: Member) -> PreTrainedConfig:
        config = load_config(self.config, name, member, self.loading)
        refuse_unfit(name, member, config)
        return config

    # -- will it work? ------------------------------------------------------------------------------------------
    def refuse_without_weights(self, name: str, member: Member) -> None:
        source, _ = member_source(self.config, name, member)
        folder = Path(source.path) / source.subfolder
        if source.is_local and not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
            raise MemberError(f"{name} ({member.model}) has no weights in its directory")

    def vocabulary(self) -> int:
        """The number of ids that are mixed: all below it."""
        tokenizers = {name: one.tokenizer for name, one in self.found.items()}
        widths = {name: one.text.vocab_size for name, one in self.found.items()}
        if self.declared is not None:
            tokenizers = {"base": self.declared, **tokenizers}
            widths = {"base": max(len(self.declared), min(widths.values())), **widths}
        report = compare(tokenizers, widths, self.config.renamed_tokens)
        with self.telling():
            report.raise_for_mismatch()
        self.notes += report.notes
        for index, name, ours, theirs in report.renamed:
            self.notes.append(f"id {index} is {ours!r} in the base and {theirs!r} in {name}; the recipe accepts that")
        for name in report.unchecked:
            self.unchecked.append(f"whether the tokens of {name} are the base's, since it has no tokenizer")
        return report.shared

    def prompts(self) -> None:
        base = self.found["base"].tokenizer if "base" in self.found else self.declared
        for name, one in self.found.items():
            if one.member.prompt.kind not in ("raw", "negative"):  # a negative prompt is read like the raw one
                with self.telling(f"the prompt of {name} cannot be made: "):
                    render(one.member.prompt, one.tokenizer or base, "Hello", f"member {name!r}")

    def generation(self) -> None:
        """Check the default settings of generation: the recipe's own generation config, or the base's."""
        if "base" not in self.found:
            return
        with self.telling():
            generation = base_generation_config(self.config, self.loading)
            if generation is not None:
                width = self.found["base"].text.vocab_size
                self.notes += adapted(generation, width, "the generation config")[1]

    def parts(self) -> None:
        for name, one in self.found.items():
            _, file = member_source(self.config, name, one.member)
            if file is not None and (n_parts := parts_of_gguf(file)) > 1:
                self.notes.append(
                    f"{name} is split into {n_parts} shards, which are joined in a temporary file each time they are "
                    f"loaded; `llama-gguf-split --merge {file} WHOLE.gguf` does it once"
                )

    def outputs(self) -> None:
        caps = {name: getattr(one.text, "final_logit_softcapping", None) for name, one in self.found.items()}
        if len(set(caps.values())) > 1:
            capped = ", ".join(name for name, cap in caps.items() if cap)
            self.notes.append(
                f"only some members cap their logits ({capped}), so their differences have different scales"
            )

    def weights(self, name: str, model: PreTrainedModel) -> None:
        """Compare a member's cache and files with the empty ``model`` that its config describes.

        Raises:
            MemberError: if something is wrong with them.
        """
        one = self.found[name]
        of = f"{name} ({one.member.model})"
        if (obstacle := obstacle_of(model)) is not None:
            raise MemberError(f"{of} cannot be used in a recipe: {obstacle}; name another model")
        if keeps_states(one.text):
            self.unchecked.append(f"whether {of} gives the same logits with its cache as without: loading tests it")
        fit: Fit | None = None
        why = "its files are on the hub, and their headers cannot be read there"
        with opened(self.config, name, one.member, self.loading, with_data=False) as (path, place):
            if "gguf_file" in place:
                if Path(path).is_dir():
                    fit = fit_of_gguf(model, path, place)
                    why = "transformers takes its tensors apart while it loads them"
            elif one.quantization:
                why = "its files are quantized"
            elif (header := read_header(path, place)) is not None:
                fit = fit_of_header(model, header)
        if fit is None:
            self.unchecked.append(f"the tensors of {of}, because {why}")
        elif fit.problem is not None:
            raise MemberError(f"{of} {fit.problem}")
        elif fit.note is not None:
            self.notes.append(f"{of} {fit.note}")

    # -- what does it need? -------------------------------------------------------------------------------------
    def count(self, *, files: bool) -> list[MemberReport]:
        """Count the members and, with ``files``, compare their files and caches with their configs."""
        reports: list[MemberReport] = []
        own_weights = self._sets_of_weights()
        weights_of: dict[Any, str] = {}  # a set of weights -> the first member that has it
        seats: set[Any] = set()
        for name, one in self.found.items():
            member, key = one.member, own_weights[name]
            try:
                model = self._empty(one)
            except Exception as error:  # an architecture that transformers lacks, remote code
                self.problems.append(f"{name} ({member.model}) cannot be built: {first_line(error)}")
                continue
            if files and key not in weights_of:
                with self.telling():
                    self.weights(name, model)
            dtype = self._dtype(name)
            n_weights, n_bytes = self._weigh(name, model, dtype)
            idle = idle_embeddings(model)
            head = getattr(model.get_output_embeddings(), "weight", None)
            head_bytes = 0 if head is None else head.numel() * dtype.itemsize
            copied = head_bytes if self.loading.pack and idle is None else 0  # a packed head is separate
            n_adapter, place = 0, None
            with self.telling():
                if (place := adapter_source(self.config, member)) is not None:
                    n_adapter = self._try_adapter(name, place)
            kept = any(other != name and own_weights[other] == key for other in self.found)  # alone, it is merged
            adapter_bytes = n_adapter * 4 if kept else 0  # PEFT keeps an adapter in float32
            shares = weights_of.get(key)
            seat = (key, place, member.prompt)
            reports.append(
                MemberReport(
                    name=name,
                    model=member.model,
                    adapter=member.adapter,
                    prompt=member.prompt.kind,
                    reads="" if member.prompt.kind == "raw" else member.prompt.in_words,
                    architecture=type(model).__name__,
                    dtype=str(dtype).removeprefix("torch."),
                    parameters=n_weights + n_adapter,
                    weight_bytes=(0 if shares else n_bytes + copied) + adapter_bytes,
                    read_bytes=n_bytes - (0 if idle is None else idle.numel()) * dtype.itemsize,
                    head_bytes=head_bytes,
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

    def _sets_of_weights(self) -> dict[str, Any]:
        """Member name -> a key that members with one set of weights in memory have in common."""
        members = [(name, one.member) for name, one in self.found.items()]
        try:
            groups, reasons = group_by_weights(self.config, members, self.loading)
        except ProxyTuneError:  # an adapter that cannot be read is reported where its parameters are counted
            return {name: name for name, _ in members}
        self.notes += [f"{name} has weights of its own, because {why}" for name, why in reasons.items()]
        return {name: index for index, group in enumerate(groups) for name, _ in group}

    def _empty(self, one: _Found) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(one.config, trust_remote_code=self.loading.trust_remote_code)

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype after loading: the requested one, or that of the config or the checkpoint."""
        one = self.found[name]
        said = one.member.dtype or self.loading.dtype
        if said in (None, "auto"):
            said = getattr(one.config, "dtype", None) or getattr(one.text, "dtype", None)
        if said is not None:
            return said if isinstance(said, torch.dtype) else getattr(torch, str(said))
        source, gguf = member_source(self.config, name, one.member)
        files = (Path(source.path) / source.subfolder).glob("*.safetensors") if gguf is None else ()
        for file in sorted(files):
            tensors = load_state_dict(file, map_location="meta").values()
            return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        return torch.float32

    def _weigh(self, name: str, model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int]:
        """A model's parameters and their bytes; quantized if the recipe or the checkpoint says so."""
        one = self.found[name]
        total = sum(parameter.numel() for parameter in model.parameters())
        quantization = one.member.quantization_config or self.loading.quantization_config or one.quantization
        if not quantization:
            return total, total * dtype.itemsize
        said = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method, bits = str(said.get("quant_method", "")), _bits(said)
        if bits is None:
            self.notes.append(f"{name} is quantized ({method or 'unknown method'}); its bytes are an upper bound")
            return total, total * dtype.itemsize
        # The linear layers are quantized; the embeddings and the head are not.
        head = model.get_output_embeddings()
        inner = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        self.notes.append(f"{name} is quantized to {bits} bits ({method}); scales are not counted")
        return total, (total - inner) * dtype.itemsize + inner * bits // 8

    def _try_adapter(self, name: str, place: Source) -> int:
        """Put the adapter on an empty model, to check whether it fits, and to count it."""
        one = self.found[name]
        with loading_of(name, one.member.adapter):
            count, tried = try_adapter(name, adapter_directory(name, place, self.loading), self._empty(one))
        if not tried:
            self.unchecked.append(f"whether the adapter of {name} fits its model: loading tests it")
        return count


def cache_bytes(members: Sequence[MemberReport]) -> int | None:
    """The bytes of cache that a token needs in all of these members; None if one is unknown."""
    sizes = [report.kv_bytes_per_token for report in members]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits per weight; None if the config does not say."""
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return 4
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return 8
    known = {"fp8": 8, "fbgemm_fp8": 8, "finegrained_fp8": 8, "mxfp4": 4}.get(str(quantization.get("quant_method")))
    bits = quantization.get("bits", quantization.get("w_bit", known))
    return bits if isinstance(bits, int) else None


def _kv_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int | None:
    """The bytes that one token adds to the cache, from a forward without storage."""
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
    """The sliding window, if some layer has one."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return window if window and slides else None
