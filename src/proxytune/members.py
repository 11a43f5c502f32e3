"""From the recipe's members to models in memory: each set of weights is loaded once.

Members that use the same weights sit in one :class:`Lane` and are computed in one forward, each as a block of
rows of the batch: the anti-expert and the LoRA expert on top of it, or one model under two prompts. A LoRA
adapter then touches only its own block, so the shared weights are read once for all of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.hub import cached_file

from proxytune.adapters import (
    active_adapter,
    can_be_merged,
    changed_weights,
    checksums,
    judge,
    load_adapter,
    read_config,
    unlike_as_loaded,
)
from proxytune.checkpoints import Fit, fit_of, fit_of_gguf, read_header, whole_gguf
from proxytune.config import Member, Prompt, ProxyTuneConfig, Source
from proxytune.errors import MemberError, PromptError, first_line
from proxytune.families import has_read, one_by_one, reading_of
from proxytune.kernels import PackedLinear, QuickHead, pack
from proxytune.rows import apply_by_rows, refuse_unlike, same_weights

__all__ = [
    "Lane",
    "Loading",
    "Seat",
    "adapter_directory",
    "adapter_source",
    "directory_of",
    "find_file",
    "forget_gguf",
    "group_by_weights",
    "idle_embeddings",
    "load_adapter_config",
    "load_config",
    "load_lanes",
    "load_member",
    "load_model",
    "load_recipe_tokenizer",
    "load_tokenizer",
    "loading_of",
    "member_source",
    "opened",
    "refuse_unfit",
]

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Loading:
    """What the caller of ``from_pretrained`` asks of every member that the recipe leaves open."""

    dtype: Any = None
    device_map: Any = None
    quantization_config: Any = None
    attn_implementation: Any = None
    tqdm_class: Any = None  # of a progress bar over the weights; `transformers serve` gives one
    trust_remote_code: bool = False
    share: bool = True
    pack: bool = False
    hub: dict[str, Any] = field(default_factory=dict)  # token, cache_dir, local_files_only, force_download


@dataclass(frozen=True)
class Seat:
    """One block of rows in a lane: the members it serves, its prompt, and the adapter its rows pass through."""

    names: tuple[str, ...]
    prompt: Prompt
    adapter: str | None = None


class Lane(nn.Module):
    """One set of weights and the seats that are computed with it.

    A forward takes the seats' rows stacked, shape = (n_seats * n_batch, n_columns), block by block.
    """

    def __init__(
        self, model: PreTrainedModel, seats: Sequence[Seat], source: Member | None = None, adapted: Any = None
    ) -> None:
        """
        Args:
            model: a module tree that is the lane's own.
            source: where it lies; None for a model that was given in memory.
            adapted: the ``PeftModel`` around ``model``, where its layers have adapters.
        """
        super().__init__()
        self.model: Any = model.eval()
        self.seats = tuple(seats)
        self.source = source
        self._adapted = (adapted,)  # in a tuple: its modules are the model's
        self._alone: dict[str | None, Any] = {}  # adapter -> the model under it alone
        self.packed = any(isinstance(module, PackedLinear) for module in model.modules())
        self.read_bytes = _bytes_read(model)
        self.quick_head: QuickHead | None = None
        self.reading = reading_of(model)
        if self.reading.obstacle is not None:
            names = ", ".join(name for seat in seats for name in seat.names)
            raise MemberError(f"{names} cannot be used in a recipe: {self.reading.obstacle}; name another model")
        self.by_rows = len({seat.adapter for seat in seats}) > 1
        if self.by_rows:
            adapters = [seat.adapter for seat in seats]
            apply_by_rows(model, adapters)
            if reason := refuse_unlike(model, adapters):
                owner = next(seat.names[0] for seat in seats if seat.adapter is not None)
                raise CannotShare(owner, reason)
        self._as_loaded = _marks(model)

    @property
    def adapted(self) -> Any:
        """The ``PeftModel`` around the model, or None."""
        return self._adapted[0]

    @property
    def changed(self) -> bool:
        """Whether the weights are trained, or are no longer those that were loaded."""
        marks = _marks(self.model)
        return (
            any(p.requires_grad for p in self.model.parameters())
            or marks.keys() != self._as_loaded.keys()
            or any(_differ(mark, self._as_loaded[name]) for name, mark in marks.items())
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._alone.clear()  # it may give a module other parameters and buffers
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Lane:
        self._alone.clear()
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def config(self) -> PreTrainedConfig:
        return cast(PreTrainedConfig, self.model.config.get_text_config(decoder=True))

    def pack(self) -> None:
        """Lay the weights out for fast inference on a CPU; see :func:`proxytune.kernels.pack`."""
        pack(self.model)
        self._alone.clear()
        self.packed = True
        self._as_loaded = _marks(self.model)

    def prepare_drafts(self) -> None:
        """Make a quick head for drafting, where the weights are packed and the logits are the head's very output."""
        head = self.model.get_output_embeddings()
        if isinstance(head, PackedLinear) and _ends_with_its_head(self.model, len(self.seats)):
            self.quick_head = QuickHead.of(head)

    @property
    def head_bytes(self) -> int:
        """Of the head, where it is packed; else 0."""
        head = self.model.get_output_embeddings()
        return head.packed.numel() * head.packed.dtype.itemsize if isinstance(head, PackedLinear) else 0

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """The last hidden states of the stacked rows, (n_seats * n_batch, n_columns, n_hidden), for :meth:`head`."""
        self._make_masks(input_ids, inputs)
        return cast(Tensor, self.model.base_model(input_ids=input_ids, **inputs).last_hidden_state)

    def _make_masks(self, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        """Over a static cache the attention's masks are made here, as ``generate`` does: they depend on its contents,
        which a compiled model cannot look at.
        """
        cache = inputs.get("past_key_values")
        if cache is None or not cache.is_compileable:
            return
        make = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)  # some families' own
        shapes = torch.empty((*input_ids.shape, 0), dtype=self.model.dtype, device=input_ids.device)
        inputs["attention_mask"] = make(
            config=self.model.config,
            inputs_embeds=shapes,
            attention_mask=inputs.get("attention_mask"),
            past_key_values=cache,
            position_ids=inputs.get("position_ids"),
        )

    def head(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states, as :meth:`forward` gives them; for lanes with a quick head."""
        return cast(Tensor, self.model.get_output_embeddings()(hidden))

    def alone(self, name: str) -> Any:
        """The model of member ``name`` by itself, for calls of its own: the very weights, its adapter on all rows."""
        if not self.by_rows:
            return self.model
        adapter = next(seat.adapter for seat in self.seats if name in seat.names)
        if adapter not in self._alone:
            model = same_weights(self.model)
            apply_by_rows(model, [adapter])
            self._alone[adapter] = model
        return self._alone[adapter]

    def forward(self, input_ids: Tensor, *, logits_to_keep: int | Tensor, **inputs: Any) -> Tensor:
        """Logits of the stacked rows, shape = (n_seats * n_batch, n_kept, n_vocab), in the model's dtype.

        Raises:
            PromptError: for a row with padding, where the model is not exact with it.
        """
        if not self.reading.padded and (mask := inputs.get("attention_mask")) is not None and not bool(mask.all()):
            raise PromptError(
                f"{type(self.model).__name__} ({', '.join(self.seats[0].names)}) gives other logits behind padding; "
                "give it one prompt at a time, or prompts of one length"
            )
        cache = inputs.get("past_key_values")
        if not self.reading.in_pieces and input_ids.shape[1] > 1 and has_read(cache):
            logits = one_by_one(lambda ids, **own: self(ids, logits_to_keep=0, **own), input_ids, inputs)
            return _kept(logits, logits_to_keep)
        self._make_masks(input_ids, inputs)
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"] = logits_to_keep
            return cast(Tensor, self.model(input_ids=input_ids, **inputs).logits)
        return _kept(self.model(input_ids=input_ids, **inputs).logits, logits_to_keep)


def _kept(logits: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Some positions of logits, by transformers' argument of that name: how many of the last, 0 for all, or which."""
    return logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]


