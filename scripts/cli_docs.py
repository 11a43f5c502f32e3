"""Write docs/cli.md from the command line's own help; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from proxytune.cli import COMMANDS, app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

<!-- Written by scripts/cli_docs.py from the commands' own help: change it there. -->

"""


def page() -> str:
    """The page as Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD, f"{paragraphs(group.help)}\n\n{group.epilog}\n"]
    for name in COMMANDS:
        command = group.get_command(None, name)
        parts.append(f"\n## proxytune {name}\n\n```\n{usage(name, command)}\n```\n\n{paragraphs(command.help)}\n")
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        for title, rows in panels(shown).items():
            parts.append(f"\n**{title}**\n\n| | |\n|---|---|\n" + "".join(rows))
    return "".join(parts)


def usage(name: str, command: Any) -> str:
    """The first line of the help."""
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    return " ".join(["proxytune", name, "[OPTIONS]", *arguments])


def panels(parameters: list[Any]) -> dict[str, list[str]]:
    """Title -> the table rows of its parameters, in order."""
    found: dict[str, list[str]] = {}
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            title, said = "Arguments", parameter.metavar or parameter.name.upper()
        else:
            title = getattr(parameter, "rich_help_panel", None) or "Options"
            said = ", ".join(parameter.opts) + value_of(parameter)
        text = parameter.help or ""
        if getattr(parameter, "show_default", False) and not (parameter.default is None or parameter.default is False):
            text += f" Default: {parameter.default}."
        found.setdefault(title, []).append(f"| `{cell(said)}` | {cell(text)} |\n")
    return found


def value_of(option: Any) -> str:
    """What the option takes, as it is shown after its name."""
    return f" {option.metavar}" if option.metavar else ""


def paragraphs(text: str | None) -> str:
    """A docstring with each paragraph on one line, and its examples as they are."""
    blocks = inspect.cleandoc(text or "").replace("\b\n", "").split("\n\n")
    return "\n\n".join(b if b.startswith("    ") else " ".join(map(str.strip, b.splitlines())) for b in blocks)


def cell(text: str) -> str:
    """Text that does not break a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else "docs/cli.md is out of date: run scripts/cli_docs.py")
    PAGE.write_text(page(), "utf-8")
