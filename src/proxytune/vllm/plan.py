"""The models that vLLM must load for a recipe, and the recipes that it cannot serve. It needs no vLLM.

In vLLM all members read one sequence of tokens, so two entries of the recipe that name the same weights are one model.
(An anti-expert of several experts is loaded and run once.)
"""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.errors import MemberError, PromptError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import adapter_source, member_source
from proxytune.recipe.parts import Member
from proxytune.recipe.source import Source

__all__ = ["Part", "parts_of", "refuse"]


@dataclass(frozen=True)
class Part:
    """One model of the composite.

    Attributes:
        name: the name of the submodule, and of its weights and KV cache in vLLM. vLLM reads any number between dots as
            the number of a layer, so the name never contains an expert's name from the user.
        owner: the first member that it computes, for messages.
        names: all members that it computes.
    """

    name: str
    owner: str
    names: tuple[str, ...]
    member: Member
    source: Source
    adapter: Source | None


def parts_of(config: ProxyTuneConfig) -> list[Part]:
    """The models of a recipe, the base first."""
    found: dict[tuple[Source, Source | None], list[tuple[str, Member]]] = {}
    for name, member in config.members():
        source, _ = member_source(config, name, member)
        found.setdefault((source, adapter_source(config, member)), []).append((name, member))
    names = {"base": "base"}
    for number, expert in enumerate(config.expert_list, start=1):
        for side in ("expert", "anti_expert"):
            names[f"{expert.name}.{side}"] = f"{side}{'' if number == 1 else number}"
    return [
        Part(names[users[0][0]], users[0][0], tuple(name for name, _ in users), users[0][1], source, adapter)
        for (source, adapter), users in found.items()
    ]


def refuse(config: ProxyTuneConfig) -> None:
    """Raise an error if vLLM cannot serve the recipe because of its contents.

    Raises:
        PromptError: if a member has a prompt of its own.
        MemberError: for GGUF files, quantization during loading, and members in folders of a hub repository.
    """
    for name, member in config.members():
        if member.prompt.kind != "raw":
            raise PromptError(
                f"{name} has a prompt of its own ({member.prompt.kind}), but in vLLM all members read one sequence; "
                "serve this recipe with `proxytune serve` or `transformers serve`"
            )
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