class CannotShare(MemberError):
    """An adapter of ``owner`` turns out to need weights of its own, for ``reason``."""

    def __init__(self, owner: str, reason: str) -> None:
        super().__init__(
            f"{owner} shares its weights with another member, but its adapter cannot be applied to a part of the batch "
            f"because {reason}; give members with weights of their own"
        )
        self.owner, self.reason = owner, reason


def _marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What shows that a parameter was written to: PyTorch's count of writes, and a sample of its bits.

    Optimizers that are fused leave the count alone, and change every value.
    """
    return {
        name: (p.dtype, 0 if p.is_inference() else p._version, *checksums({"": _sample(p)}).values())
        for name, p in model.named_parameters()
    }


def _sample(weight: Tensor, n: int = 65536) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // n)]


def _differ(mark: tuple[Any, ...], loaded: tuple[Any, ...]) -> bool:
    return mark[0] == loaded[0] and mark != loaded  # another dtype is the same weights, rounded


@torch.no_grad()
def _ends_with_its_head(model: Any, n_rows: int) -> bool:
    """Whether the logits are what the head gives: some families scale or cap them, or norm what the head reads."""
    if model.base_model is model:
        return False
    ids = torch.tensor([[0, 1]] * n_rows, device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)


def idle_embeddings(model: Any) -> Tensor | None:
    """The input embeddings of a model where its head is another weight: a token reads no more of them than a row."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is getattr(model.get_output_embeddings(), "weight", None) else weight


