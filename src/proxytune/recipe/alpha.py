"""Alpha in every spelling: in recipes, calls, requests and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import AlphaError

__all__ = [
    "MAX_ALPHA",
    "NAMED",
    "alpha_of_text",
    "alpha_range",
    "alpha_rows",
    "finite_alpha",
    "resolve_alpha",
    "take_alpha",
]

LARGEST_ALPHA = 3.4e38
MAX_ALPHA = 3.0  # of traces: the flips of a choice are searched up to this alpha
NAMED = "alpha."  # prefix of an expert's name in a call


def finite_alpha(alpha: Any, what: str = "alpha") -> float:
    """Return ``alpha`` as a float; raise :class:`AlphaError` unless it is a finite number."""
    # The limit is that of float32, in which logits are mixed. An int may also be too large for any float.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_ALPHA:
        raise AlphaError(f"{what} must be a finite number, not {alpha!r}")
    return float(alpha)


def alpha_rows(
    alpha: Any, names: Sequence[str], default: Sequence[float], n_rows: int | None
) -> list[tuple[float, ...]]:
    """One alpha per expert for each row, from all accepted forms.

    Args:
        alpha: a number for all experts; a list in the recipe's order or, with one expert, with one value per row; a
            list of such lists, one per row; a mapping from an expert's name to a number or to one value per row;
            tensors and arrays of these shapes; None for ``default``.
        names: the experts' names, in order. default: the recipe's alphas; experts that a mapping leaves out keep them.
        n_rows: the rows of the batch; None for a single text, for which values per row are refused.

    Raises:
        AlphaError: for a value that is not finite, an unknown name, a shape that fits neither rows nor experts, or any
            value if there are no experts.
    """
    n = n_rows or 1
    if alpha is None:
        return [tuple(default)] * n
    if not names:
        if _plain(alpha) not in ([], {}, [[]], [[]] * n):
            raise AlphaError("there are no experts, so alpha would change nothing; leave it out")
        return [()] * n
    if isinstance(alpha, Mapping):
        _refuse_unknown(alpha, names)
        given = [(name, _plain(alpha.get(name, value))) for name, value in zip(names, default)]
        return list(zip(*(_column(value, name, n_rows) for name, value in given)))
    alpha = _plain(alpha)
    if not isinstance(alpha, (list, tuple)):
        return [(finite_alpha(alpha),) * len(names)] * n
    if n_rows is None or not any(isinstance(row, (list, tuple)) for row in alpha):
        if len(alpha) == len(names):
            return [_row(alpha, names)] * n
        if len(names) == 1 and len(alpha) == n_rows:
            return list(zip(_column(alpha, names[0], n_rows)))
        raise _wrong_length(alpha, names, n)
    widths = {len(row) if isinstance(row, (list, tuple)) else 0 for row in alpha}
    if len(alpha) not in (1, n_rows) or widths not in ({1}, {len(names)}):
        raise AlphaError(
            f"alpha must have {n_rows} rows of one value for each of {len(names)} experts ({', '.join(names)}), "
            f"not {alpha!r}"
        )
    found = [_row(list(row) * (len(names) // len(row)), names) for row in alpha]
    return found * (n_rows // len(found))


def resolve_alpha(alpha: Any, names: Sequence[str], default: Sequence[float]) -> tuple[float, ...]:
    """One alpha per expert for a single text; see :func:`alpha_rows`."""
    return alpha_rows(alpha, names, default, None)[0]


def alpha_of_text(given: Sequence[str] | None) -> float | Mapping[str, float] | None:
    """Alpha from words of a command line: ``0.5``, or ``NAME=0.5`` per expert; None if nothing was given."""
    if not given:
        return None
    named: dict[str, float] = {}
    for text in given:
        name, number = _split(text)
        try:
            value = float(number)
        except ValueError as error:
            raise AlphaError(f"alpha must be a number or NAME=NUMBER, not {text!r}") from error
        if name is None and len(given) > 1:
            raise AlphaError("give one alpha for all experts, or NAME=NUMBER for each")
        if name is None:
            return value
        named[name] = value
    return named


def alpha_range(text: str) -> tuple[str | None, list[float]]:
    """Read ``[NAME=]START:STOP:STEP`` (both ends belong to it) or ``[NAME=]A,B,…``: the expert's name, the alphas.

    Raises:
        AlphaError: if it is neither, or has no alphas, or more than two hundred.
    """
    name, numbers = _split(text)
    wrong = AlphaError(f"--alpha is START:STOP:STEP, such as 0:2:0.25, or numbers, such as 0,0.5,1, not {text!r}")
    try:
        if ":" in numbers:
            start, stop, step = (float(part) for part in numbers.split(":"))
            count = (stop - start) / step
            if count < 0:
                wrong = AlphaError(f"--alpha {text!r} has no alphas: STOP lies before START, in the direction of STEP")
            if not 0 <= count < 200:
                raise wrong
            values = [round(start + step * at, 10) for at in range(int(count + 1e-6) + 1)]
        else:
            values = [float(part) for part in numbers.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    if not all(abs(value) < 1e6 for value in values):
        raise wrong
    return name, sorted(dict.fromkeys(values))


def _split(text: str) -> tuple[str | None, str]:
    """``NAME=NUMBERS``: the name, None where there is none, and the text of the numbers."""
    name, equals, numbers = text.rpartition("=")
    return (name.strip() if equals else None), numbers


def take_alpha(arguments: dict[str, Any], names: Sequence[str], alpha: Any = None) -> Any:
    """The alpha of a call that may also use ``"alpha.NAME"``, for callers that can send only scalars and flat lists.

    ``"alpha.NAME"`` are removed from the call's other ``arguments``, and override ``alpha``, which is for all experts.
    If there are any, the result is a mapping by name, otherwise it is ``alpha`` unchanged.

    Raises:
        AlphaError: for an unknown name, a list of the wrong length, or a tensor together with names.
    """
    named = {key.removeprefix(NAMED): arguments.pop(key) for key in list(arguments) if key.startswith(NAMED)}
    if not named:
        return alpha
    _refuse_unknown(named, names)
    if alpha is None or isinstance(alpha, Mapping):
        return {**(alpha or {}), **named}
    if isinstance(alpha, (list, tuple)):
        if len(alpha) != len(names):
            raise _wrong_length(alpha, names)
        return {**dict(zip(names, alpha)), **named}
    if isinstance(alpha, (int, float)):
        return {**dict.fromkeys(names, alpha), **named}
    raise AlphaError(
        f"together with {NAMED + next(iter(named))!r}, alpha must be a number, a list in order or a mapping"
    )


def _plain(value: Any) -> Any:
    """Tensors and arrays as numbers and lists of them."""
    return value.tolist() if hasattr(value, "tolist") else value


def _row(values: Sequence[Any], names: Sequence[str]) -> tuple[float, ...]:
    return tuple(finite_alpha(value, f"alpha of expert {name!r}") for name, value in zip(names, values))


def _column(value: Any, name: str, n_rows: int | None) -> list[float]:
    """One expert's alpha for each row."""
    values = value if n_rows is not None and isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, n_rows or 1):
        raise AlphaError(f"alpha of {name!r} must be a number or {n_rows} values, one per row")
    return [finite_alpha(each, f"alpha of expert {name!r}") for each in values] * ((n_rows or 1) // len(values))


def _refuse_unknown(given: Mapping[Any, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise AlphaError(f"no expert is called {name!r}; the recipe has {', '.join(names)}")


def _wrong_length(given: Sequence[Any], names: Sequence[str], n_rows: int = 1) -> AlphaError:
    rows = f" or {n_rows} rows" if n_rows > 1 else ""
    alphas = "1 alpha" if len(given) == 1 else f"{len(given)} alphas"
    experts = "1 expert" if len(names) == 1 else f"{len(names)} experts"
    return AlphaError(f"{alphas} for {experts} ({', '.join(names)}){rows}")
