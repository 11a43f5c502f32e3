"""What several commands share: arguments of theirs, loading, and how things are shown."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from proxytune.errors import ProxyTuneError
from proxytune.recipe.place import check_place
from proxytune.training.processes import is_main, n_processes

if TYPE_CHECKING:
    from rich.progress import Progress

    from proxytune.model import ProxyTunedForCausalLM
    from proxytune.recipe.config import ProxyTuneConfig
    from proxytune.recipe.options import LoadingOptions

__all__ = [
    "FAILED",
    "JsonFile",
    "Recipe",
    "count",
    "drop_stdout",
    "fail",
    "live_bar",
    "load_model",
    "number_text",
    "progress_bar",
    "read_lines",
    "resumable",
    "say",
    "share_bar",
    "show_table",
    "size",
    "write_json",
    "write_out",
]

FAILED = 2
PATIENCE = 30.0  # seconds


def _placed(recipe: str) -> str:
    """Refuse a recipe that is not there at once: the modules that load one take seconds to import."""
    check_place(recipe)
    return recipe


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe directory, hub id, or `demo`.", callback=_placed)]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there too.")]


# -- reading and showing ------------------------------------------------------------------------------------
def number_text(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def fail(message: str) -> NoReturn:
    """Tell what is wrong in one line and leave."""
    if not is_main():  # the main process meets the same error and tells it; then the launcher ends this one
        time.sleep(PATIENCE)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(FAILED)


def say(message: str) -> None:
    """Tell the user something that is no result; of several processes the main one does."""
    if is_main():
        typer.echo(message, err=True)


def drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that leaving does not fail on it a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count(number: int) -> str:
    """A count of parameters: 6.74 B, 135 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def size(n_bytes: int) -> str:
    """Bytes in binary units: 12.6 GiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.{0 if n_bytes >= 100 * scale else 1}f} {unit}"
    return f"{n_bytes} B"


def write_out(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write what ``--json FILE`` asks for, if it was given."""
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def read_lines(path: str) -> list[bytes]:
    """The lines of a file, or of stdin for ``-``."""
    if path == "-":
        return sys.stdin.buffer.readlines()
    with open(path, "rb") as file:
        return file.readlines()


def load_model(config: ProxyTuneConfig, loading: LoadingOptions) -> tuple[ProxyTunedForCausalLM, Any]:
    """The model, and the recipe's tokenizer (the base's where the recipe has none)."""
    from proxytune.model import ProxyTunedForCausalLM
    from proxytune.recipe.members import Loading, load_recipe_tokenizer

    console = Console(stderr=True)
    with console.status("loading the members") if console.is_terminal else contextlib.nullcontext():
        model = ProxyTunedForCausalLM.from_pretrained(str(config.name_or_path), config=config, **loading.of_model())
        own = load_recipe_tokenizer(config, Loading(trust_remote_code=loading.trust_remote_code))
        tokenizer = model.tokenizer if own is None else own
    if tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
    return model, tokenizer


@contextlib.contextmanager
def live_bar(*, counted: bool) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal: how many of how many are done (``counted``), or the share that is."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console, text = Console(stderr=True), TextColumn("{task.description}")
    if not (console.is_terminal and is_main()):
        yield None
        return
    columns = (
        (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        if counted
        else (BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TimeRemainingColumn(), text)
    )
    # Never let rich redirect stdout: it carries the results.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True) as bar:
        yield bar


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function that advances it by a number of prompts."""
    with live_bar(counted=True) if shown and total > 1 else contextlib.nullcontext() as bar:
        if bar is None:
            yield lambda n: None
        else:
            task = bar.add_task("prompts", total=total)
            yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def share_bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, or a line each half minute where that is no terminal.

    Yields a function that is told what is being done and the share that is done.
    """
    with live_bar(counted=False) as bar:
        if bar is None:
            yield _lines()
        else:
            task = bar.add_task("", total=1.0)
            yield lambda said, share: bar.update(task, completed=share, description=said)


def _lines(every: float = 30.0) -> Callable[[str, float], None]:
    """Tells what is being done in lines, ``every`` so many seconds."""
    began = told = time.monotonic()
    first: float | None = None  # a run that goes on does not begin at 0

    def tell(said: str, share: float) -> None:
        nonlocal told, first
        now = time.monotonic()
        first = share if first is None else first
        if now - told < every:
            return
        told = now
        rest = (now - began) * (1 - share) / (share - first) if share > first else None
        left = "" if rest is None else f", about {_duration(rest)} left"
        say(f"{said}, {100 * share:.0f} % after {_duration(now - began)}{left}")

    return tell


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def resumable(kept: str, *, add: str = "") -> Iterator[None]:
    """Within it Ctrl-C says that work is kept, and the command that goes on with it.

    Args:
        kept: what is kept, and where. add: an option that the command needs in order to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        words = ["proxytune", *sys.argv[1:], *([add] if add and add not in sys.argv else [])]
        command = f"this goes on from there: {shlex.join(words)}"
        if n_processes() > 1:  # whose launcher is not known here
            command = f"the same command with {add} goes on from there"
        say(f"interrupted; {kept}, and {command}")
        raise typer.Exit(130) from None


def show_table(headings: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, numbers to the right, as wide as it needs to be; ``headings`` with | between them."""
    from rich import box
    from rich.table import Table

    table = Table(*headings.split("|"), box=box.MARKDOWN, highlight=False)
    for column, cells in zip(table.columns, zip(*rows)):
        column.no_wrap = True
        if any(cell[:1].isdigit() or cell[:1] in "+-–" for cell in cells):
            column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console(width=250, highlight=False)
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()) + "\n")