def _bytes_read(model: nn.Module) -> int:
    """What a token's forward reads of the weights: all of them, but of input embeddings only a row."""
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    sizes.pop(id(idle_embeddings(model)), None)
    packed = (module.packed for module in model.modules() if isinstance(module, PackedLinear))
    return sum(sizes.values()) + sum(weight.numel() * weight.dtype.itemsize for weight in packed)


# -- loading --------------------------------------------------------------------------------------------------
def load_lanes(config: ProxyTuneConfig, loading: Loading, given: Mapping[str, Any]) -> list[Lane]:
    """Load every member of the recipe, each set of weights once.

    Args:
        config: the recipe.
        loading: what the caller asks of every member.
        given: member name -> a model in memory (a PeftModel too); its weights are used, its modules stay as they are.

    Raises:
        MemberError: naming the member that cannot be loaded, and why.
    """
    in_memory: dict[int, list[tuple[str, Member]]] = {}
    for name, member in config.members():
        if name in given:
            in_memory.setdefault(id(_bare(given[name])), []).append((name, member))
    named = [(name, member) for name, member in config.members() if name not in given]
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


def load_member(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> Lane:
    """Load one member alone, its adapter merged where that can be done."""
    lane = _loaded_lane(config, [(name, member)], loading)
    if loading.pack:
        lane.pack()
    return lane


def group_by_weights(
    config: ProxyTuneConfig, members: Sequence[tuple[str, Member]], loading: Loading
) -> tuple[list[list[tuple[str, Member]]], dict[str, str]]:
    """Which members use one set of weights.

    Members of one model are a group, whatever their adapters and prompts, unless sharing is turned off or some
    adapter cannot be applied to a part of a batch: then each adapter has a group of its own.

    Returns:
        The groups, and for each member whose adapter stands in the way, why.

    Raises:
        MemberError: for an adapter that cannot be used, see :func:`proxytune.adapters.judge`.
    """
    same_model: dict[Any, list[tuple[str, Member]]] = {}
    for name, member in members:
        source = None if member.model is None else config.locate(member.model, member.revision)
        placed = (member.gguf_file, member.dtype, repr(member.device_map), repr(member.quantization_config))
        same_model.setdefault((source, *placed), []).append((name, member))

    groups: list[list[tuple[str, Member]]] = []
    reasons: dict[str, str] = {}
    terms = {n: judge(load_adapter_config(config, n, m, loading)) for n, m in members if m.adapter is not None}
    for group in same_model.values():
        adapters = {name: adapter_source(config, member) for name, member in group}
        hindered = {}
        several = len(set(adapters.values())) > 1
        if several and loading.share:
            hindered = {n: reason for n, _ in group if n in terms and (reason := terms[n].apart)}
        if not several or (loading.share and not hindered):
            groups.append(group)
        else:
            places = sorted(set(adapters.values()), key=str)
            groups += [[(n, m) for n, m in group if adapters[n] == place] for place in places]
        reasons |= hindered
    return groups, reasons


def _bare(model: Any) -> Any:
    """The transformers model under a PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _given_lane(group: list[tuple[str, Member]], given: Mapping[str, Any]) -> Lane:
    """A lane over the weights of models in memory, in a module tree of its own: the caller's stays as it is."""
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
    return Lane(_bare(model), _seats(group, adapters), adapted=model if wrappers else None)


def _loaded_lanes(config: ProxyTuneConfig, group: list[tuple[str, Member]], loading: Loading) -> list[Lane]:
    """One lane, or where an adapter turns out to be in the others' way, one for each adapter."""
    try:
        return [_loaded_lane(config, group, loading)]
    except CannotShare as error:
        _warn_apart(error.owner, error.reason)
    parts: dict[Source | None, list[tuple[str, Member]]] = {}
    for name, member in group:
        parts.setdefault(adapter_source(config, member), []).append((name, member))
    return [_loaded_lane(config, part, loading) for part in parts.values()]


def _warn_apart(name: str, reason: str) -> None:
    logger.warning("the adapter of %s is loaded with weights of its own, because %s", name, reason)


def _loaded_lane(config: ProxyTuneConfig, group: list[tuple[str, Member]], loading: Loading) -> Lane:
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
            adapted = load_adapter(adapted or model, owner, adapter, adapter_directory(config, owner, at, loading))
        if shared and (touched := changed_weights(adapted, before)):
            raise CannotShare(owner, f"it changes the model's own weights ({touched})")
    if adapted is not None:
        if not shared and can_be_merged(adapted):
            model = adapted.merge_and_unload()  # alone on its weights: merged, it costs nothing
            adapted, adapters = None, dict.fromkeys(adapters)
        else:
            model = adapted.get_base_model()
    model.requires_grad_(False)
    return Lane(model, _seats(group, adapters), source=member, adapted=adapted)


def _seats(group: list[tuple[str, Member]], adapters: Mapping[str, str | None]) -> list[Seat]:
    """One seat for each distinct (adapter, prompt): members that agree in both are computed once."""
    seats: dict[tuple[str | None, Prompt], list[str]] = {}
    for name, member in group:
        seats.setdefault((adapters[name], member.prompt), []).append(name)
    return [Seat(tuple(names), prompt, adapter) for (adapter, prompt), names in seats.items()]


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
    """Drop the note that a model was quantized: transformers dequantizes GGUF, and refuses to save what is noted so."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def refuse_unfit(name: str, member: Member, own: PreTrainedConfig) -> None:
    """Raise :class:`MemberError` if a model of this config cannot be a member."""
    if own.model_type == ProxyTuneConfig.model_type:
        raise MemberError(f"{name} ({member.model}) is itself a recipe; name the models in it instead")
    if own.is_encoder_decoder:
        raise MemberError(f"{name} ({member.model}) is an encoder-decoder; members must be decoder-only")


def load_config(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> PreTrainedConfig:
    """Load one member's config alone."""
    source, gguf_file = member_source(config, name, member)
    with loading_of(name, member.model):
        where = None if gguf_file is not None else _adapted_model(source, loading)
    if where is not None:
        raise MemberError(
            f"{name} ({member.model}) is an adapter, not a model; give it as `adapter` (--expert-adapter) beside the "
            f"`model` it adapts, {where}"
        )
    with opened(config, name, member, loading, with_data=False) as (path, place):
        return AutoConfig.from_pretrained(  # type: ignore[no-any-return]
            path, trust_remote_code=loading.trust_remote_code, **place
        )


def _adapted_model(source: Source, loading: Loading) -> str | None:
    """The model that the adapter in a place names, or None where there is no adapter alone."""
    if find_file(source, "config.json", loading) is not None:
        return None
    if (file := find_file(source, "adapter_config.json", loading)) is None:
        return None
    found = re.search(r'"base_model_name_or_path":\s*"([^"]+)"', Path(file).read_text("utf-8"))
    return repr(found[1]) if found else "which it does not name"


def load_tokenizer(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> Any:
    """One member's tokenizer, or None where its directory has none."""
    source, gguf_file = member_source(config, name, member)
    with opened(config, name, member, loading, with_data=False) as (path, place):
        if gguf_file is None and not any(find_file(source, file, loading) for file in TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(path, trust_remote_code=loading.trust_remote_code, **place)


def load_recipe_tokenizer(config: ProxyTuneConfig, loading: Loading) -> Any:
    """The recipe's own tokenizer, or None where it has none.

    Raises:
        MemberError: if it has one that cannot be read.
    """
    if not config.name_or_path:
        return None
    return load_tokenizer(config, f"the tokenizer of the recipe {config.name_or_path}", Member("."), loading)


@contextmanager
def opened(
    config: ProxyTuneConfig, name: str, member: Member, loading: Loading, *, with_data: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A member's place as every ``from_pretrained`` takes it: its path, and the keyword arguments that belong to it.

    A split GGUF file is whole in here; ``with_data=False`` is for those who read no weights. What a loader raises
    comes out as one sentence that names the member.
    """
    source, gguf_file = member_source(config, name, member)
    place = _hub_arguments(source, loading, gguf_file)
    with loading_of(name, member.model):
        if gguf_file is None:
            yield source.path, place
            return
        with whole_gguf(source.path, place, with_data=with_data) as whole:
            yield whole


def find_file(source: Source, name: str, loading: Loading) -> str | None:
    """The path of a file in a place, downloaded if it is on the hub; None where there is none, or offline.

    Raises:
        OSError: if the hub does not give it.
    """
    if source.is_local:
        path = Path(source.path) / source.subfolder / name
        return str(path) if path.is_file() else None
    found = cached_file(
        source.path, name, **_hub_arguments(source, loading), _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else str(found)


def member_source(config: ProxyTuneConfig, name: str, member: Member) -> tuple[Source, str | None]:
    """Where a member lies, and the GGUF file in that place if it is one."""
    if member.model is None:
        raise MemberError(f"{name} was a model in memory when this recipe was made; save it and name its directory")
    source = config.locate(member.model, member.revision)
    if source.path.endswith(".gguf"):
        path = Path(source.path)
        return Source(str(path.parent), source.revision, source.subfolder), path.name
    return source, member.gguf_file


def adapter_source(config: ProxyTuneConfig, member: Member) -> Source | None:
    """Where a member's adapter lies, or None where it has none."""
    if member.adapter is None:
        return None
    return config.locate(member.adapter, member.adapter_revision)


def adapter_directory(
    config: ProxyTuneConfig, name: str, member: Member, loading: Loading, files: str = "adapter_*"
) -> str:
    """The directory of a member's adapter, downloaded if it is on the hub."""
    if (source := adapter_source(config, member)) is None:
        raise MemberError(f"{name} has no adapter")
    return directory_of(name, source, loading, files)


def directory_of(name: str, source: Source, loading: Loading, files: str = "adapter_*") -> str:
    """Where an adapter lies on this machine; downloaded from the hub, since PEFT, offline, finds no subfolder there."""
    if find_spec("peft") is None:
        raise MemberError(f"{name} has an adapter, which needs PEFT: pip install 'proxytune[lora]'")
    if source.is_local:
        return str(Path(source.path) / source.subfolder)
    known = ("cache_dir", "force_download", "local_files_only", "token")
    snapshot = snapshot_download(
        source.path,
        revision=source.revision,
        allow_patterns=str(PurePosixPath(source.subfolder) / files),
        **{key: value for key, value in loading.hub.items() if key in known},
    )
    return str(Path(snapshot) / source.subfolder)


def load_adapter_config(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> Any:
    """The PEFT config of a member's adapter, which is one that can be used."""
    with loading_of(name, member.adapter):
        return read_config(name, adapter_directory(config, name, member, loading, "adapter_config.json"))


def _hub_arguments(source: Source, loading: Loading, gguf_file: str | None = None) -> dict[str, Any]:
    """What every ``from_pretrained`` is told of a place, besides its path."""
    place = {"revision": source.revision, "subfolder": source.subfolder or None, "gguf_file": gguf_file}
    return {key: value for key, value in {**place, **loading.hub}.items() if value is not None}


@contextmanager
def loading_of(name: str, where: str | None) -> Iterator[None]:
    """Turn whatever a loader raises into one sentence that names the member."""
    try:
        yield
    except MemberError:
        raise
    except ImportError as error:
        hint = ": pip install 'proxytune[gguf]'" if "gguf" in str(error).lower() else ""
        raise MemberError(f"{name} ({where}) needs a package that is missing{hint} ({first_line(error)})") from error
    except Exception as error:  # a loader raises anything: OSError, KeyError, RuntimeError of a size mismatch
        if "trust_remote_code=True" in str(error):
            raise MemberError(
                f"{name} ({where}) needs code that it brings along; if you trust it, say --trust-remote-code, or in "
                "Python member_trust_remote_code=True"
            ) from error
        raise MemberError(f"{name} ({where}) cannot be loaded: {first_line(error)}") from error
