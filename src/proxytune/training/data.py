"""Training data: from a file or the name of a data set to checked rows for TRL. Errors name the broken line.

A row follows TRL's conventions: ``prompt`` and ``completion``, both strings or both lists of messages, or ``messages``
(``conversations`` with ``from`` and ``value`` too). Templates make these columns from columns with other names:
``Rows.read("gsm8k.csv", prompt="Question: {question}\\nAnswer:", completion=" {answer}")``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, Literal

from proxytune.answers.files import Row, data_file, read_dataset, read_rows
from proxytune.errors import ProxyTuneError

__all__ = ["Rows"]

ROLES = ("system", "user", "assistant")

Kind = Literal["text", "chat", "turns"]
KINDS = {"text": "text", "chat": "messages with one answer", "turns": "messages with several answers"}


@dataclass(frozen=True)
class Rows:
    """Checked rows, in the order of their source.

    Attributes:
        source: the file or the data set.
        kind: ``text`` (prompt and completion are strings), ``chat`` (both are lists of messages) or ``turns``
            (``messages`` in which the assistant speaks more than once).
        rows: ``{"prompt", "completion"}`` or ``{"messages"}`` each, and nothing else.
        places: the place of each row in words: ``line 3 of FILE``.
        sha256: hash of the file; for a data set, of its rows as JSON lines.
    """

    source: str
    kind: Kind
    rows: list[dict[str, Any]]
    places: list[str]
    sha256: str

    @classmethod
    def read(
        cls, source: str, *, split: str = "train", prompt: str | None = None, completion: str | None = None
    ) -> Rows:
        """Read a JSONL, JSON, CSV, TSV or Parquet file, or a data set (``NAME`` or ``NAME:CONFIG``) with TRL's columns.

        Args:
            split: the split of a data set. prompt, completion: templates with column names in braces; both or neither.

        Raises:
            ProxyTuneError: if it cannot be read, is empty, or has a broken row, which the message names.
        """
        if (prompt is None) != (completion is None):
            raise ProxyTuneError("--prompt and --completion go together: give both templates, or neither")
        if (path := data_file(source)) is not None:
            raw: Iterable[Row] = read_rows(path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            name, _, config = source.partition(":")
            raw = list(read_dataset(name, config or None, split=split, said=repr(source)))
            text = "".join(json.dumps(row.value, sort_keys=True, default=str) + "\n" for row in raw)
            sha256 = hashlib.sha256(text.encode()).hexdigest()

        rows: list[dict[str, Any]] = []
        places: list[str] = []
        first = None
        for row in raw:
            place = f"{row.where} of {path or source}"
            try:
                form, made = _row(row.value, prompt, completion)
                first = first or form
                if form != first:
                    raise ProxyTuneError(f"it has {form}, but the first row has {first}")
            except ProxyTuneError as error:
                raise ProxyTuneError(f"{place}: {error}") from error
            rows.append(made)
            places.append(place)
        if not rows:
            raise ProxyTuneError(f"{source} has no rows")
        return cls(source, *_kind(rows), places, sha256)

    def beside(self, training: Rows) -> Rows:
        """These rows as validation data: in the form of the training rows.

        Raises:
            ProxyTuneError: if they are of another kind, or are the training rows themselves.
        """
        if self.sha256 == training.sha256:
            raise ProxyTuneError("the validation data are the training data; give rows that are not trained on")
        if self.kind == training.kind:
            return self
        if (self.kind, training.kind) == ("chat", "turns"):
            rows = [{"messages": row["prompt"] + row["completion"]} for row in self.rows]
            return replace(self, kind="turns", rows=rows)
        raise ProxyTuneError(
            f"the validation data in {self.source} are {KINDS[self.kind]}, but the training data are "
            f"{KINDS[training.kind]}; give both in one form"
        )


def _kind(rows: list[dict[str, Any]]) -> tuple[Kind, list[dict[str, Any]]]:
    """The kind of the rows. Messages in which the assistant speaks once, at the end, count as a prompt and a
    completion."""
    if "messages" not in rows[0]:
        return ("text" if isinstance(rows[0]["prompt"], str) else "chat"), rows
    if any(sum(m["role"] == "assistant" for m in row["messages"]) > 1 for row in rows):
        return "turns", rows
    return "chat", [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


# -- one row --------------------------------------------------------------------------------------------------
def _row(row: Any, prompt: str | None, completion: str | None) -> tuple[str, dict[str, Any]]:
    """One row with only TRL's columns, and its form."""
    if not isinstance(row, Mapping):
        raise ProxyTuneError("it is not an object with columns")
    row = {name: value for name, value in row.items() if value is not None}
    if prompt is not None and completion is not None:
        row = {"prompt": _filled(prompt, row), "completion": _filled(completion, row)}
    if row.get("tools"):
        raise ProxyTuneError("it has tools, which are not supported")
    if "prompt" in row and "completion" in row:
        return _prompt_and_completion(row["prompt"], row["completion"])
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        messages = _messages(row[name], name)
        if messages[-1]["role"] != "assistant":
            raise ProxyTuneError("its last message is not the assistant's, so there is nothing to learn")
        if len(messages) == 1:
            raise ProxyTuneError("it has no message before the assistant's")
        return "messages", {"messages": messages}
    columns = ", ".join(map(str, row)) or "none"
    raise ProxyTuneError(
        f'it has neither "prompt" and "completion" nor "messages" (its columns: {columns}); --prompt and --completion '
        "make them of other columns"
    )


def _prompt_and_completion(prompt: Any, completion: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not text.strip():
                raise ProxyTuneError(f"its {name} is empty")
        return "prompt and completion", {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ProxyTuneError('"prompt" and "completion" must both be text, or both lists of messages')
    completion = _messages(completion, "completion")
    if any(message["role"] != "assistant" for message in completion):
        raise ProxyTuneError("its completion has messages that are not the assistant's")
    return "prompt and completion as messages", {"prompt": _messages(prompt, "prompt"), "completion": completion}


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    from trl import maybe_convert_to_chatml

    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ProxyTuneError(f'"{name}" must be a list of messages, each with a role and a content')
    if name == "conversations":
        value = maybe_convert_to_chatml({name: value}).get("messages", value)
    messages = []
    for message in value:
        said = {key: part for key, part in message.items() if part is not None}
        if said.get("role") not in ROLES or not isinstance(said.get("content"), str):
            raise ProxyTuneError(f"a message needs a role ({', '.join(ROLES)}) and a text as its content")
        if other := sorted(said.keys() - {"role", "content"}):
            raise ProxyTuneError(f"a message has {other[0]!r} beside its role and content, which is not supported")
        if not said["content"].strip() and said["role"] == "assistant":
            raise ProxyTuneError("a message of the assistant is empty")
        messages.append({"role": said["role"], "content": said["content"]})
    return messages


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """``template`` with the row's columns in place of their names in braces."""
    made = ""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ProxyTuneError(f"the template {template!r} cannot be read: {error}") from error
    for literal, name, spec, conversion in parts:
        made += literal
        if name is None:
            continue
        if spec or conversion:
            raise ProxyTuneError(f"the template {template!r} has a format after {name!r}; write only the name")
        if name not in row:
            raise ProxyTuneError(f"it has no column {name!r}; it has {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[name], (str, int, float)):
            raise ProxyTuneError(f"its column {name!r} is neither text nor a number")
        made += str(row[name])
    return made
