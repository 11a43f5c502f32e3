"""The pages of the documentation as blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the line that its first line is on."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A line after ``$ ``, with what the page shows below it; "" where it shows nothing."""

    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """The words of its first program, without redirections and comments."""
        words = shlex.split(self.text.replace("$'", "'"), comments=True)
        ends = [at for at, word in enumerate(words) if word in ("|", "<", ">", "&&")]
        return words[: min(ends, default=len(words))]

    @property
    def target(self) -> str | None:
        """The file that its output goes to."""
        found = re.search(r" > (\S+)$", self.text)
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 2) for found in FENCE.finditer(text)]


def commands(block: Block) -> list[Command]:
    """The commands of a console block; a backslash at the end of a line, or an open quote, goes on in the next."""
    found: list[Command] = []
    for line in block.text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found += map(Command, line[2:].split(" && "))
        elif found and is_open(found[-1].text):
            found[-1] = Command(f"{found[-1].text}\n{line}")
        elif found:
            found[-1] = Command(found[-1].text, f"{found[-1].output}{line}\n")
    return found


def is_open(text: str) -> bool:
    """Whether a quote is not closed yet."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def name(page: Path) -> str:
    """How a test calls a page."""
    return page.relative_to(ROOT).as_posix()
