"""Plain English where users read: pages, help texts and the docstrings of public names. CONTRIBUTING.md says how."""

from __future__ import annotations

import inspect
import re

import pytest
import typer

import proxytune
from proxytune.cli import COMMANDS, app
from support.pages import PAGES, ROOT, name

# What we do not write -> what to write instead. FENCE and links are left out of the check.
INSTEAD = {
    r"\b(?:is|are|which is) told\b": "is reported, or say who prints it",
    r"\bas dear as\b": "costs as much as",
    r"\b[Ww]ho knows better\b": "say when, and what to pass",
    r"\bone an? (?:row|expert|prompt|answer|line|alpha|core|sample)\b": "one per …",
    r"\b(?:list|number|value|values|alphas?) (?:of one )?a row\b": "… per row",
    r"\b(?:forwards?|passes|kernels?|bytes|draws?|drafts?) a (?:token|step|row|member)\b": "… per …",
    r"\bwhat comes of it\b|\bmakes? of it\b": "the result",
    r"\bmay be had\b|\bcannot be had\b|\bcan be had\b": "is available, is possible",
    r"\b(?:is|are) held against\b": "is compared with",
    r"\bstand[s]? (?:under|in tables|beside|among|for itself)\b": "is",
    r"\b(?:whereof|thereof|wherein|therein|thereby|hereby|hence)\b": "plain words",
    r"\bas ever\b": "as always, or leave it out",
    r"\bof theirs\b": "their",
    r"\bcounted and told\b": "counted",
    r"\bgo(?:es)? on (?:with|from|where|behind)\b": "continue",
    r"\bbehind (?:the|a|each|every|its|their|it|them|padding|drafts|this)\b(?! (?:chat )?API)": "after",
    r"\banew\b": "again",
    r"\b(?:objects?|lines?|nats|samples|tokens|rows) an? (?:line|prediction|token|answer|row|step|second)\b": "per",
    r"\bdear(?:er|est)?\b": "expensive",
    r"(?<!here )\b(?:is|are) no (?:text|trace|number|JSON|hub id)s?\b": "is not a …",
}
CODE = re.compile(r"^```.*?^```$|^ *>>> .*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.MULTILINE | re.DOTALL)
# Not read: what is generated, the note that quotes what we do not write.
LEFT_OUT = {"cli.md", "changelog.md", "CONTRIBUTING.md"}
PROSE = [page for page in PAGES if page.name not in LEFT_OUT]


def wrong(text):
    """What of a text is not plain, with what to write instead."""
    prose = CODE.sub(" ", text)
    return [f"{found[0]!r}: {instead}" for bad, instead in INSTEAD.items() for found in re.finditer(bad, prose)]


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_a_page_is_plain(page):
    assert not wrong(page.read_text("utf-8"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain(command):
    made = typer.main.get_command(app).get_command(None, command)
    assert not wrong("\n".join([made.help or "", *(parameter.help or "" for parameter in made.params)]))


@pytest.mark.parametrize("public", proxytune.__all__)
def test_a_docstring_is_plain(public):
    """Its methods' docstrings too."""
    found = getattr(proxytune, public)
    parts = (
        [found, *(part for key, part in vars(found).items() if key[0] != "_")] if inspect.isclass(found) else [found]
    )
    for part in parts:
        assert not wrong(inspect.getdoc(part) or "")


def test_the_check_can_fail():
    assert wrong("The median is told.") == ["'is told': is reported, or say who prints it"]
    assert not wrong("`is told` in code, and what the table reports.")


def test_the_style_note_shows_what_is_meant():
    note = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## How we write")[2]
    assert note.count("| before |") == 1
    assert len(re.findall(r"^\| [^|]+ \| [^|]+ \|$", note.partition("| before |")[2], re.MULTILINE)) >= 5
