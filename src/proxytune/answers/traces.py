"""The traces of answers as JSON lines: what ``--trace`` of ``generate``, ``chat`` and ``eval`` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.answers.journal import Journal
from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:  # code that reads traces needs no torch
    from proxytune.answers.batch import Item
    from proxytune.answers.generation import Answer

__all__ = ["SCHEMA", "ChatTraceFile", "TraceFile", "is_trace", "token_texts", "trace_line"]

SCHEMA = "proxytune.trace/1"


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """A function from an id to its text in the middle of a text. It includes special tokens; half a character is
    U+FFFD."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cache
    def text_of(id_: int) -> str:
        # SentencePiece drops the space of a text's first word, so the second of two is read.
        one, two = decode([id_]), decode([id_, id_])
        return two[len(one) :] if two.startswith(one) else one

    return text_of


def trace_line(
    prompt: str,
    alpha: Mapping[str, float],
    answer: Answer,
    text_of: Callable[[int], str],
    *,
    key: Mapping[str, Any] | None = None,
    run: str | None = None,
) -> dict[str, Any]:
    """The object that is written for one traced answer; see ``docs/python.md``.

    Args:
        alpha: expert name -> alpha. text_of: gives the text of an id.
        key: fields that identify the answer in its job. run: the fingerprint of a job that can be resumed.
    """

    def with_text(value: dict[str, Any]) -> dict[str, Any]:
        return {"id": value["id"], "token": text_of(value["id"]), **value}

    tokens = []
    for token in answer.trace or ():
        value = token.to_json()
        tokens.append(with_text({**value, "candidates": [with_text(each) for each in value["candidates"]]}))
    return {
        "schema": SCHEMA,
        **(key or {}),
        "prompt": prompt,
        "text": answer.text,
        "alpha": dict(alpha),
        "tokens": tokens,
        **({"run": run} if run else {}),
    }


def is_trace(value: Any, **key: type) -> bool:
    """Whether a JSON value is a trace of this version and has the fields of ``key``, each with its type."""
    return (
        isinstance(value, Mapping)
        and value.get("schema") == SCHEMA
        and all(isinstance(value.get(name), kind) for name, kind in key.items())
    )


class ChatTraceFile(Journal):
    """The file that the traces of a conversation are appended to."""

    holds, option = "trace", "--trace"

    def check(self) -> None:
        """Refuse a file that holds anything else than traces."""
        for number, value in enumerate(self.lines, start=1):
            if not is_trace(value):
                raise self.foreign(number)


class TraceFile(Journal):
    """The file that traces are appended to. In a job with an output it continues where the output continues; otherwise
    it must be empty.

    Args:
        path: the file; it is created if it is missing.
        items: the job. run: its fingerprint if it can be resumed, otherwise None. names: the recipe's experts.
    """

    holds, option = "trace of a job", "--trace"

    def __init__(self, path: Path, items: Sequence[Item], run: str | None, names: Sequence[str]) -> None:
        super().__init__(path)
        self.asked = {item.line: (item.prompt, dict(zip(names, item.alphas))) for item in items}
        self.run = run
        self.traced: set[int] = set()

    def check(self) -> None:
        """Compare what was read with the job."""
        if self.run is None and self.lines:
            raise ProxyTuneError(f"{self.path} is not empty; remove it, or choose another --trace")
        self.traced = set()
        for number, value in enumerate(self.lines, start=1):
            if not is_trace(value, line=int):
                raise self.foreign(number)
            line = value["line"]
            asked = (value.get("prompt"), value.get("alpha"))
            if value.get("run") != self.run or asked != self.asked.get(line) or line in self.traced:
                raise ProxyTuneError(
                    f"line {number} of {self.path} was written for another recipe, input or options; use those again, "
                    "or choose another --trace"
                )
            self.traced.add(line)

    def record(self, answers: Sequence[tuple[Answer, Item]], text_of: Callable[[int], str]) -> None:
        """Append the traces of answers, except those that it has already."""
        new = [(one, item) for one, item in answers if item.line not in self.traced]
        keys = [{"line": item.line} if item.where or self.run else {} for _, item in new]
        self.append(
            [
                trace_line(*self.asked[item.line], one, text_of, key=key, run=self.run)
                for (one, item), key in zip(new, keys)
            ]
        )

    def refuse_missing(self, done: set[int], output: Path) -> None:
        """Refuse a job whose output has answers without a trace, because the lines in ``done`` are not answered
        again."""
        if missing := sorted(done - self.traced):
            raise ProxyTuneError(
                f"{output} already has the answer to line {missing[0]}, but {self.path} has no trace of it; choose "
                "another --output"
            )
