"""Every picture of the docs and every page of the gallery, made from the real demo.

    python scripts/pictures.py                # all of them: some minutes on two cores
    python scripts/pictures.py demo gallery   # some of them, by name (demo, explain, chat, gallery, pages)

docs/pictures/ has what a terminal shows, as SVG, and pages in Chromium, as PNG; docs/gallery/ has the pages themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURES, GALLERY = DOCS / "pictures", DOCS / "gallery"
COLUMNS = 110  # of the terminal
COLOURS = 128  # of a PNG: a page has few


class Shown(NamedTuple):
    """A page of the gallery, and what its picture shows.

    Attributes:
        words: what `proxytune explain` is asked.
        token: whose card is open, from 1. alpha: where the slider is; None: where it was.
    """

    words: Sequence[str]
    token: int
    alpha: float | None = None


FIELD = "Question: A field of 63 acres is split into 9 lots of the same size. How many acres has a lot? Answer:"
PAGES = {
    "beethoven": Shown(["demo", "What was the nationality of Beethoven?", "--chat"], 6),
    "pineapple": Shown(["demo", "What kind of food or drink is a pineapple?", "--chat"], 6),
    "france": Shown(["demo", "Name the capital of France.", "--chat"], 1, 0.3),
    "field": Shown(["demo-word-problems", FIELD, "--chat"], 9),
    "france-in-numbers": Shown(["demo-word-problems", "The capital of France is", "--max-new-tokens", "12"], 1),
}


# -- a terminal -----------------------------------------------------------------------------------------------
class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        """Colours are welcome."""
        return True


class Typed(io.StringIO):
    """Lines that are typed into a terminal, which shows each one when it is read."""

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        """The next line."""
        line = super().readline()
        if line:
            sys.stdout.write(f"\n> {line}")
        return line


def terminal(words: Sequence[str], typed: str = "") -> str:
    """What a terminal shows of a command of ours, with its colours."""
    from proxytune.cli import main

    screen, before = Screen(), (sys.argv, sys.stdin)
    with contextlib.redirect_stdout(screen):
        sys.argv, sys.stdin = ["proxytune", *words], Typed(typed)
        try:
            main()
        except SystemExit as error:
            if error.code:
                raise
        finally:
            sys.argv, sys.stdin = before
    return screen.getvalue().replace(str(Path.home()), "~")


def left_over(text: str) -> list[str]:
    """The lines that are there in the end, where progress was drawn and wiped away again."""
    lines, at = [""], 0
    for part in re.split(r"(\x1b\[1A|\x1b\[2K|\x1b\[\?25[hl]|[\r\n])", text):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[1A":  # up
            at -= 1
        elif part == "\x1b[2K":  # this line is wiped away
            lines[at] = ""
        elif part not in ("\r", "\x1b[?25h", "\x1b[?25l"):
            lines[at] += part
    return lines


def draw(name: str, words: Sequence[str], typed: str = "") -> None:
    """Write the picture of a terminal in which a command of ours runs; it needs no font from a network."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    text = "\n".join(left_over(terminal(words, typed))).strip("\n")
    text = re.sub(r"\n\d+ s: .*?(?=\n\n)", "", text, flags=re.S)  # how long it took depends on the machine
    text = re.sub(r"\n{3,}", "\n\n", text)
    console.print(Text.assemble(("$ ", "dim"), (shlex.join(["proxytune", *words]), "bold")), soft_wrap=True)
    for line in text.split("\n"):
        console.print(Text.from_ansi(line), soft_wrap=True)
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    form = re.sub(r"\s*<!--.*?-->", "", form).replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")
    form = form.replace("viewBox=", 'width="{width}" height="{height}" viewBox=', 1)
    svg = console.export_svg(title="proxytune", code_format=form, unique_id=name)
    (PICTURES / f"{name}.svg").write_text(svg, "utf-8")


def demo() -> None:
    """The demo: answers side by side, and the table."""
    draw("demo", ["demo", "--problems", "40", "--seed", "7"])


def explain() -> None:
    """An explanation in the terminal."""
    draw("explain", ["explain", *PAGES["beethoven"].words])


def chat() -> None:
    """A question in chat, and what other alphas answer."""
    draw("chat", ["chat", "demo"], "Which country is the city of Lyon in?\n/compare 0 0.3 1\n")


# -- pages ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def chromium() -> Iterator[Chrome]:
    """A window of the distribution's Chromium, which keeps logs of the console and of what it asks for.

    Raises:
        FileNotFoundError: where it or its driver is missing; selenium would download one.
    """
    driver, program = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or program is None:
        raise FileNotFoundError("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = program
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options, ChromeService(executable_path=driver)) as window:
        yield window


def look(window: Chrome, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
    """Make a window so many pixels large, light or dark; a narrow one is a phone's."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def gallery() -> None:
    """The pages of the gallery."""
    for name, shown in PAGES.items():
        terminal(["explain", *shown.words, "--html", str(GALLERY / f"{name}.html")])


def pages() -> None:
    """The pages of the gallery in Chromium: each with one token's card, and the first dark and on a phone too."""
    with chromium() as window:
        for name in PAGES:
            look(window, 1100, 780)
            shoot(window, name, name)
        first = next(iter(PAGES))
        look(window, 1100, 780, dark=True)
        shoot(window, first, "dark")
        look(window, 390, 844)
        shoot(window, first, "phone")


def shoot(window: Chrome, name: str, picture: str) -> None:
    """Open a page at the token and the alpha that are to be shown, and write what the window shows."""
    from PIL import Image

    shown = PAGES[name]
    window.get((GALLERY / f"{name}.html").as_uri())
    if shown.alpha is not None:
        window.execute_script("set(arguments[0])", shown.alpha)
    window.execute_script("show(arguments[0], true); scrollTo(0, 0)", shown.token - 1)
    image = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB").quantize(COLOURS)
    image.save(PICTURES / f"{picture}.png", optimize=True)


PARTS = {"demo": demo, "explain": explain, "chat": chat, "gallery": gallery, "pages": pages}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=["all", *PARTS], default="all", help=", ".join(PARTS)
    )
    given = parser.parse_args()
    os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color", COLORTERM="truecolor")
    for place in (PICTURES, GALLERY):
        place.mkdir(exist_ok=True)
    for part in PARTS if "all" in given.parts else given.parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
