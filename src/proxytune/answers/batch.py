"""Jobs of many prompts: JSON lines in, JSON lines out, in order. A killed job can be continued.

Each result names its input line (``line``, counted from 1) and its settings (``run``). A batch of results is written
and synced to disk before the next one starts. So after a kill at any moment the output holds complete results in order,
and at most one incomplete line at its end. That line is removed when the job continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proxytune.answers.files import Row, half_surrogate, json_rows
from proxytune.answers.generation import Answer
from proxytune.answers.journal import Journal
from proxytune.errors import ProxyTuneError
from proxytune.recipe.alpha import resolve_alpha, take_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.parts import refuse_negative

__all__ = ["Item", "Output", "fingerprint", "read_items", "result"]

RESULT_FIELDS = ("line", "text", "tokens", "finish", "run", "certified", "tv_bound", "calls", "way")


@dataclass(frozen=True)
class Item:
    """One prompt of a job.

    Attributes:
        line: its place in the input, from 1: the number of its line, or of its entry in a JSON list.
        alphas: one value per expert, in the recipe's order.
        negative_prompt: used instead of the recipe's; None for the recipe's.
        extra: other fields of its line, which are copied to the result.
        where: its place in words, ``line 3``; "" if it was not read from a file.
    """

    line: int
    prompt: str
    alphas: tuple[float, ...]
    negative_prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def read_items(
    lines: Iterable[bytes], names: Sequence[str], default: Sequence[float], negative_prompt: str | None = None
) -> tuple[list[Item], list[Row]]:
    """Read ``{"prompt": ..., "alpha": ..., ...}`` lines, or one JSON list of such objects.

    Blank lines are skipped. Broken lines are returned separately.

    Args:
        names: the recipe's experts. A line may also set their alphas as ``"alpha.NAME"``.
        default: their alphas, if a line gives none.
        negative_prompt: used if a line gives none.
    """
    items, broken = [], []
    for row in json_rows(lines, finite=True):
        try:
            items.append(_item(row, names, default, negative_prompt))
        except ProxyTuneError as error:
            broken.append(replace(row, value=None, broken=str(error)))
    return items, broken


def _item(row: Row, names: Sequence[str], default: Sequence[float], negative_prompt: str | None) -> Item:
    value = row.value
    if row.broken is not None:
        raise ProxyTuneError(row.broken)
    if not isinstance(value, dict):
        raise ProxyTuneError('it is not an object with a "prompt"')
    if not isinstance(value.get("prompt"), str):
        raise ProxyTuneError('its "prompt" is missing or is not a string')
    if not value["prompt"].strip():
        raise ProxyTuneError("the prompt is empty")
    if half_surrogate(value["prompt"]) is not None:
        raise ProxyTuneError("the prompt contains half a surrogate pair, which is not a character")
    if taken := [name for name in RESULT_FIELDS if name in value]:
        raise ProxyTuneError(f"its field {taken[0]!r} is one of the result's own; rename it")
    prompt, alpha = value.pop("prompt"), take_alpha(value, names, value.pop("alpha", None))
    negative = value.pop("negative_prompt", None)
    if negative is not None:
        refuse_negative(negative)
    alphas = resolve_alpha(alpha, names, default)
    return Item(row.number, prompt, alphas, negative_prompt if negative is None else negative, value, row.where)


def fingerprint(config: ProxyTuneConfig, settings: dict[str, Any]) -> str:
    """Twelve hex digits that differ if a recipe's members or a job's settings differ. (Alpha is not part of them: each
    result has its own.)"""
    experts = [{key: value for key, value in expert.items() if key != "alpha"} for expert in config.experts]
    said = [config.base, experts, config.combine, config.gate, config.plausibility, settings]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]


def shown_alpha(alphas: Sequence[float], names: Sequence[str]) -> float | dict[str, float]:
    """Alpha as JSON: a number if there is one expert, otherwise an object by name."""
    return alphas[0] if len(names) == 1 else dict(zip(names, alphas))


def result(item: Item, answer: Answer, names: Sequence[str], run: str | None = None) -> dict[str, Any]:
    """The object that is written for one prompt. It has its line number if the prompt was read from a file or in a job.

    Args:
        names: the recipe's experts. run: the job's :func:`fingerprint`; None leaves it out.
    """
    return {
        **({"line": item.line} if item.where or run else {}),
        "prompt": item.prompt,
        **({} if item.negative_prompt is None else {"negative_prompt": item.negative_prompt}),
        **item.extra,
        "text": answer.text,
        "tokens": answer.tokens,
        "alpha": shown_alpha(item.alphas, names),
        "finish": answer.finish,
        **answer.asked,
        **({"run": run} if run else {}),
    }


class Output(Journal):
    """The file that results are appended to. Once read or opened, it knows which lines are done.

    Args:
        path: the file; it is created if it is missing.
        items: the job. run: its :func:`fingerprint`. names: the recipe's experts.
    """

    def __init__(self, path: Path, items: Sequence[Item], run: str, names: Sequence[str]) -> None:
        super().__init__(path)
        self.items, self.run, self.names = items, run, names
        self.done: set[int] = set()

    @property
    def remaining(self) -> list[Item]:
        """The items that had no result yet, in order."""
        return [item for item in self.items if item.line not in self.done]

    def record(self, answers: Sequence[tuple[Answer, Item]]) -> None:
        """Append the results of answers."""
        self.append([result(item, one, self.names, self.run) for one, item in answers])

    def check(self) -> None:
        """Compare what was read with the job."""
        self.done = set()
        known = {item.line: item for item in self.items}
        for number, value in enumerate(self.lines, start=1):
            if {"line", "prompt", "alpha", "run"} - set(value) or not isinstance(value["line"], int):
                raise self.foreign(number)
            line = value["line"]
            if value["run"] != self.run:
                raise ProxyTuneError(
                    f"{self.path} was started with another recipe or other options; use those again, or choose another "
                    "--output"
                )
            item = known.get(line)
            made_of = value["prompt"], value.get("negative_prompt"), value["alpha"]
            if item is None or made_of != (item.prompt, item.negative_prompt, shown_alpha(item.alphas, self.names)):
                raise ProxyTuneError(
                    f"line {number} of {self.path} is the result of another prompt, negative prompt or alpha than line "
                    f"{line} of the input; choose another --output"
                )
            if line in self.done:
                raise ProxyTuneError(f"{self.path} has two results for line {line} of the input")
            self.done.add(line)
