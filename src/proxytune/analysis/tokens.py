"""What steering did over a set of traces: by class of token, by position, by expert, with intervals.

The shift of a token is its probability in the mixture minus that in the base, as in the paper (2401.08565, section 6).
Means are over tokens. Tokens of one answer are not independent, so intervals resample whole answers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.analysis.explanation import Explanation, base_choice, expert_choice, probability, rise, shift
from proxytune.analysis.terminal import quoted
from proxytune.answers.files import read_yaml
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.statistics import bootstrap_of
from proxytune.tables import Table, interval_cells

__all__ = ["Measured", "TokenClass", "analyze", "load_classes", "measure", "summary_tables"]

SPECIAL, OTHER = "special", "other"  # what the text leaves out, and what is in no class
OWN = {SPECIAL: "tokens that the text leaves out, such as its end", OTHER: "tokens of no class"}
LEFT, RIGHT = "left_hand_side", "right_hand_side"


# -- classes --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TokenClass:
    """A class of tokens.

    Attributes:
        about: a description. pattern: finds its texts. group: the group of the pattern that counts.
    """

    about: str
    pattern: re.Pattern[str]
    group: str | int = 0

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The start and end of each match in a text, in order."""
        return [match.span(self.group) for match in self.pattern.finditer(text)]


def load_classes(more: Path | None = None) -> dict[str, TokenClass]:
    """The classes by name, including those of a file.

    Raises:
        ProxyTuneError: names what is wrong in the file.
        OSError: if it cannot be read.
    """
    own = Path(__file__).with_name("classes.yaml")
    classes: dict[str, TokenClass] = {}
    for path in (own, *([] if more is None else [more])):
        for name, value in _read(path).items():
            if value is None:
                classes.pop(name, None)
            else:
                classes[name] = _class(path, name, value)
    return classes


