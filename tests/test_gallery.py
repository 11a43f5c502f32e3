"""The gallery of the docs: its pages, its pictures, what the text says of them, and that the demo still answers so."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from pictures import COLUMNS, PAGES, Typed, left_over
from support.browser import browser
from support.commands import run

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "gallery.md").read_text("utf-8")


def data(name):
    """What a page of the gallery shows."""
    page = (DOCS / "gallery" / f"{name}.html").read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def answer(name):
    return "".join(text for text, _, _, special in data(name)["pieces"] if not special)


def test_the_text_links_the_pages_that_there_are():
    linked = re.findall(r'<a href="gallery/([\w-]+)\.html">Open the page</a>', TEXT)
    assert linked == list(PAGES)
    assert {file.stem for file in (DOCS / "gallery").iterdir()} == set(PAGES)


def test_every_picture_is_shown_and_is_there():
    texts = [file.read_text("utf-8") for file in (*DOCS.glob("*.md"), DOCS.parent / "README.md")]
    shown = set(re.findall(r"!\[[^]]+\]\((?:docs/)?pictures/([\w.-]+)\)", "".join(texts)))
    assert {file.name for file in (DOCS / "pictures").iterdir()} == shown


@pytest.mark.parametrize("name", PAGES)
def test_the_text_has_the_answers_of_the_pages(name):
    page = data(name)
    assert page["command"][0] == ["proxytune", "explain", *PAGES[name].words]
    said = re.sub(r"\s+", " ", next(part for part in TEXT.split("\n## ") if f"gallery/{name}.html" in part))
    asked = page["prompt"].removeprefix("Question: ").removesuffix(" Answer:")
    assert f"*{asked}*" in said
    assert answer(name).strip().split("\n")[0] in said


def test_the_pages_are_of_today():
    for file in (DOCS / "gallery").iterdir():
        for part in ("page.css", "page.js"):
            now = files("proxytune.analysis").joinpath(part).read_text("utf-8")
            assert now in file.read_text("utf-8"), f"{part} has changed: run `python scripts/pictures.py gallery pages`"


def test_what_is_committed_asks_for_nothing_from_a_network():
    for file in (*(DOCS / "pictures").glob("*.svg"), *(DOCS / "gallery").glob("*.html")):
        addresses = set(re.findall(r"https?://[^\s\"'<>)]*", file.read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file.name


def test_pictures_are_small():
    for file in (DOCS / "pictures").iterdir():
        assert file.stat().st_size < 150_000, file.name


def test_progress_that_was_wiped_away_is_not_in_a_picture():
    assert left_over("one\n\x1b[?25ltwo\r\x1b[2Kthree\n\r\x1b[1A\x1b[2K\x1b[?25hfour\n") == ["one", "four", ""]


def test_a_line_that_is_typed_is_shown(capsys):
    typed = Typed("hello\n")
    assert (typed.readline(), typed.readline()) == ("hello\n", "")
    assert capsys.readouterr().out == "\n> hello\n"
    assert COLUMNS >= 100, "tables have room between their columns"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_demo_still_answers_so(name):
    assert run("generate", *PAGES[name].words).stdout == answer(name) + "\n"


@pytest.mark.slow
def test_nothing_on_a_page_is_wider_than_its_place():
    wide = "return [...document.querySelectorAll('body, #card, .wide')].filter((e) => e.scrollWidth > e.clientWidth)"
    with browser() as window:
        for name in PAGES:
            for width in (360, 834, 1280):
                window.look(width, 800)
                window.open(DOCS / "gallery" / f"{name}.html")
                assert window.run(wide) == [], (name, width)
