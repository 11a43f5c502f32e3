"""Prediction lines: what a task's line holds, read and checked.

A prediction file is JSON lines, one a sample. A line has its task's fields under the names of the public proxy-tuning
repository (:data:`FIELDS`), so its files can be read too. Lines of ours also say ``id``, ``sample`` and ``prompt``.
Fields that a task does not know are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.answers.files import half_surrogate, read_json
from proxytune.errors import ProxyTuneError

__all__ = ["FIELDS", "Field", "Line", "Prediction", "parse", "read"]


@dataclass(frozen=True)
class Field:
    """A field that a task's line must have.

    Attributes:
        aliases: other names that it may go by.
        kind: ``text``, ``texts`` (a list of them), or ``key`` (text or a whole number).
        null: whether null stands for the empty text, as pandas writes it.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str = "text"
    null: bool = False

    def find(self, line: Mapping[str, Any]) -> str | None:
        """The name that a line has it under."""
        return next((name for name in (self.name, *self.aliases) if name in line), None)

    def read(self, line: Mapping[str, Any]) -> Any:
        """Its value in a line that has it.

        Raises:
            ProxyTuneError: if it is of another kind.
        """
        name = self.find(line)
        assert name is not None
        value = line[name]
        if value is None and self.null:
            return ""
        if half_surrogate(value) is not None:
            raise ProxyTuneError(f"its {name!r} has half a surrogate pair, which is no character")
        if self.kind == "texts":
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return value
            raise ProxyTuneError(f"its {name!r} is not a list of texts")
        if self.kind == "key" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise ProxyTuneError(f"its {name!r} is not text")
        return value


_CHOICE = (Field("mc_output"), Field("mc_answer_idx"))
_CODE = (Field("task_id", kind="key"), Field("completion"))
# The public repository's DS-1000 files have one line a problem, with all of its samples.
_PUBLIC_DS1000 = (Field("lib"), Field("problem_id", kind="key"), Field("output", kind="texts"))

FIELDS: dict[str, tuple[Field, ...]] = {
    "alpacafarm": (Field("instruction"), Field("output", ("output_2",))),
    "ds1000": _CODE,
    "gsm8k": (Field("answer"), Field("model_output")),
    "humaneval": _CODE,
    "mbpp": _CODE,
    "realtimeqa": _CHOICE,
    "toxigen": (Field("prediction"),),
    "triviaqa": (Field("answers", kind="texts"), Field("output")),
    "truthfulqa_mc": _CHOICE,
    "truthfulqa_open": (Field("question", ("Question",)), Field("output", null=True)),
}


@dataclass(frozen=True)
class Prediction:
    """One sample of one example.

    Attributes:
        id: of the example: the line's ``id``, else its ``task_id``, else the number of the line.
        sample: its ``sample``, else how many of the example came before.
        line: where it stands in the file, from 1; in a JSON list, which entry it is.
        where: the same for people: ``line 3``.
        fields: the whole line, with the task's fields under their first names.
    """

    id: str
    sample: int
    line: int
    where: str
    fields: dict[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class Line(dict[str, Any]):
    """A line of a prediction file; ``number`` and ``where`` are its place, as answers.files.Row has them."""

    number: int
    where: str


def read(path: str | Path) -> list[Line]:
    """The lines of a prediction file, or the entries of a JSON list.

    Raises:
        ProxyTuneError: for a line that is no JSON object (it is named), or a file without any.
        OSError: if it cannot be read.
    """
    found = []
    for row in read_json(Path(path)):
        if not isinstance(row.value, dict):
            raise ProxyTuneError(f"{row.where} of {path}: it is not a JSON object")
        found.append(Line(row.value))
        found[-1].number, found[-1].where = row.number, row.where
    if not found:
        raise ProxyTuneError(f"{path} holds no predictions")
    return found


def parse(task: str, lines: Iterable[Mapping[str, Any]]) -> list[Prediction]:
    """Lines of a task as predictions, in order.

    Raises:
        ProxyTuneError: for a line of another task, one that lacks a field or has a wrong one (both named), and for two
            lines of one sample.
    """
    found: list[Prediction] = []
    counts: Counter[str] = Counter()
    first: dict[tuple[str, int], str] = {}
    for at, raw in enumerate(lines, start=1):
        number, where = (raw.number, raw.where) if isinstance(raw, Line) else (at, f"line {at}")
        try:
            for line in _spread(task, raw):
                values = _values(task, line)
                key = line.get("id", values.get("task_id", str(number)))
                if isinstance(key, bool) or not isinstance(key, (str, int)):
                    raise ProxyTuneError("its 'id' is not text")
                sample = line.get("sample", counts[str(key)] if "id" not in line or "task_id" in values else 0)
                if isinstance(sample, bool) or not isinstance(sample, int) or sample < 0:
                    raise ProxyTuneError("its 'sample' is not a whole number from 0 on")
                counts[str(key)] += 1
                if (before := first.setdefault((str(key), sample), where)) != where or len(found) >= len(first):
                    raise ProxyTuneError(f"it is sample {sample} of {key!r}, as {before} is")
                found.append(Prediction(str(key), sample, number, where, {**line, **values}))
        except ProxyTuneError as error:
            raise ProxyTuneError(f"{where} cannot be scored as {task}: {error}") from None
    if not found:
        raise ProxyTuneError("there are no predictions")
    return found


def _spread(task: str, line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A line as lines of one sample each."""
    if task != "ds1000" or "completion" in line or any(one.find(line) is None for one in _PUBLIC_DS1000):
        return [line]
    lib, problem, outputs = (one.read(line) for one in _PUBLIC_DS1000)
    kept = {name: value for name, value in line.items() if name != "output"}
    return [{**kept, "task_id": f"{lib}/{problem}", "completion": one} for one in outputs]


def _values(task: str, line: Mapping[str, Any]) -> dict[str, Any]:
    said = line.get("task", task)
    if said != task and said in FIELDS:
        raise ProxyTuneError(f"it says that it is of {said}")
    for one in FIELDS[task]:
        if one.find(line) is None:
            others = [name for name, fields in FIELDS.items() if all(other.find(line) for other in fields)]
            hint = f" (it fits {' and '.join(others)})" if others else ""
            raise ProxyTuneError(f"it has no field {one.name!r}{hint}")
    return {one.name: one.read(line) for one in FIELDS[task]}
