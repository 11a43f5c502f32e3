"""Code that several commands share: arguments, loading, and output."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from proxytune.errors import ProxyTuneError, Unfinished
from proxytune.options import option
from proxytune.processes import is_main, n_processes
from proxytune.recipe.place import check_place

if TYPE_CHECKING:
    from proxytune.analysis.references import Reference
    from proxytune.answers.options import AnswerOptions, Sampling
    from proxytune.model import ProxyTunedForCausalLM
    from proxytune.recipe.config import ProxyTuneConfig
    from proxytune.recipe.options import LoadingOptions
    from proxytune.tables import Table

__all__ = [
    "FAILED",
    "LIBRARIES",
    "UNFINISHED",
    "Recipe",
    "ResultOptions",
    "RunOptions",
    "asked_of",
    "check_seed",
    "complain",
    "count",
    "counted_bar",
    "draws_bars",
    "drop_stdout",
    "fail",
    "is_quiet",
    "load_model",
    "number_text",
    "progress_bar",
    "read_gold",
    "read_lines",
    "resumable",
    "say",
    "share_bar",
    "show",
    "size",
    "spinner",
    "talking",
    "write_out",
]

FAILED, UNFINISHED = 2, 3
PATIENCE = 30.0  # seconds


def _placed(recipe: str) -> str:
    """Refuse a recipe that does not exist, before importing modules that take seconds."""
    check_place(recipe)
    return recipe


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe directory, hub id, or `demo`.", callback=_placed)]


def check_seed(sampling: Sampling, given: Mapping[str, Any]) -> None:
    """Refuse ``--seed`` among the ``given`` flags if nothing is sampled."""
    if "--seed" in given and sampling.greedy:
        raise ProxyTuneError(
            "these answers are greedy, so --seed would change nothing; sample with --temperature T, or leave --seed out"
        )


@dataclass(frozen=True)
class ResultOptions:
    """Where a command's results go, besides the printed tables."""

    json: bool = option(False, "Print one JSON object instead of tables.", panel="Results")
    output: Path | None = option(
        None, "Also write the JSON to this file.", flag="--output -o", metavar="FILE", panel="Results"
    )

    def __post_init__(self) -> None:
        if self.output is not None:
            there = self.output.exists()
            self.output.open("a").close()  # find out now, not after an hour, that it cannot be written
            if not there:
                self.output.unlink()

    def give(self, values: dict[str, Any], *parts: Table | str) -> None:
        """Write and print results: ``values`` as JSON, or tables and lines of text."""
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        if self.output is not None:
            self.output.write_text(text, "utf-8")
        if self.json:
            write_out(text)
        else:
            show(*parts)


@dataclass(frozen=True)
class RunOptions(ResultOptions):
    """Where the results of a run go that can be continued: into a directory."""

    output: Path | None = option(None, flag="--json-file", metavar="FILE", hidden=True)  # what --json FILE was
    directory: Path | None = option(
        None,
        "Directory for all that the run writes. An interrupted run there is continued. By default the names of the "
        "command and the recipe, such as eval-demo.",
        flag="--output -o",
        metavar="DIR",
    )

    def place(self, command: str, recipe: str) -> Path:
        """The directory."""
        return self.directory or Path(f"{command}-{Path(recipe.rstrip('/')).name or 'recipe'}")


