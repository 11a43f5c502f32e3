"""What several commands share: options, how they are read, and how things are shown."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:
    from rich.progress import Progress

    from proxytune.answers.generation import Sampling
    from proxytune.model import ProxyTunedForCausalLM
    from proxytune.recipe.config import ProxyTuneConfig

__all__ = [
    "FAILED",
    "Alpha",
    "DeviceMap",
    "Dtype",
    "JsonFile",
    "MaxNewTokens",
    "MinP",
    "Pack",
    "Recipe",
    "Speculate",
    "System",
    "Temperature",
    "TopK",
    "TopP",
    "TrustRemoteCode",
    "checked_dtype",
    "count",
    "counting_bar",
    "drafts_of",
    "drop_stdout",
    "fail",
    "load_model",
    "number_text",
    "panel",
    "progress_bar",
    "read_lines",
    "sampling_of",
    "say",
    "share_bar",
    "show_table",
    "size",
    "write_out",
]

FAILED = 2


def panel(title: str, *names: str, **options: Any) -> Any:
    """An option in a panel of the help, its default not shown unless asked."""
    return typer.Option(*names, rich_help_panel=title, **{"show_default": False, **options})


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe directory, hub id, or `demo`.", show_default=False)
]
Alpha = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        "-a",
        metavar="NUMBER|NAME=NUMBER",
        help="Strength of steering in place of the recipe's, for all experts or for one; repeatable.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Most new tokens of an answer.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T", help="Sample at this temperature; 0 is greedy.", rich_help_panel="Sampling", show_default=False
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the likeliest tokens that sum to P.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="K",
        help="Sample from the K likeliest tokens.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        help="Sample from tokens at least P times as likely as the likeliest.",
        rich_help_panel="Sampling",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float16|bfloat16|auto",
        help="Dtype of members whose entry in the recipe sets none; the checkpoint's by default.",
        rich_help_panel="Loading",
        show_default=False,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto|DEVICE",
        help="Where members go whose entry sets none: auto, cpu, cuda:1.",
        rich_help_panel="Loading",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything there too.", show_default=False)
]
Pack = Annotated[
    bool,
    typer.Option(
        "--pack",
        help="Lay the weights out for the CPU first: several times faster there, for float32 and bfloat16.",
        rich_help_panel="Speed",
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        metavar="auto|off|N",
        help="Let an expert draft N tokens ahead, which the base then verifies at once: where it pays, never, or "
        "always. Answers stay the same, sampled ones too.",
        rich_help_panel="Speed",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the members bring along.", rich_help_panel="Loading"),
]
System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="System prompt of the chat templates; a member's own comes first.", show_default=False
    ),
]


# -- reading and showing ------------------------------------------------------------------------------------
def number_text(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def fail(message: str) -> NoReturn:
    """Tell what is wrong in one line and leave."""
    say(f"error: {' '.join(message.split())}")
    raise typer.Exit(FAILED)


def say(message: str) -> None:
    """Tell the user something that is no result."""
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


def sampling_of(
    temperature: float | None, top_p: float | None, top_k: int | None, min_p: float | None, seed: int
) -> Sampling:
    """How tokens are chosen, from the options."""
    from proxytune.answers.generation import Sampling

    return Sampling(temperature, top_p, top_k, min_p, seed)


def drafts_of(text: str) -> str | bool | int:
    """What ``--speculate`` says, as `generate` takes it."""
    if text not in ("auto", "off") and not text.isdecimal():
        raise ProxyTuneError(f"--speculate {text!r} is not auto, off or a number of drafts")
    return int(text) if text.isdecimal() else (text if text == "auto" else False)


def checked_dtype(text: str | None) -> str | None:
    """``--dtype``, if it is one."""
    from proxytune.recipe.options import DTYPES

    if text is not None and text not in DTYPES:
        raise ProxyTuneError(f"--dtype {text!r} is not one of {', '.join(DTYPES)}")
    return text


def read_lines(path: str) -> list[bytes]:
    """The lines of a file, or of stdin for ``-``."""
    if path == "-":
        return sys.stdin.buffer.readlines()
    with open(path, "rb") as file:
        return file.readlines()


def load_model(
    config: ProxyTuneConfig,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    speculate: str | bool | int,
    pack: bool,
) -> tuple[ProxyTunedForCausalLM, Any]:
    """The model, and the recipe's tokenizer (the base's where the recipe has none)."""
    from proxytune.model import ProxyTunedForCausalLM
    from proxytune.recipe.members import Loading, load_recipe_tokenizer
    from proxytune.recipe.options import device_map as parsed

    console = Console(stderr=True)
    with console.status("loading the members") if console.is_terminal else contextlib.nullcontext():
        model = ProxyTunedForCausalLM.from_pretrained(
            str(config.name_or_path),
            config=config,
            dtype=checked_dtype(dtype),
            device_map=None if device_map is None else parsed(device_map),
            member_trust_remote_code=trust_remote_code,
            speculate=speculate,
            pack=pack,
        )
        own = load_recipe_tokenizer(config, Loading(trust_remote_code=trust_remote_code))
        tokenizer = model.tokenizer if own is None else own
    if tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
    return model, tokenizer


def counting_bar(console: Console) -> Progress:
    """A bar with its task's description, how many of how many are done, and the time."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Never let rich redirect stdout: it carries the results.
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True)


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar on stderr; yields a function that advances it by a number of prompts."""
    console = Console(stderr=True)
    if not (shown and total > 1 and console.is_terminal):
        yield lambda n: None
        return
    with counting_bar(console) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def share_bar() -> Iterator[Any]:
    """A progress bar on stderr; yields a function that is told what is being done and the share that is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True)
    if not console.is_terminal:
        yield lambda said, share: None
        return
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda said, share: bar.update(task, completed=share, description=said)


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
