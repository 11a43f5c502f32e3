"""A member's config, tokenizer and files, from its place on disk or on the hub; no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from proxytune.errors import MemberError, RecipeError, first_line
from proxytune.recipe.checkpoints import find_file, whole_gguf
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase, Member
from proxytune.recipe.source import Source

__all__ = [
    "Loading",
    "adapter_directory",
    "adapter_source",
    "find_in",
    "load_config",
    "load_recipe_tokenizer",
    "load_tokenizer",
    "loading_of",
    "member_source",
    "opened",
    "refuse_of_api",
    "refuse_unfit",
]

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
    way: str | None = None  # these four are for a base behind an API
    max_calls: int | None = None
    max_tokens: int | None = None
    sample_named: bool | None = None
    hub: dict[str, Any] = field(default_factory=dict)  # token, cache_dir, local_files_only, force_download

    @classmethod
    def of(cls, options: LoadingOptions, **hub: Any) -> Loading:
        """What a command's options ask of members."""
        asked = {name: value for name, value in vars(options).items() if name != "speculate"}
        return cls(**asked, hub=hub)


def refuse_unfit(name: str, member: Member, own: PreTrainedConfig) -> None:
    """Raise :class:`MemberError` if a model of this config cannot be a member."""
    if own.model_type == ProxyTuneConfig.model_type:
        raise MemberError(f"{name} ({member.model}) is itself a recipe; name the models in it instead")
    if own.is_encoder_decoder:
        raise MemberError(f"{name} ({member.model}) is an encoder-decoder; members must be decoder-only")


def refuse_of_api(base: Member, loading: Loading | LoadingOptions) -> None:
    """Raise :class:`RecipeError` for an option of a base behind an API, if ``base`` is a model."""
    for option in () if isinstance(base, ApiBase) else ("way", "max_calls", "max_tokens", "sample_named"):
        if getattr(loading, option) not in (None, False):
            flag = option.replace("_", "-")
            raise RecipeError(f"--{flag} is for a base behind an API, and this recipe's base is a model; leave it out")


def load_config(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> PreTrainedConfig:
    """Load one member's config alone."""
    source, gguf_file = member_source(config, name, member)
    with opened(config, name, member, loading, with_data=False) as (path, place):
        if gguf_file is None and (adapted := _adapted_model(source, loading)) is not None:
            raise MemberError(
                f"{name} ({member.model}) is an adapter, not a model; give it as `adapter` (--expert-adapter) beside "
                f"the `model` it adapts, {adapted}"
            )
        return AutoConfig.from_pretrained(  # type: ignore[no-any-return]
            path, trust_remote_code=loading.trust_remote_code, **place
        )


def _adapted_model(source: Source, loading: Loading) -> str | None:
    """The model that the adapter in a place names, or None where there is no adapter alone."""
    if find_in(source, "config.json", loading) or not (file := find_in(source, "adapter_config.json", loading)):
        return None
    found = re.search(r'"base_model_name_or_path":\s*"([^"]+)"', Path(file).read_text("utf-8"))
    return repr(found[1]) if found else "which it does not name"


def load_tokenizer(config: ProxyTuneConfig, name: str, member: Member, loading: Loading) -> Any:
    """One member's tokenizer, or None where its directory has none."""
    if isinstance(member, ApiBase):
        declared = load_tokenizer(config, f"the tokenizer of {name}", Member(member.tokenizer), loading)
        if declared is None:
            raise MemberError(f"there is no tokenizer at {member.tokenizer!r}, which the base behind an API names")
        return declared
    source, gguf_file = member_source(config, name, member)
    with opened(config, name, member, loading, with_data=False) as (path, place):
        if gguf_file is None and not any(find_in(source, file, loading) for file in TOKENIZER_FILES):
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


def find_in(source: Source, name: str, loading: Loading) -> str | None:
    """The path of a file in a place, see :func:`proxytune.recipe.checkpoints.find_file`."""
    return find_file(source.path, name, _hub_arguments(source, loading))


def member_source(config: ProxyTuneConfig, name: str, member: Member) -> tuple[Source, str | None]:
    """Where a member lies, and the GGUF file in that place if it is one."""
    if isinstance(member, ApiBase):
        raise MemberError(f"{name} runs behind an API ({member.api}), so none of its files are at hand")
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


def adapter_directory(name: str, source: Source, loading: Loading, files: str = "adapter_*") -> str:
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
                f"{name} ({where}) needs code of its own; if you trust it, add --trust-remote-code, or in Python "
                "member_trust_remote_code=True"
            ) from error
        raise MemberError(f"{name} ({where}) cannot be loaded: {first_line(error)}") from error
