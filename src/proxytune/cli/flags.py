"""From options classes to flags: a command that takes dataclasses whole, as typer takes it.

A parameter that is annotated with an options class gives way to the class's fields. ``Annotated[Options, {"name":
value}]`` fixes fields: they have that value, and no flag.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

__all__ = ["flat"]


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one parameter a flag; when called it makes the options and hands them over whole."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, dict[str, Any], dict[str, Field[Any]]]] = {}
    taken: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind, fixed = (*get_args(hint), {})[:2] if get_origin(hint) is Annotated else (hint, {})
        if not is_dataclass(kind):
            taken.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        shown = {f"{parameter.name}_{each.name}": each for each in fields(kind) if each.name not in fixed}
        groups[parameter.name] = kind, fixed, shown
        types = get_type_hints(kind)
        taken += [_parameter(name, each, types[each.name]) for name, each in shown.items()]

    def run(**given: Any) -> None:
        for group, (kind, fixed, shown) in groups.items():
            values = {name: given.pop(name) for name in shown}
            said = {
                each.name: _read(each, values[name]) for name, each in shown.items() if values[name] not in (None, [])
            }
            given[group] = kind(**fixed, **said)
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in taken}
    return run


def _off(field: Field[Any]) -> bool:
    """Whether the flag switches off what is on."""
    return field.default is True


def _read(field: Field[Any], given: Any) -> Any:
    """What was given as the field's value."""
    if _off(field):
        return not given
    return field.metadata["parse"](given) if "parse" in field.metadata else given


def _parameter(name: str, field: Field[Any], kind: Any) -> inspect.Parameter:
    """The flag of a field, as a parameter that typer understands."""
    said = dict(field.metadata)
    flags = said.pop("flag", "--" + field.name.replace("_", "-")).split()
    parsed, many = said.pop("parse", None), said.pop("many", False)
    default: Any = None if field.default is MISSING else field.default
    if parsed is not None and default is not None:
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if many:
        kind, default = list[str] | None, None
    elif parsed is not None:
        kind = str | None if default is None else str
    if _off(field):
        default = False
    if field.default is MISSING and field.default_factory is MISSING:
        default = inspect.Parameter.empty
    elif default is None and type(None) not in get_args(kind):
        kind = kind | None
    made = typer.Option(*flags, rich_help_panel=said.pop("panel", None), **said)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])
