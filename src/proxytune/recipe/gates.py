"""Gates: at which tokens a recipe steers, decided from the base's own probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from proxytune.errors import RecipeError

__all__ = ["FORMS", "Gate", "gate_of", "gate_text"]

Kind = Literal["unsure", "entropy", "kl"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMS = "unsure=P|entropy=NATS|kl=NATS|none"


@dataclass(frozen=True)
class Gate:
    """Where steering applies. A recipe has it as ``{"unsure": 0.9}``, a request as ``"unsure=0.9"``.

    Attributes:
        kind: ``unsure``: where the base's most probable token has a probability below the value (2410.09300).
            ``entropy``: where the base's entropy, in nats, is at least the value (2602.21215).
            ``kl``: everywhere, but no farther than KL(mixture || base) = the value, in nats.
        value: see there; in (0, 1] for ``unsure``, otherwise above 0.
    """

    kind: Kind
    value: float

    def to_json(self) -> dict[str, float]:
        """As a recipe has it."""
        return {self.kind: self.value}

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


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
        said = {kind: _number(text)}
    if not isinstance(said, Mapping) or len(said) != 1:
        raise RecipeError(f"a gate has one condition, {FORMS}, unlike {said!r}")
    ((kind, value),) = said.items()
    if kind not in KINDS:
        raise RecipeError(f"there is no gate {kind!r}; there are {', '.join(KINDS)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (kind == "unsure" and value > 1):
        allowed = "a number above 0 and at most 1" if kind == "unsure" else "a number of nats above 0"
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
