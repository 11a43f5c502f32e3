"""Reading data files from users: rows with their places, and one clear sentence for each error.

JSON is read as objects, one per line, or as one list of objects in any layout; the first character decides which. CSV
and TSV have the names of their columns in the first line. ``.gz`` files are unpacked.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import ProxyTuneError, first_line

__all__ = [
    "Row",
    "data_file",
    "half_surrogate",
    "json_rows",
    "read_dataset",
    "read_json",
    "read_rows",
    "read_text_lines",
    "read_yaml",
]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LARGE_FIELDS = threading.Lock()  # csv has one limit for the whole process


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        number: the number of its line, from 1; in a JSON list the number of its entry, in a Parquet file that of its
            row.
        where: its place in the file in words: ``line 3``, ``entry 2 (line 5)``, ``row 3``.
        value: the row's value; None if it is broken.
        broken: why it cannot be read, or None.
    """

    number: int
    where: str
    value: Any = None
    broken: str | None = None


# -- data sets ------------------------------------------------------------------------------------------------
def data_file(source: str) -> Path | None:
    """The file that ``source`` names; None for the name or the folder of a data set.

    Raises:
        ProxyTuneError: if it is clearly a path but does not exist.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    named = path.name.lower().removesuffix(".gz").endswith(SUFFIXES)
    if named or (source.startswith((".", "/", "~")) and not path.is_dir()):
        raise ProxyTuneError(f"there is no data at {source!r}")
    return None


def read_dataset(
    name: str, config: str | None = None, *, split: str, said: str | None = None, hint: str = "", **options: Any
) -> Iterator[Row]:
    """The rows of one split (or ``all``) of a data set on the hub or in a folder.

    Args:
        said: its name in messages. hint: what to do if it cannot be loaded. options: of ``datasets.load_dataset``.
    """
    from datasets import load_dataset

    try:
        rows = list(load_dataset(name, config, split=split, **options))
    except Exception as error:  # unreachable, removed, gated or changed data sets each raise an error of their own
        where = "" if Path(name).exists() else " from the hub"
        raise ProxyTuneError(
            f"the data set {said or name} cannot be loaded{where} ({first_line(error)}){hint}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Row(number, f"row {number}", row)


# -- whole files ----------------------------------------------------------------------------------------------
def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, read according to its suffix. The first broken row raises an error."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        rows = _parquet_rows(path)
    elif name.endswith((".csv", ".tsv")):
        rows = _csv_rows(path, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(SUFFIXES):
        rows = read_json(path)
    else:
        raise ProxyTuneError(f"{path} has none of the known suffixes: {', '.join(SUFFIXES)}")
    for row in rows:
        if (column := half_surrogate(row.value)) is not None:
            raise ProxyTuneError(
                f"{row.where} of {path}: its {column} contains half a surrogate pair, which is not a character"
            )
        yield row


def read_json(path: Path) -> Iterator[Row]:
    """The values of a file of JSON lines, or of one JSON list, whatever its suffix. The first broken one raises an
    error."""
    for row in json_rows(_lines(path)):
        if row.broken is not None:
            raise ProxyTuneError(f"{row.where} of {path}: {row.broken}")
        yield row


def read_text_lines(path: Path) -> Iterator[Row]:
    """The lines of a text file without line ends, blank lines included. A line that is not UTF-8 raises an error."""
    for number, raw in enumerate(_lines(path), start=1):
        try:
            yield Row(number, f"line {number}", _text(raw, number).rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise ProxyTuneError(f"line {number} of {path}: it is not UTF-8") from error


def read_yaml(path: Path) -> Any:
    """The value in a YAML or JSON file.

    Raises:
        ProxyTuneError: if it is not valid YAML.
        OSError: if it cannot be read.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProxyTuneError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def half_surrogate(value: Any) -> str | None:
    """The field of a value that has half a surrogate pair, which no encoding can write; None if none has."""
    if isinstance(value, dict):
        found = (repr(key) for key, part in value.items() if half_surrogate([key, part]) is not None)
        return next(found, None)
    if isinstance(value, list):
        return next((where for part in value if (where := half_surrogate(part)) is not None), None)
    return "text" if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value) else None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; unpacked if its name ends in ``.gz``."""
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProxyTuneError(f"{path} cannot be read as a gzip file: {first_line(error)}") from error


def _text(raw: bytes, number: int) -> str:
    """Bytes as text; they begin on line ``number`` of their file."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8")


