"""Jobs of many prompts: JSON lines in, JSON lines out, in order, and whole again after a kill.

Each result names the input line it was made from (``line``, counted from 1) and the settings it was made with
(``run``). A batch of results is written and synced to disk before the next one is begun, so after a kill at any
moment the output holds whole results in order, and at most one torn line at its end, which is cut off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from proxytune.config import ProxyTuneConfig, resolve_alpha, take_alpha
from proxytune.errors import ProxyTuneError
from proxytune.generation import Answer, shown_alpha

__all__ = ["Broken", "Item", "Output", "fingerprint", "read_items", "result"]

RESULT_FIELDS = ("line", "text", "tokens", "finish", "run")


@dataclass(frozen=True)
class Item:
    """One prompt of a job.

    Attributes:
        line: its place in the input, from 1.
        alphas: one value an expert, in the recipe's order.
        extra: fields of its line that are passed through to the result.
    """

    line: int
    prompt: str
    alphas: tuple[float, ...]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken:
    """A line that cannot be answered, and why."""

    line: int
    reason: str


def read_items(
    lines: Iterable[bytes], names: Sequence[str], default: Sequence[float]
) -> tuple[list[Item], list[Broken]]:
    """Read ``{"prompt": ..., "alpha": ..., ...}`` lines; blank lines are skipped, broken ones are returned.

    Args:
        names: the recipe's experts, whose alphas may stand under ``"alpha.NAME"`` too.
        default: their alphas, where a line gives none.
    """
    items, broken = [], []
    for line, raw in enumerate(lines, start=1):
        try:
            if text := raw.decode("utf-8-sig" if line == 1 else "utf-8").strip():
                items.append(_item(line, text, names, default))
        except UnicodeDecodeError:
            broken.append(Broken(line, "it is not UTF-8"))
        except json.JSONDecodeError as error:
            broken.append(Broken(line, f"it is not JSON ({error.msg} at column {error.colno})"))
        except ProxyTuneError as error:
            broken.append(Broken(line, str(error)))
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets within brackets
            broken.append(Broken(line, "it is not JSON that can be read"))
    return items, broken


def _item(line: int, text: str, names: Sequence[str], default: Sequence[float]) -> Item:
    value = json.loads(text, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ProxyTuneError('it is not an object with a "prompt"')
    if not isinstance(value.get("prompt"), str):
        raise ProxyTuneError('it has no "prompt" that is a string')
    if not value["prompt"].strip():
        raise ProxyTuneError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in value["prompt"]):
        raise ProxyTuneError("the prompt has half a surrogate pair, which is no character")
    if taken := [name for name in RESULT_FIELDS if name in value]:
        raise ProxyTuneError(f"its field {taken[0]!r} is one of the result's own; rename it")
    prompt, alpha = value.pop("prompt"), take_alpha(value, names, value.pop("alpha", None))
    return Item(line, prompt, resolve_alpha(alpha, names, default), extra=value)


def _no_constant(name: str) -> None:
    raise ProxyTuneError(f"{name} is not a JSON number")


def fingerprint(config: ProxyTuneConfig, settings: dict[str, Any]) -> str:
    """Twelve hex digits that differ where a recipe's members or a job's settings do (alpha is each result's own)."""
    experts = [{key: value for key, value in expert.items() if key != "alpha"} for expert in config.experts]
    said = [config.base, experts, config.plausibility, settings]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]


def result(
    item: Item, answer: Answer, names: Sequence[str], *, numbered: bool = False, run: str | None = None
) -> dict[str, Any]:
    """The object that is written for one prompt.

    Args:
        names: the recipe's experts. numbered: say the line of the input. run: say the job's :func:`fingerprint`.
    """
    return {
        **({"line": item.line} if numbered else {}),
        "prompt": item.prompt,
        **item.extra,
        "text": answer.text,
        "tokens": answer.tokens,
        "alpha": shown_alpha(item.alphas, names),
        "finish": answer.finish,
        **({"run": run} if run is not None else {}),
    }


class Output:
    """The file that results are appended to; opened, it knows which lines are done.

    Args:
        path: the file, made where it is missing.
        items: the job. run: its :func:`fingerprint`. names: the recipe's experts.

    Raises:
        ProxyTuneError: if the file holds results of another job, or another process is writing it.
        OSError: if it cannot be opened, read or written.
    """

    def __init__(self, path: Path, items: Sequence[Item], run: str, names: Sequence[str]) -> None:
        self.path, self.items, self.run, self.names = path, items, run, names
        self.done: set[int] = set()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Output:
        # Unbuffered: after a failed write nothing is left that closing the file would try to write again.
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), "r+b", buffering=0)
        try:
            self._lock()
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):  # a device or a pipe has nothing to resume
                self._resume()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()

    @property
    def remaining(self) -> list[Item]:
        """The items that have no result yet, in order."""
        return [item for item in self.items if item.line not in self.done]

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Write some results and return when they are on disk."""
        assert self._file is not None
        data = memoryview("".join(json_line(value) for value in results).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a pipe or a device cannot be synced
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.done |= {value["line"] for value in results}

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system: two processes at once are then the user's to avoid
            return
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProxyTuneError(f"{self.path} is being written by another process") from error
        except OSError:  # a file system without locks
            return

    def _resume(self) -> None:
        assert self._file is not None
        known = {item.line: item for item in self.items}
        whole = 0
        for number, raw in enumerate(self._file_lines(), start=1):
            if not raw.endswith(b"\n"):  # torn by a kill
                break
            try:
                value = json.loads(raw)
                line, prompt, alpha, run = (value[key] for key in ("line", "prompt", "alpha", "run"))
            except (ValueError, KeyError, TypeError) as error:
                raise ProxyTuneError(
                    f"line {number} of {self.path} is not a result of this command; choose another --output"
                ) from error
            if run != self.run:
                raise ProxyTuneError(
                    f"{self.path} was begun with another recipe or other options; repeat those, or choose another "
                    "--output"
                )
            item = known.get(line)
            if item is None or prompt != item.prompt or alpha != shown_alpha(item.alphas, self.names):
                raise ProxyTuneError(
                    f"line {number} of {self.path} is the result of another prompt or alpha than line {line} of the "
                    "input; choose another --output"
                )
            if line in self.done:
                raise ProxyTuneError(f"{self.path} has two results for line {line} of the input")
            self.done.add(line)
            whole += len(raw)
        os.ftruncate(self._file.fileno(), whole)

    def _file_lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from file


def json_line(value: dict[str, Any]) -> str:
    """One object as one line of UTF-8."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is passed through
        line = json.dumps(value)
    return line + "\n"
