"""Gates: at which tokens a recipe steers, decided from the base's own probabilities or from the place in the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from proxytune.errors import RecipeError

__all__ = ["FORMS", "Gate", "gate_of", "gate_text"]

Kind = Literal["unsure", "entropy", "kl", "bet", "warmup", "decay", "cycle", "between"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCHEDULES: tuple[Kind, ...] = ("warmup", "decay", "cycle", "between")
FORMS = "unsure=P|entropy=NATS|kl=NATS|bet=C|warmup=N|decay=N|cycle=N|between=START...END|none"
DOTS = "..."  # between the two texts of "between", where a gate is one text


@dataclass(frozen=True)
class Gate:
    """Where steering applies. A recipe has it as ``{"unsure": 0.9}``, a request as ``"unsure=0.9"``.

    Attributes:
        kind: ``unsure``: where the base's most probable token has a probability below the value (2410.09300).
            ``entropy``: where the base's entropy, in nats, is at least the value (2602.21215).
            ``kl``: everywhere, but no farther than KL(mixture || base) = the value, in nats.
            ``bet``: a token drawn from the base stays if the base gives it at least the largest probability of the
            mixture minus the value; otherwise one is drawn from the mixture (2604.16146).
            ``warmup``: ever more, and fully from the answer's token number N on; ``decay``: ever less, and no more
            after N tokens; ``cycle``: N tokens with and N tokens without, in turn (2510.09354).
            ``between``: only after the model has written one text, and until it has written another.
        value: a number in (0, 1] for ``unsure``, in [0, 1) for ``bet``, above 0 for ``entropy`` and ``kl``; a whole
            number of tokens; or the two texts, of which one may be empty: from the beginning, or to the end.
    """

    kind: Kind
    value: float | tuple[str, str]

    @property
    def scheduled(self) -> bool:
        """Whether it depends on the text of the answer alone, and not on any probability."""
        return self.kind in SCHEDULES

    @property
    def early(self) -> bool:
        """Whether it is known before the experts have read the token before."""
        return self.scheduled or self.kind in ("unsure", "entropy")

    @property
    def number(self) -> float:
        """The value of every kind but ``between``."""
        assert not isinstance(self.value, tuple)
        return self.value

    @property
    def texts(self) -> tuple[str, str]:
        """The value of ``between``."""
        assert isinstance(self.value, tuple)
        return self.value

    def to_json(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {self.kind: list(self.value) if isinstance(self.value, tuple) else self.value}

    def __str__(self) -> str:
        told = DOTS.join(self.value) if isinstance(self.value, tuple) else f"{self.value:g}"
        return f"{self.kind}={told}"


def gate_of(said: Any) -> Gate | None:
    """A gate in any spelling: an object with one field, ``"kind=value"``, a :class:`Gate`; ``None`` or ``"none"``.

    Raises:
        RecipeError: for anything else.
    """
    if said is None or isinstance(said, Gate):
        return said
    if said == "none":
        return None
    if isinstance(said, str):
        kind, _, text = said.partition("=")
        said = {kind: _texts(text) if kind == "between" else _number(text)}
    if not isinstance(said, Mapping) or len(said) != 1:
        raise RecipeError(f"a gate has one condition, {FORMS}, unlike {said!r}")
    ((kind, value),) = said.items()
    if kind not in KINDS:
        raise RecipeError(f"there is no gate {kind!r}; there are {', '.join(KINDS)}")
    if kind == "between":
        fits = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)
        if not fits or not any(value):
            raise RecipeError(
                f"the gate between needs two texts, START{DOTS}END, of which one may be empty, not {value!r}"
            )
        return Gate(kind, (value[0], value[1]))
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fits, allowed = {
        "unsure": (number and 0 < value <= 1, "a number above 0 and at most 1"),
        "bet": (number and 0 <= value < 1, "a number of at least 0 and below 1"),
        "entropy": (number and value > 0, "a number of nats above 0"),
        "kl": (number and value > 0, "a number of nats above 0"),
    }.get(kind, (number and value >= 1 and value == int(value), "a whole number of tokens, 1 or more"))
    if not fits:
        raise RecipeError(f"the gate {kind} needs {allowed}, not {value!r}")
    return Gate(kind, float(value))


def gate_text(text: str) -> str:
    """Check a gate on a command line, and leave it as it is: ``none`` switches off a recipe's gate."""
    gate_of(text)
    return text


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _texts(text: str) -> Any:
    start, dots, end = text.partition(DOTS)
    return (start, end) if dots else text
