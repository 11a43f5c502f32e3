"""JSON-lines files that are appended to, that can be continued after a kill, and that reading does not change."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from filelock import lock_descriptor

from proxytune.errors import ProxyTuneError

__all__ = ["Journal", "json_line", "write_whole"]

# Line ends of Unicode, which some readers of text split lines at.
ESCAPED = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}

Kind = TypeVar("Kind", bound="Journal")


class Journal:
    """A file of JSON objects, one per line.

    :meth:`read` reads it and changes nothing. Opened (``with``), it is created if it is missing, and locked for other
    processes. An incomplete last line that a kill left is removed; one that lacks only its newline gets it. When
    :meth:`append` returns, the lines are on disk.

    Attributes:
        lines: what the file held when it was read or opened, in order.
        holds, option: what a line is, and the option that names the file, for messages.

    Raises:
        ProxyTuneError: on reading and opening, if a line is not a JSON object; on opening, if another process is
            writing the file.
        OSError: if it cannot be opened, read or written.
    """

    holds, option = "result of this command", "--output"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None

    def read(self: Kind) -> Kind:
        """Read the file without locking, creating or changing it. A missing file has no lines."""
        if self.path.is_file():  # a device or a pipe cannot be read back
            self._parse(self.path.read_bytes())
            self.check()
        return self

    def __enter__(self: Kind) -> Kind:
        # Unbuffered: otherwise closing the file after a failed write would try to write again.
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.seek(0)
                whole, ended = self._parse(self._file.read())
                self.check()  # a file that is not ours is left as it is
                self._file.truncate(whole)
                if not ended:
                    self._file.write(b"\n")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()

    def check(self) -> None:
        """Raise :class:`ProxyTuneError` if the lines do not belong to this job. Subclasses define it."""

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write some lines and return when they are on disk."""
        assert self._file is not None
        data = memoryview("".join(json_line(line) for line in lines).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a pipe or a device cannot be synced
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _lock(self) -> None:
        # The file itself is locked, so that nothing is left beside it.
        assert self._file is not None
        try:
            locked = lock_descriptor(self._file.fileno(), blocking=False)
        except OSError:  # a file system without locks: the user must then avoid two processes at once
            return
        if not locked:
            raise ProxyTuneError(f"{self.path} is being written by another process")

    def _parse(self, raw: bytes) -> tuple[int, bool]:
        """Read the complete lines; return how many bytes they are, and whether the last one has its newline."""
        self.lines, at = [], 0
        for number, line in enumerate(raw.splitlines(keepends=True), start=1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                # An incomplete line is the beginning of an object, which is never valid JSON.
                if line.startswith(b"{") and at + len(line) == len(raw) and not line.endswith(b"\n"):
                    return at, True
                raise self.foreign(number) from error
            if not isinstance(value, dict):
                raise self.foreign(number)
            self.lines.append(value)
            at += len(line)
        return at, raw[at - 1 : at] in (b"\n", b"")

    def foreign(self, number: int) -> ProxyTuneError:
        """The error for a line that is of another kind."""
        return ProxyTuneError(f"line {number} of {self.path} is not a {self.holds}; choose another {self.option}")


def write_whole(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def json_line(value: Mapping[str, Any]) -> str:
    """One object as one line of UTF-8, with all characters escaped that some readers take for the end of a line."""
    line = json.dumps(value, ensure_ascii=False).translate(ESCAPED)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is passed through
        line = json.dumps(value)
    return line + "\n"
