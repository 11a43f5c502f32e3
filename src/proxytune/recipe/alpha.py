"""Alpha in every spelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import AlphaError

__all__ = ["finite_alpha", "resolve_alpha", "take_alpha"]

LARGEST_ALPHA = 3.4e38
NAMED = "alpha."  # what an expert's name follows in a call


def finite_alpha(alpha: Any, what: str = "alpha") -> float:
    """Return ``alpha`` as a float; raise :class:`AlphaError` unless it is a finite number."""
    # Bounded by what float32, in which logits are mixed, can hold; and an int may be too long for a float at all.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_ALPHA:
        raise AlphaError(f"{what} must be a finite number, not {alpha!r}")
    return float(alpha)


def resolve_alpha(alpha: Any, names: Sequence[str], default: Sequence[float]) -> tuple[float, ...]:
    """One alpha an expert, in order, from a number, a list in order, a mapping by name, or None for ``default``.

    Raises:
        AlphaError: for a value that is not finite, an unknown name, or a list of the wrong length.
    """
    if alpha is None:
        return tuple(default)
    if isinstance(alpha, Mapping):
        _refuse_unknown(alpha, names)
        alpha = [alpha.get(name, value) for name, value in zip(names, default)]
    elif isinstance(alpha, (list, tuple)):
        _refuse_length(alpha, names)
    else:
        return (finite_alpha(alpha),) * len(names)
    return tuple(finite_alpha(value, f"alpha of expert {name!r}") for name, value in zip(names, alpha))


def take_alpha(arguments: dict[str, Any], names: Sequence[str], alpha: Any = None) -> Any:
    """The alpha of a call that may say ``"alpha.NAME"`` too: some callers can send scalars and flat lists alone.

    Args:
        arguments: the call's others; ``"alpha.NAME"`` are taken out of it.
        names: the experts' names, in the recipe's order.
        alpha: what the call says for all experts, or None. An expert's own goes before it.

    Returns:
        ``alpha`` as it is where no name is said, otherwise a mapping by name.

    Raises:
        AlphaError: for an unknown name, a list of the wrong length, or a tensor beside names.
    """
    named = {key.removeprefix(NAMED): arguments.pop(key) for key in list(arguments) if key.startswith(NAMED)}
    if not named:
        return alpha
    _refuse_unknown(named, names)
    if alpha is None or isinstance(alpha, Mapping):
        return {**(alpha or {}), **named}
    if isinstance(alpha, (list, tuple)):
        _refuse_length(alpha, names)
        return {**dict(zip(names, alpha)), **named}
    if isinstance(alpha, (int, float)):
        return {**dict.fromkeys(names, alpha), **named}
    raise AlphaError(f"beside {NAMED + next(iter(named))!r}, alpha must be a number, a list in order or a mapping")


def _refuse_unknown(given: Mapping[Any, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise AlphaError(f"no expert is called {name!r}; the recipe has {', '.join(names)}")


def _refuse_length(given: Sequence[Any], names: Sequence[str]) -> None:
    if len(given) != len(names):
        raise AlphaError(f"{len(given)} alphas for {len(names)} experts ({', '.join(names)})")
