"""Tables: as Markdown, and as a terminal shows them."""

from __future__ import annotations

import io

from rich.console import Console

from proxytune.tables import Table, markdown, rendered

TABLE = Table(
    ("arm", "right", "empty", "seats"),
    [("base", "3/40", "", "1"), ("proxy-tuned base", "11/40", "", "12")],
    title="gsm8k",
    about=" (40 examples)",
    bold=[1],
    legend={"seats": "rows of a batch", "empty": "is left out", "base": "M alone", "gone": "is nowhere"},
    notes=["Intervals: Wilson."],
)


def test_markdown():
    assert markdown([TABLE, Table((), (), "t", notes=["not scored"])]) == (
        "**gsm8k** (40 examples)\n"
        "\n"
        "| arm                  |     right |  seats |\n"
        "|----------------------|----------:|-------:|\n"
        "| base                 |      3/40 |      1 |\n"
        "| **proxy-tuned base** | **11/40** | **12** |\n"
        "\n"
        "seats: rows of a batch.\n"
        "base: M alone.\n"
        "Intervals: Wilson.\n"
        "\n"
        "**t**\n"
        "\n"
        "not scored\n"
    )


def shown(width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(rendered(TABLE, width))
    return console.file.getvalue()


def test_a_terminal():
    lines = [line.rstrip() for line in shown(80).splitlines()]
    assert lines[0] == "gsm8k (40 examples)"
    assert lines[1].split() == ["arm", "right", "seats"]
    assert lines[4].split() == ["proxy-tuned", "base", "11/40", "12"]
    assert lines[5:] == ["", "seats: rows of a batch.", "base: M alone.", "Intervals: Wilson.", ""]


def test_a_narrow_terminal_loses_nothing():
    lines = shown(26).splitlines()
    assert max(map(len, lines)) <= 26
    assert {"proxy-tuned", "base", "11/40", "12"} <= set(" ".join(lines).split())