# -- what is printed, and how much of it ----------------------------------------------------------------------
LIBRARIES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")  # how much they report, as an environment variable
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def talking(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set what a command prints: only results and errors (``quiet``), or also the reports of libraries
    (``verbose``)."""
    before = {name: os.environ.get(name) for name in LIBRARIES}
    if verbose:
        import logging

        os.environ.update(dict.fromkeys(LIBRARIES, "warning"))
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    token = _QUIET.set(quiet)
    try:
        yield
    except ProxyTuneError:
        if verbose:
            import traceback

            traceback.print_exc()
        raise
    finally:
        _QUIET.reset(token)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _QUIET.get()


def say(message: str) -> None:
    """Print a message that is neither a result nor an error, unless --quiet was given. With several processes only the
    main one prints."""
    if is_main() and not _QUIET.get():
        typer.echo(message, err=True)


def complain(message: str) -> None:
    """Print an error as one line."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def fail(message: str) -> NoReturn:
    """Print an error and leave with status 2."""
    if not is_main():  # the main process has the same error and prints it; then the launcher ends this process
        time.sleep(PATIENCE)
    complain(message)
    raise typer.Exit(FAILED)


def show(*parts: Table | str) -> None:
    """Print tables and lines of text: for people at a terminal, as Markdown elsewhere."""
    from proxytune.tables import markdown, rendered

    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        for part in parts:
            if isinstance(part, str):
                console.print(part, markup=False)
            else:
                console.print(rendered(part, console.width))
    else:
        write_out("\n".join(part + "\n" if isinstance(part, str) else markdown([part]) for part in parts))


# -- reading and showing ------------------------------------------------------------------------------------
def number_text(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def drop_stdout() -> None:
    """Discard buffered output, so that exiting does not fail on it a second time."""
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


def read_lines(path: str) -> list[bytes]:
    """The lines of a file, or of stdin for ``-``."""
    if path == "-":
        return sys.stdin.buffer.readlines()
    with open(path, "rb") as file:
        return file.readlines()


def read_gold(path: str, lines: list[bytes]) -> tuple[list[Reference], list[str]]:
    """The prompts and gold answers in the ``lines`` of a file, and what is wrong with the others, which is printed.

    Raises:
        ProxyTuneError: if there are none.
    """
    from proxytune.analysis.references import read_references

    references, broken = read_references(lines)
    for why in broken:
        say(f"{path}, {why}")
    if not references:
        raise ProxyTuneError(f"{path} holds no gold answers")
    return references, broken


def asked_of(recipe: str, options: AnswerOptions) -> tuple[ProxyTuneConfig, tuple[float, ...]]:
    """A recipe with the rule and the gate of a call, and the call's alphas, one per expert.

    Raises:
        ProxyTuneError: for a negative prompt that no member reads, and for an alpha that does not fit the experts.
    """
    from proxytune.recipe.prompts import refuse_unread
    from proxytune.recipe.store import load_recipe

    config = load_recipe(recipe).with_mixing(options.combine, options.gate)
    refuse_unread(options.negative_prompt, (member.prompt for _, member in config.members()))
    return config, config.alphas_of(options.alpha)


def load_model(config: ProxyTuneConfig, loading: LoadingOptions) -> tuple[ProxyTunedForCausalLM, Any]:
    """Load the model and the recipe's tokenizer (the base's if the recipe has none)."""
    from proxytune.answers.text import load

    with spinner("loading the members"):
        return load(config, loading)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """A spinner on stderr, if that is a terminal."""
    if not draws_bars():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of the prompts that are done, of ``total``. Yields a function that adds a number of prompts."""
    if not shown or total < 2:
        yield lambda n: None
        return
    done = 0
    with counted_bar() as report:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            report("prompts", done, total)

        advance(0)
        yield advance


@contextlib.contextmanager
def counted_bar() -> Iterator[Callable[[str, int, int], None]]:
    """As :func:`share_bar`; the function takes what is being done, how many are done, and of how many."""
    began, first, of = 0.0, 0, -1
    with share_bar() as bar:

        def report(what: str, done: int, total: int) -> None:
            nonlocal began, first, of
            if total != of:  # another job; prompts of an interrupted run do not count in the rate
                began, first, of = time.monotonic(), done, total
            rate = f", {(done - first) / (time.monotonic() - began):.2g}/s" if done > first else ""
            bar(f"{what} {done}/{total}{rate}", done / max(total, 1))

        yield report


def draws_bars() -> bool:
    """Whether to draw progress: stderr is a terminal, and this is the main process."""
    return is_main() and not _QUIET.get() and sys.stderr.isatty()


@contextlib.contextmanager
def share_bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; if that is not a terminal, a line every half minute.

    Yields a function that takes what is being done and the share that is done.
    """
    if not draws_bars():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    share, text = TextColumn("{task.percentage:.0f} %"), TextColumn("{task.description}")
    columns = (BarColumn(), share, TimeElapsedColumn(), TimeRemainingColumn(), text)
    # Never let rich redirect stdout, which carries the results.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True) as bar:
        task, before = bar.add_task("", total=1.0), 0.0

        def report(what: str, share: float) -> None:
            nonlocal before
            if share < before:  # another job
                bar.reset(task)
            before = share
            bar.update(task, completed=share, description=what)

        yield report


def _lines(every: float = 30.0) -> Callable[[str, float], None]:
    """Prints progress as lines, one ``every`` so many seconds."""
    began = told = moving = time.monotonic()
    first: float | None = None  # a continued run does not begin at 0

    def tell(said: str, share: float) -> None:
        nonlocal told, first, moving
        now = time.monotonic()
        first = share if first is None else first
        if share <= first:  # the time for loading does not predict the rest
            moving = now
        if now - told < every:
            return
        told = now
        rest = (now - moving) * (1 - share) / (share - first) if share > first else None
        left = "" if rest is None else f", about {_duration(rest)} left"
        say(f"{said}, {100 * share:.0f} % after {_duration(now - began)}{left}")

    return tell


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def resumable(kept: str, *, add: str = "") -> Iterator[None]:
    """On Ctrl-C, say which work is kept, and which command continues it. Also, with status 3, if a budget is spent or a
    judge does not answer.

    Args:
        kept: what is kept, and where. add: an option that the command needs to continue.
    """
    try:
        yield
    except Unfinished as error:
        complain(f"{error}; {kept}, and the same command continues from there")
        raise typer.Exit(UNFINISHED) from None
    except KeyboardInterrupt:
        words = ["proxytune", *sys.argv[1:], *([add] if add and add not in sys.argv else [])]
        command = f"this command continues from there: {shlex.join(words)}"
        if n_processes() > 1:  # the launcher's command is not known here
            command = f"the same command with {add} continues from there"
        say(f"interrupted; {kept}, and {command}")
        raise typer.Exit(130) from None
