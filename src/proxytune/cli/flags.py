"""From options classes to flags: a command that takes dataclasses whole, as typer takes it.

A parameter that is annotated with an options class gives way to the class's fields. With
``Annotated[Options, only("name", …)]`` those have flags, and the others their defaults. A field that is itself an
options class gives way to its own fields, whose flags begin with its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

__all__ = ["flat", "only"]


def only(*names: str) -> frozenset[str]:
    """The fields of an options class that a command has flags for."""
    return frozenset(names)


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one parameter a flag; when called it makes the options and hands them over whole."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    taken: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind, shown = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if is_dataclass(kind):
            groups[parameter.name] = kind
            taken += _parameters(kind, parameter.name, shown)
        else:
            taken.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        made = {name: _made(kind, name, given) for name, kind in groups.items()}
        command(**given, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in taken}
    return run


def _parameters(
    kind: Any, name: str, shown: frozenset[str] | None = None, outer: Field[Any] | None = None
) -> Iterator[inspect.Parameter]:
    """The flags of an options class; as parameters their names follow ``name``. ``outer`` is the field it is in."""
    types = get_type_hints(kind)
    for field in fields(kind):
        if _nested(field, types):
            yield from _parameters(types[field.name], f"{name}_{field.name}", outer=field)
        elif shown is None or field.name in shown:
            yield _parameter(f"{name}_{field.name}", field, types[field.name], outer)


def _made(kind: Any, name: str, given: dict[str, Any]) -> Any:
    """The options, of what typer was given for them; what was not given has its default."""
    types, values = get_type_hints(kind), {}
    for field in fields(kind):
        own = f"{name}_{field.name}"
        if _nested(field, types):
            values[field.name] = _made(types[field.name], own, given)
        elif (value := given.pop(own, None)) not in (None, []):
            parse = field.metadata.get("parse", lambda value: value)
            values[field.name] = not value if _off(field) else parse(value)
    return kind(**values)


def _nested(field: Field[Any], types: Mapping[str, Any]) -> bool:
    return is_dataclass(types[field.name]) and "parse" not in field.metadata


def _off(field: Field[Any]) -> bool:
    """Whether the flag switches off what is on."""
    return field.default is True


def _parameter(name: str, field: Field[Any], kind: Any, outer: Field[Any] | None) -> inspect.Parameter:
    """The flag of a field, as a parameter that typer understands."""
    said = dict(field.metadata)
    flags = said.pop("flag", "--" + field.name.replace("_", "-")).split()
    if outer is not None:
        member = outer.name.replace("_", "-")
        flags = [f"--{member}-{flag.removeprefix('--')}" for flag in flags] or [f"--{member}"]
        said["help"] = said["help"].replace("MEMBER", member) or outer.metadata["help"]
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
