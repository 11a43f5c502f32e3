"""From a recipe to lanes: which members are computed with one set of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.recipe.adapters import judge, read_config
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, adapter_directory, adapter_source, loading_of
from proxytune.recipe.parts import Member, Prompt

__all__ = ["Seat", "group_by_weights", "seats_of"]


@dataclass(frozen=True)
class Seat:
    """One block of rows in a lane: the members it serves, its prompt, and the adapter its rows pass through."""

    names: tuple[str, ...]
    prompt: Prompt
    adapter: str | None = None


def group_by_weights(
    config: ProxyTuneConfig, members: Sequence[tuple[str, Member]], loading: Loading
) -> tuple[list[list[tuple[str, Member]]], dict[str, str]]:
    """Which members use one set of weights.

    Members of one model are a group, whatever their adapters and prompts, unless sharing is turned off or some
    adapter cannot be applied to a part of a batch: then each adapter has a group of its own.

    Returns:
        The groups, and for each member whose adapter stands in the way, why.

    Raises:
        MemberError: for an adapter that cannot be used, see :func:`proxytune.recipe.adapters.judge`.
    """
    same_model: dict[Any, list[tuple[str, Member]]] = {}
    for name, member in members:
        source = None if member.model is None else config.locate(member.model, member.revision)
        placed = (member.gguf_file, member.dtype, repr(member.device_map), repr(member.quantization_config))
        same_model.setdefault((source, *placed), []).append((name, member))

    groups: list[list[tuple[str, Member]]] = []
    reasons: dict[str, str] = {}
    adapters = {name: adapter_source(config, member) for name, member in members}
    apart: dict[str, str | None] = {}
    for name, member in members:
        if (place := adapters[name]) is not None:
            with loading_of(name, member.adapter):
                directory = adapter_directory(name, place, loading, "adapter_config.json")
                apart[name] = judge(read_config(name, directory)).apart
    for group in same_model.values():
        places = sorted({adapters[name] for name, _ in group}, key=str)
        hindered = {n: why for n, _ in group if loading.share and len(places) > 1 and (why := apart.get(n))}
        if len(places) == 1 or (loading.share and not hindered):
            groups.append(group)
        else:
            groups += [[(n, m) for n, m in group if adapters[n] == place] for place in places]
        reasons |= hindered
    return groups, reasons


def seats_of(group: list[tuple[str, Member]], adapters: Mapping[str, str | None]) -> list[Seat]:
    """One seat for each distinct (adapter, prompt): members that agree in both are computed once."""
    seats: dict[tuple[str | None, Prompt], list[str]] = {}
    for name, member in group:
        seats.setdefault((adapters[name], member.prompt), []).append(name)
    return [Seat(tuple(names), prompt, adapter) for (adapter, prompt), names in seats.items()]
