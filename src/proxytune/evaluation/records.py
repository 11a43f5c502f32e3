"""Prediction lines: the fields of each task, reading and checking.

A prediction file is JSON lines, one per sample. A line has its task's fields under the names of the public proxy-tuning
repository (:data:`FIELDS`), so its files can be read too. Our own lines also have ``id``, ``sample`` and ``prompt``.
Unknown fields are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.answers.files import half_surrogate, read_json
from proxytune.errors import ProxyTuneError

__all__ = ["FIELDS", "Line", "Prediction", "parse", "read"]


_CHOICE = {"mc_output": "text", "mc_answer_idx": "text"}
_CODE = {"task_id": "key", "completion": "text"}
# The public repository's DS-1000 files have one line per problem, with all of its samples.
_PUBLIC_DS1000 = {"lib": "text", "problem_id": "key", "output": "texts"}

# Each task's fields and their kinds: text, texts (a list of them), key (text or a whole number), or text in which null
# means the empty text, as pandas writes it.
FIELDS: dict[str, dict[str, str]] = {
    "alpacafarm": {"instruction": "text", "output": "text"},
    "ds1000": _CODE,
    "gsm8k": {"answer": "text", "model_output": "text"},
    "humaneval": _CODE,
    "mbpp": _CODE,
    "realtimeqa": _CHOICE,
    "toxigen": {"prediction": "text"},
    "triviaqa": {"answers": "texts", "output": "text"},
    "truthfulqa_mc": _CHOICE,
    "truthfulqa_open": {"question": "text", "output": "text or null"},
}
_ALIASES = {("alpacafarm", "output"): "output_2", ("truthfulqa_open", "question"): "Question"}


@dataclass(frozen=True)
class Prediction:
    """One sample of one example.

    Attributes:
        id: the example's id: the line's ``id``, otherwise its ``task_id``, otherwise the number of the line.
        sample: its ``sample``, otherwise the number of earlier samples of the example.
        line: its line in the file, from 1; in a JSON list, its entry.
        where: the same in words: ``line 3``.
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
        ProxyTuneError: for a line that is not a JSON object, which it names, or a file without lines.
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
        ProxyTuneError: for a line of another task, for a missing or wrong field (it names line and field), and for two
            lines of one sample.
    """
    found: dict[tuple[str, int], Prediction] = {}
    counts: Counter[str] = Counter()
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
                one = Prediction(str(key), sample, number, where, {**line, **values})
                if (before := found.setdefault((one.id, sample), one)) is not one:
                    raise ProxyTuneError(f"it is sample {sample} of {key!r}, as {before.where} is")
        except ProxyTuneError as error:
            raise ProxyTuneError(f"{where} cannot be scored as {task}: {error}") from None
    if not found:
        raise ProxyTuneError("there are no predictions")
    return list(found.values())


def _spread(task: str, line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A line as lines of one sample each."""
    if task != "ds1000" or "completion" in line or not set(_PUBLIC_DS1000) <= set(line):
        return [line]
    lib, problem, outputs = (_read(name, kind, line[name]) for name, kind in _PUBLIC_DS1000.items())
    kept = {name: value for name, value in line.items() if name != "output"}
    return [{**kept, "task_id": f"{lib}/{problem}", "completion": one} for one in outputs]


def _values(task: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """The task's fields, under their first names."""
    said = line.get("task", task)
    if said != task and said in FIELDS:
        raise ProxyTuneError(f"its field `task` is {said!r}")
    values = {}
    for name, kind in FIELDS[task].items():
        if (there := _find(task, name, line)) is None:
            others = [other for other, names in FIELDS.items() if all(_find(other, one, line) for one in names)]
            hint = f" (it fits {' and '.join(others)})" if others else ""
            raise ProxyTuneError(f"it has no field {name!r}{hint}")
        values[name] = _read(there, kind, line[there])
    return values


def _find(task: str, name: str, line: Mapping[str, Any]) -> str | None:
    """The name of a field in a line."""
    return next((there for there in (name, _ALIASES.get((task, name))) if there in line), None)


def _read(name: str, kind: str, value: Any) -> Any:
    if half_surrogate(value) is not None:
        raise ProxyTuneError(f"its {name!r} contains half a surrogate pair, which is not a character")
    if kind == "texts":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ProxyTuneError(f"its {name!r} is not a list of texts")
        return value
    if kind == "text or null" and value is None:
        return ""
    if kind == "key" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ProxyTuneError(f"its {name!r} is not text")
    return value
