"""The models that vLLM must load for a recipe, and the recipes that it cannot serve. It needs no vLLM.

Two entries of the recipe that name the same weights and the same prompt are one model. (An anti-expert of several
experts is loaded and run once.) With the same weights and another prompt they are two models on one set of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.errors import MemberError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import adapter_source, member_source
from proxytune.recipe.parts import Member, Prompt
from proxytune.recipe.source import Source

__all__ = ["Part", "parts_of", "reads_own_prompts", "refuse"]


@dataclass(frozen=True)
class Part:
    """One model of the composite.

    Attributes:
        name: the name of the submodule, and of its weights and KV cache in vLLM. vLLM reads any number between dots as
            the number of a layer, so the name never contains an expert's name from the user.
        owner: the first member that it computes, for messages.
        names: all members that it computes.
        of: the earlier part whose weights it uses.
    """

    name: str
    owner: str
    names: tuple[str, ...]
    member: Member
    source: Source
    adapter: Source | None
    of: str | None = None


def reads_own_prompts(config: ProxyTuneConfig) -> bool:
    """Whether some member of a recipe has a prompt of its own."""
    return any(member.prompt.kind != "raw" for _, member in config.members())


def parts_of(config: ProxyTuneConfig) -> list[Part]:
    """The models of a recipe, the base first."""
    found: dict[tuple[Source, Source | None, Prompt], list[tuple[str, Member]]] = {}
    for name, member in config.members():
        source, _ = member_source(config, name, member)
        found.setdefault((source, adapter_source(config, member), member.prompt), []).append((name, member))
    names = {"base": "base"}
    for number, expert in enumerate(config.expert_list, start=1):
        for side in ("expert", "anti_expert"):
            names[f"{expert.name}.{side}"] = f"{side}{'' if number == 1 else number}"
    parts: list[Part] = []
    for (source, adapter, _), users in found.items():
        of = next((part.name for part in parts if (part.source, part.adapter) == (source, adapter)), None)
        owner, member = users[0]
        parts.append(Part(names[owner], owner, tuple(name for name, _ in users), member, source, adapter, of))
    return parts


def refuse(config: ProxyTuneConfig) -> None:
    """Raise an error if vLLM cannot serve the recipe because of its contents.

    Raises:
        MemberError: for GGUF files, quantization during loading, and members in folders of a hub repository.
    """
    for name, member in config.members():
        source, gguf_file = member_source(config, name, member)
        if gguf_file is not None:
            raise MemberError(
                f"{name} is a GGUF file, which vLLM does not read; name the model's safetensors, or bundle the recipe "
                "(`save_pretrained(directory, bundle=True)`), which writes them"
            )
        if member.quantization_config is not None:
            raise MemberError(
                f"{name} is to be quantized while it is loaded, but vLLM takes quantization from the checkpoint; name "
                "one that is quantized already"
            )
        if source.subfolder:
            raise MemberError(
                f"{name} lies in a folder of a hub repository, where vLLM cannot load it; download the recipe "
                "(`hf download`) and serve the directory"
            )
    if config.text_config is None:
        raise MemberError(
            f"the recipe carries no config of its base, and {config.base_member.model!r} is not on this machine; "
            "download it (`hf download`) first"
        )