def _read(path: Path) -> Mapping[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ProxyTuneError(f"{path} holds no classes; write NAME: {{about: ..., pattern: REGEX}}")
    return values


def _class(path: Path, name: str, value: Any) -> TokenClass:
    if name in OWN:
        raise ProxyTuneError(f"{path}: the class {name!r} is built in and has no pattern; choose another name")
    known = {"about", "pattern", "group"}
    if not isinstance(value, Mapping) or not isinstance(value.get("pattern"), str):
        raise ProxyTuneError(f"{path}: the class {name!r} has no pattern that is a text")
    if unknown := [key for key in value if key not in known]:
        raise ProxyTuneError(
            f"{path}: the class {name!r} has an unknown field {unknown[0]!r}; there are about, pattern, group"
        )
    try:
        pattern = re.compile(value["pattern"])
    except re.error as error:
        raise ProxyTuneError(f"{path}: the pattern of {name!r} is not a regular expression: {error}") from error
    group = value.get("group", 0)
    if group != 0 and group not in pattern.groupindex:
        raise ProxyTuneError(f"{path}: the pattern of {name!r} has no group {group!r}")
    return TokenClass(str(value.get("about", name)), pattern, group)


def classes_of(why: Explanation, classes: Mapping[str, TokenClass]) -> list[set[str]]:
    """The classes of each token of an answer."""
    found: list[set[str]] = [set() for _ in why.tokens]
    spans = {name: of.spans(why.text) for name, of in classes.items()}
    for piece in why.pieces:
        start, end = piece.span
        names = {name for name, places in spans.items() if any(a < end and start < b for a, b in places)}
        for at in range(piece.first, piece.first + piece.n_tokens):
            found[at] = {SPECIAL} if piece.special else names or {OTHER}
    return found


# -- numbers --------------------------------------------------------------------------------------------------
Parts = dict[Any, list[float]]  # name of a mean -> its sum and its count


@dataclass(frozen=True)
class Measured:
    """The sums over one answer.

    Attributes:
        parts: the sums over its tokens.
        moved: text -> the shift summed over all places at which it was a candidate.
        written: how often each text was written. experts: the recipe's experts. unknown: number of tokens without a
            shift.
    """

    parts: Parts
    moved: Mapping[str, float]
    written: Counter[str]
    experts: Sequence[str]
    unknown: int


def measure(why: Explanation, classes: Mapping[str, TokenClass]) -> Measured:
    """Sum up an answer's tokens."""
    parts: Parts = defaultdict(lambda: [0.0, 0.0])
    moved: dict[str, float] = defaultdict(float)
    unknown = 0
    for position, (token, names) in enumerate(zip(why.tokens, classes_of(why, classes)), start=1):
        risen = rise(token)
        unknown += risen is None
        for name in (*names, None):
            _add(parts, ("shift", name), risen)
        changed = token.get("changed")
        _add(parts, ("changed", None), changed)
        _add(parts, ("changed", position.bit_length() - 1), changed)
        _add(parts, ("kl", None), token.get("kl"))
        for candidate in token.get("candidates") or ():
            moved[candidate["token"]] += shift(candidate)
        for name in why.alpha:
            _compare(parts, name, token)
    written = Counter(token["token"] for token in why.tokens)
    return Measured(parts, moved, written, list(why.alpha), unknown)


def analyze(
    answers: Iterable[Measured], classes: Mapping[str, TokenClass], *, top: int = 10, seed: int = 0
) -> dict[str, Any]:
    """What steering did over a set of answers, as JSON. Means have the bounds of their 95 % interval, or None instead.

    Args:
        answers: see :func:`measure`. top: the number of promoted and demoted tokens. seed: seed of the bootstrap.
    """
    answers = list(answers)
    each, moved = [of.parts for of in answers], [of.moved for of in answers]
    written = Counter[str]()
    for of in answers:
        written.update(of.written)

    def mean(key: Any) -> dict[str, Any]:
        return _mean([parts[key] for parts in each], seed)

    found: dict[str, Any] = {
        "answers": len(each),
        "tokens": written.total(),
        "unknown": sum(of.unknown for of in answers),
        "shift": mean(("shift", None)),
        "changed": mean(("changed", None)),
        "kl": mean(("kl", None)),
        "classes": {
            name: {"about": about, **mean(("shift", name))}
            for name, about in {**{name: of.about for name, of in classes.items()}, **OWN}.items()
        },
        "left_minus_right": _difference([(parts["shift", LEFT], parts["shift", RIGHT]) for parts in each], seed),
        "positions": [],
        "promoted": [],
        "demoted": [],
        "experts": {},
    }
    last = max((key[1] for parts in each for key in parts if key[0] == "changed" and key[1] is not None), default=-1)
    for power in range(last + 1):
        found["positions"].append({"from": 2**power, "to": 2 ** (power + 1) - 1, **mean(("changed", power))})
    sums: Counter[str] = Counter()
    for shifts in moved:
        sums.update(shifts)
    ordered = sorted(sums, key=lambda text: -sums[text])
    for name, texts in (("promoted", ordered[:top]), ("demoted", ordered[::-1][:top])):
        sign = 1 if name == "promoted" else -1
        for text in (text for text in texts if sign * sums[text] > 0):
            of_answers = _mean([[shifts.get(text, 0.0), 1.0] for shifts in moved], seed)
            found[name].append({"token": text, "written": written[text], **of_answers})
    for name in dict.fromkeys(name for of in answers for name in of.experts):
        differed = mean(("differed", name))
        if differed["tokens"]:
            sides = {side: mean((side, name)) for side in ("base", "expert", "took_expert", "took_base")}
            found["experts"][name] = {"differed": differed, **sides}
    return found


def _add(parts: Parts, key: Any, value: float | None) -> None:
    if value is not None:
        parts[key][0] += value
        parts[key][1] += 1


def _compare(parts: Parts, name: str, token: Mapping[str, Any]) -> None:
    """How sure base and expert are of their own choices if these differ, and which one was written."""
    base, expert = base_choice(token), expert_choice(token, name)
    if base is None or expert is None:
        return
    _add(parts, ("differed", name), base["id"] != expert["id"])
    if base["id"] != expert["id"]:
        _add(parts, ("base", name), probability(base, "base_logprob"))
        _add(parts, ("expert", name), probability(expert["expert_logprob"], name))
        _add(parts, ("took_expert", name), token["id"] == expert["id"])
        _add(parts, ("took_base", name), token["id"] == base["id"])


def _mean(pairs: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """The mean over tokens of (sum, count) pairs, one per answer."""
    sums, counts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    n = int(sum(counts))
    bounds = bootstrap_of(lambda total, count: total / count, [sums, counts], seed) if n else None
    low, high = bounds or (None, None)
    return {"tokens": n, "mean": sum(sums) / n if n else None, "low": low, "high": high}


def _difference(pairs: Sequence[Sequence[Sequence[float]]], seed: int) -> dict[str, Any]:
    """The mean of the first minus that of the second; both are resampled with their answer."""
    columns = [[side[at] for side in sides] for sides in zip(*pairs) for at in (0, 1)]
    if not columns or not sum(columns[1]) or not sum(columns[3]):
        return {"mean": None, "low": None, "high": None}
    bounds = bootstrap_of(lambda a, n, b, m: a / n - b / m, columns, seed)
    low, high = bounds or (None, None)
    mean = sum(columns[0]) / sum(columns[1]) - sum(columns[2]) / sum(columns[3])
    return {"mean": mean, "low": low, "high": high}


# -- tables ---------------------------------------------------------------------------------------------------
def summary_tables(found: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Tables of the result of :func:`analyze` for a set, and of its ``files`` if there are several."""
    about = f": {found['answers']} answers, {found['tokens']} tokens"
    rows: list[tuple[str, ...]] = [("all tokens", str(found["shift"]["tokens"]), *interval_cells(found["shift"]))]
    rows += [
        (_said(name), str(of["tokens"]), *interval_cells(of)) for name, of in found["classes"].items() if of["tokens"]
    ]
    difference = found["left_minus_right"]
    if difference["mean"] is not None:
        rows.append(("left minus right hand side", "", *interval_cells(difference)))
    notes = [
        "Shift: a written token's probability in the mixture minus that in the base. Intervals draw whole answers."
    ]
    if found["unknown"]:
        notes.append(f"{found['unknown']} tokens whose probability is not recorded have no shift.")
    legend = {_said(name): of["about"] for name, of in found["classes"].items()}
    tables = [
        Table(("class", "tokens", "mean shift", "95 % interval"), rows, "Shift by class", about, (0,), legend, notes)
    ]
    rows = [("all", str(found["changed"]["tokens"]), *interval_cells(found["changed"], 100))]
    for of in found["positions"]:
        rows.append((_range(of), str(of["tokens"]), *interval_cells(of, 100)))
    heads: tuple[str, ...] = ("token of the answer", "tokens", "changed, %", "95 % interval")
    tables.append(Table(heads, rows, "Changed choices by position", bold=(0,)))
    for name in ("promoted", "demoted"):
        rows = [(quoted(of["token"]), str(of["written"]), *interval_cells(of)) for of in found[name]]
        note = "Per answer: probability in the mixture minus that in the base, over all places."
        heads = ("token", "written", "per answer", "95 % interval")
        tables.append(Table(heads, rows, f"Most {name} tokens", notes=[note] if rows else ["None."]))
    rows = []
    for name, of in found["experts"].items():
        for what, key in EXPERT_ROWS.items():
            rows.append((name, what, str(of[key]["tokens"]), *interval_cells(of[key])))
    if rows:
        heads = ("expert", "where base and expert choose differently", "tokens", "mean", "95 % interval")
        tables.append(Table(heads, rows, "Base and experts"))
    if len(files) > 1:
        heads = ("file", "answers", "tokens", "mean shift", "interval", "changed, %", "left", "right", "left − right")
        rows = [
            (
                name,
                str(of["answers"]),
                str(of["tokens"]),
                *interval_cells(of["shift"]),
                interval_cells(of["changed"], 100)[0],
                *(interval_cells(of["classes"].get(side, NOTHING))[0] for side in (LEFT, RIGHT)),
                interval_cells(of["left_minus_right"])[0],
            )
            for name, of in files.items()
        ]
        tables.append(Table(heads, rows, "Files"))
    return tables


EXPERT_ROWS = {
    "share of all tokens": "differed",
    "probability of the base's own best": "base",
    "probability of the expert's own best": "expert",
    "the expert's best was written": "took_expert",
    "the base's best was written": "took_base",
}
NOTHING = {"mean": None, "low": None, "high": None}


def _range(of: Mapping[str, Any]) -> str:
    return f"{of['from']} to {of['to']}" if of["to"] > of["from"] else str(of["from"])


def _said(name: str) -> str:
    return name.replace("_", " ")
