"""How an option is declared: a field of a frozen dataclass, with its help and details for the command line.

The command line (:mod:`proxytune.cli.flags`) is generated from these fields. This module does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from proxytune.errors import ProxyTuneError

__all__ = ["Options", "TooSmall", "numbers", "option", "words"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The base of options classes: no number lies below the ``min`` of its field.

    Raises:
        TooSmall: if one does.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least, value = field.metadata.get("min"), getattr(self, field.name)
            if least is not None and value is not None and value < least:
                raise TooSmall(field, value, field.name)


class TooSmall(ProxyTuneError):
    """The number in a field is below its ``min``. ``name`` is the field's name, or its flag on the command line."""

    def __init__(self, field: dataclasses.Field[Any], value: Any, name: str) -> None:
        super().__init__(f"{name} must be at least {field.metadata['min']}, not {value!r}")
        self.field, self.value = field, value


def option(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """A field with its help.

    Args:
        default: leave it out if the option is required; a function is called for each default.
        help: what the option does, in a sentence.
        **more: flag (``--name``, or ``--name -n``; the field's name by default; ``--no-…`` switches off what is on),
            metavar, panel (its heading in the help), min (see :class:`Options`), envvar, hidden, many (may be given
            several times), and parse, which turns the given text or texts into the field's value.
    """
    unknown = more.keys() - {"flag", "metavar", "panel", "min", "envvar", "hidden", "many", "parse"}
    if unknown:
        raise TypeError(f"option() takes no {', '.join(unknown)}")
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"help": help, **more})


def words(text: str) -> tuple[str, ...]:
    """``a,b``: the parts between the commas."""
    return tuple(part.strip() for part in text.split(","))


def numbers(flag: str, example: str, kind: type = int) -> Callable[[str], tuple[Any, ...]]:
    """A parser for ``1,16``. The ``flag`` and an ``example`` are used in its error message."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise ProxyTuneError(f"{flag} is numbers, such as {example}, not {text!r}") from error

    return read