# -- JSON -----------------------------------------------------------------------------------------------------
_SPREAD_OUT = "it starts an object that spans several lines; write one object per line, or one list of objects"


def json_rows(lines: Iterable[bytes], *, finite: bool = False) -> Iterator[Row]:
    """The values of JSON lines, or of one JSON list over all lines. A broken one is a row with ``broken`` set.

    Blank lines are skipped. A list is read up to its first error.

    Args:
        finite: refuse NaN and infinities, which Python writes and JSON does not have.
    """
    decoder = json.JSONDecoder(parse_constant=_refused if finite else None)
    numbered, begun = enumerate(lines, start=1), False
    for number, raw in numbered:
        try:
            text = _text(raw, number).strip()
            if text.startswith("[") and not begun:
                yield from _list_rows(raw + b"".join(line for _, line in numbered), number, decoder)
            elif text == "{" and not begun:
                yield Row(number, f"line {number}", broken=_SPREAD_OUT)
                return
            elif text:
                yield Row(number, f"line {number}", decoder.decode(text))
            begun = begun or bool(text)
        except (ValueError, RecursionError, ProxyTuneError) as error:
            begun = True
            yield Row(number, f"line {number}", broken=_why(error))


def _list_rows(raw: bytes, line: int, decoder: json.JSONDecoder) -> Iterator[Row]:
    """The entries of a JSON list, which begins on line ``line`` of its file."""
    number = counted = at = 0
    try:
        text = _text(raw, line)
        at = _skip(text, text.index("[") + 1)
        more = text[at : at + 1] != "]"
        while more:
            number += 1
            line += text.count("\n", counted, at)
            counted = at
            value, end = decoder.raw_decode(text, at)
            yield Row(number, f"entry {number} (line {line})", value)
            at = _skip(text, end)
            more = text[at : at + 1] == ","
            if more:
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if (rest := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data after the list", text, rest)
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        yield Row(1, f"line {line}", broken=_why(error))
    except json.JSONDecodeError as error:
        line += error.doc.count("\n", counted, error.pos)
        yield Row(number, f"line {line}", broken=_why(error))
    except (ValueError, RecursionError, ProxyTuneError) as error:
        yield Row(number, f"entry {number} (line {line})", broken=_why(error))


def _skip(text: str, at: int) -> int:
    """The next place from ``at`` on that is not white space."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _refused(name: str) -> None:
    raise ProxyTuneError(f"{name} is not a JSON number")


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, ProxyTuneError):
        return str(error)
    return "it cannot be read as JSON"  # a number with thousands of digits, or deeply nested brackets


# -- tables ---------------------------------------------------------------------------------------------------
def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    raw = b"".join(_lines(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = raw[: error.start].count(b"\n") + 1
        raise ProxyTuneError(f"line {broken} of {path}: it is not UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1  # the first line of each row, and its cells; blank lines are left out
    with _LARGE_FIELDS:
        limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        try:
            for cells in reader:
                if cells:
                    rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ProxyTuneError(f"line {line} of {path}: it is not CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)
    names = rows[0][1] if rows else []
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ProxyTuneError(f"line {rows[0][0]} of {path}: two columns are called {twice[0]!r}; rename one")
    for line, cells in rows[1:]:
        if len(cells) != len(names):
            raise ProxyTuneError(f"line {line} of {path}: it does not have the {len(names)} columns of the first line")
        yield Row(line, f"line {line}", dict(zip(names, cells)))


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            values = (value for batch in file.iter_batches() for value in batch.to_pylist())
            for number, value in enumerate(values, start=1):
                yield Row(number, f"row {number}", value)
    except ArrowException as error:
        raise ProxyTuneError(f"{path} cannot be read as a Parquet file: {first_line(error)}") from error
