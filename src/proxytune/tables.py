"""Tables, as Markdown for files and as rich tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Table", "interval_cells", "markdown", "percent", "rendered"]


@dataclass(frozen=True)
class Table:
    """A table with its title and its notes.

    Attributes:
        heads: the heads of the columns. A column without any text in its rows is left out.
        rows: cells as text. Columns of numbers are aligned to the right.
        title: printed bold. about: printed after the title.
        bold: which rows are printed bold, from 0.
        legend: head or cell -> its explanation. Entries that the table does not contain are left out.
        notes: sentences below the table.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    about: str = ""
    bold: Iterable[int] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, items: Iterable[Any], cells: Mapping[str, Callable[[Any], str]], title: str = "", **more: Any) -> Table:
        """A table with one row per item. ``cells``: head -> the item's cell; ``more``: other attributes."""
        return cls(list(cells), [[cell(item) for cell in cells.values()] for item in items], title, **more)

    def columns(self) -> list[int]:
        """Which columns have text."""
        return [at for at in range(len(self.heads)) if any(row[at] for row in self.rows)]

    def is_numeric(self, column: int) -> bool:
        """Whether a column's cells begin with digits, signs or dashes."""
        cells = [row[column] for row in self.rows if row[column]]
        return any(cell[0].isdigit() or cell[0] in "+-–" for cell in cells)

    def remarks(self) -> list[str]:
        """The entries of the legend that the table contains, and the notes."""
        words = {*(self.heads[at] for at in self.columns()), *(cell for row in self.rows for cell in row)}
        return [*(f"{word}: {text}." for word, text in self.legend.items() if word in words), *self.notes]


def interval_cells(of: Mapping[str, float | None], scale: int = 1) -> tuple[str, str]:
    """The cells of a ``mean`` and of its interval, ``low`` to ``high``; a dash for None. 100 as ``scale``: per cent."""
    digits = 1 if scale == 100 else 3
    values = (of[key] for key in ("mean", "low", "high"))
    mean, low, high = (None if value is None else f"{scale * value:.{digits}f}" for value in values)
    return mean or "–", "–" if low is None else f"{low} to {high}"


def percent(share: float) -> str:
    """A share as text, in per cent."""
    return f"{100 * share:.1f} %"


def markdown(tables: Iterable[Table]) -> str:
    """Tables as Markdown, one below the other."""
    return "\n".join(map(_markdown, tables))


def _markdown(table: Table) -> str:
    kept, bold = table.columns(), set(table.bold)
    rows = [
        [f"**{cell}**" if number in bold and cell else cell for cell in (row[at].replace("|", "\\|") for at in kept)]
        for number, row in enumerate(table.rows)
    ]
    heads = [table.heads[at] for at in kept]
    widths = [max(len(cells[at]) for cells in (heads, *rows)) for at in range(len(kept))]
    right = [table.is_numeric(at) for at in kept]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in zip(cells, widths, right)]
        return f"| {' | '.join(padded)} |\n"

    rule = "|".join("-" * (w + 1) + ":" if to_right else "-" * (w + 2) for w, to_right in zip(widths, right))
    parts = [f"**{table.title}**{table.about}\n"] if table.title else []
    parts += [f"{line(heads)}|{rule}|\n{''.join(map(line, rows))}"] if rows else []
    parts += ["\n".join(remarks) + "\n"] if (remarks := table.remarks()) else []
    return "\n".join(parts)


def rendered(table: Table, width: int) -> RenderableType:
    """A table for a rich console of that width. Text is broken between words; numbers are never broken."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    bold = set(table.bold)
    parts: list[RenderableType] = []
    if table.title:
        parts.append(Text.assemble((table.title, "bold"), table.about))
    if table.rows:
        gap = 1 if width >= 100 else 0  # besides the blanks of a column itself
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False, header_style="bold")
        for at in table.columns():
            head, right = table.heads[at], table.is_numeric(at)
            if right:
                longest = max(map(len, [*head.split(), *(row[at] for row in table.rows)]))
                shown.add_column(
                    "\n".join(textwrap.wrap(head, longest, break_on_hyphens=False)), justify="right", no_wrap=True
                )
            else:
                shown.add_column(head, overflow="fold")
        for number, row in enumerate(table.rows):
            cells = (Text(row[at]) for at in table.columns())
            shown.add_row(*cells, style="bold" if number in bold else None)
        parts.append(shown)
    if remarks := table.remarks():
        parts += [Text(), *(Text(remark, style="dim") for remark in remarks)]
    return Group(*parts, Text())
