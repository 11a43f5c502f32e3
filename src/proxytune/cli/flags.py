"""From options classes to flags: commands take whole dataclasses, and typer gets one parameter per flag.

A parameter that is annotated with an options class is replaced by the class's fields. With
``Annotated[Options, only("name", …)]`` only those have flags, and the others have their defaults. A field that is
itself an options class is replaced by its own fields, whose flags begin with its name. A parameter that is annotated
with :class:`Settings` adds ``--config`` and ``--print-config``; one with :class:`Given` adds no flag. Every command
gets ``--quiet`` and ``--verbose``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from proxytune.cli.command import flag_of, option_names
from proxytune.cli.shared import talking
from proxytune.options import Options, TooSmall

__all__ = ["Given", "Settings", "flat", "only"]


class Settings(dict[str, Any]):
    """All options of a call, by the names that ``--config`` reads and ``--print-config`` prints."""


class Given(dict[str, list[str]]):
    """The options on the command line: flag -> the words that repeat it."""


def only(*names: str) -> frozenset[str]:
    """The fields of an options class that a command has flags for."""
    return frozenset(names)


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one parameter per flag. It builds the options objects and passes them to the original
    command."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    taken: list[inspect.Parameter] = []
    settings = words = ""  # the parameters that take them
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind, shown = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if is_dataclass(kind):
            groups[parameter.name] = kind
            taken += _parameters(kind, parameter.name, shown)
        elif kind is Settings:
            settings = parameter.name
            taken += [_added("config", CONFIG, Path | None, None), _added("print_config", PRINT_CONFIG)]
        elif kind is Given:
            words = parameter.name
        else:
            taken.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))
    takes_context = any(each.annotation is typer.Context for each in taken)  # its other options are for another program
    taken += [] if takes_context else [_added("quiet", QUIET), _added("verbose", VERBOSE)]
    if settings or words:
        taken.append(inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    def run(**given: Any) -> None:
        with talking(quiet=given.pop("quiet", False), verbose=given.pop("verbose", False)):
            context = given.pop("_context", None)
            if words:
                given[words] = _given(context)
            if settings:
                given.pop("config")
                asked = _settings(context.command, given)
                given[settings] = asked
            printed = given.pop("print_config", False)
            made = {name: _made(kind, name, given) for name, kind in groups.items()}
            if printed:
                import yaml

                typer.echo(yaml.safe_dump(dict(asked), sort_keys=False, allow_unicode=True), nl=False)
            else:
                command(**given, **made)

    run.__name__ = command.__name__
    # Examples keep their lines: a paragraph that begins with \\b is printed as it is.
    run.__doc__ = inspect.cleandoc(command.__doc__ or "").replace("Examples:\n\n", "Examples:\n\n\b\n")
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in taken}
    return run


QUIET: Any = typer.Option("--quiet", "-q", help="Print results and errors only.")
VERBOSE: Any = typer.Option(
    "--verbose", "-v", help="Also print what the libraries report, and where an error comes from."
)
CONFIG: Any = typer.Option(
    "--config",
    metavar="FILE",
    help="Take options from a YAML or JSON file, or from the manifest of a run. Options on the command line come "
    "first.",
)
PRINT_CONFIG: Any = typer.Option("--print-config", help="Print all options as such a file and exit.")


def _added(name: str, option: Any, kind: Any = bool, default: Any = False) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _given(context: Any) -> Given:
    """The options on the command line, as :class:`Given`."""
    found = Given()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.param_type_name == "option" and source is not None and source.name == "COMMANDLINE":
            name, value = flag_of(parameter), context.params[parameter.name]
            values = value if isinstance(value, (list, tuple)) else [value]
            found[name] = [name] if value is True else [word for each in values for word in (name, str(each))]
    return found


def _settings(command: Any, given: Mapping[str, Any]) -> Settings:
    """All options, including defaults, as plain values."""
    said = Settings()
    for name, parameter in option_names(command).items():
        value = given.get(parameter.name)
        if value in (None, []):
            continue
        if isinstance(value, bool):
            said[name] = value != any(flag.startswith("--no-") for flag in parameter.opts)
        else:
            said[name] = value if isinstance(value, (int, float, str, list)) else str(value)
    return said


def _parameters(
    kind: Any, name: str, shown: frozenset[str] | None = None, outer: Field[Any] | None = None
) -> Iterator[inspect.Parameter]:
    """The flags of an options class. Parameter names begin with ``name``. ``outer`` is the field that holds the
    class."""
    types = get_type_hints(kind)
    for field in fields(kind):
        if "min" in field.metadata and not issubclass(kind, Options):
            raise TypeError(f"{kind.__name__}.{field.name} has a min, so the class must derive from Options")
        if _nested(field, types):
            yield from _parameters(types[field.name], f"{name}_{field.name}", outer=field)
        elif shown is None or field.name in shown:
            yield _parameter(f"{name}_{field.name}", field, types[field.name], outer)


def _made(kind: Any, name: str, given: dict[str, Any]) -> Any:
    """Build the options from typer's values; options that are not given have their defaults."""
    types, values = get_type_hints(kind), {}
    for field in fields(kind):
        own = f"{name}_{field.name}"
        if _nested(field, types):
            values[field.name] = _made(types[field.name], own, given)
        elif (value := given.pop(own, None)) not in (None, []):
            parse = field.metadata.get("parse", lambda value: value)
            values[field.name] = not value if _off(field) else parse(value)
    try:
        return kind(**values)
    except TooSmall as error:
        raise TooSmall(error.field, error.value, _flags(error.field)[0]) from None


def _flags(field: Field[Any]) -> list[str]:
    """The flags of a field, the long one first."""
    flags: str = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
    return flags.split()


def _nested(field: Field[Any], types: Mapping[str, Any]) -> bool:
    return is_dataclass(types[field.name]) and "parse" not in field.metadata


def _off(field: Field[Any]) -> bool:
    """Whether the flag switches off something that is on by default."""
    return field.default is True


def _parameter(name: str, field: Field[Any], kind: Any, outer: Field[Any] | None) -> inspect.Parameter:
    """The flag of a field, as a parameter for typer."""
    said, flags = dict(field.metadata), _flags(field)
    said.pop("flag", None)
    if outer is not None:
        member = outer.name.replace("_", "-")
        flags = [f"--{member}-{flag.removeprefix('--')}" for flag in flags] or [f"--{member}"]
        said["help"] = said["help"].replace("MEMBER", member) or outer.metadata["help"]
    said.pop("min", None)  # the class itself looks at it
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
