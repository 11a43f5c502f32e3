"""The command line: ``proxytune new``, ``train``, ``check``, ``generate``, ``chat``, ``serve``, ``demo``, ``eval`` …

Kept thin: each command reads its options, calls the module that does the work, and shows the result. Results go to
stdout, everything else to stderr. An expected failure prints one sentence and exits with status 2.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from proxytune.cli.command import Command, without_types
from proxytune.cli.flags import flat
from proxytune.cli.shared import LIBRARIES, drop_stdout, fail, say
from proxytune.errors import ProxyTuneError

__all__ = ["COMMANDS", "app", "main"]

# Name -> the place of its function, and its line in the list of commands. A command's module is imported when it runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "new": ("recipes:new", "Make a recipe: a model directory that names its members and how they mix."),
    "presets": ("recipes:presets", "List the recipes that `new --preset` starts from."),
    "train": (
        "training:train",
        "Train an expert from a small model and data, and make the recipe that steers with it.",
    ),
    "check": ("recipes:check", "Check whether a recipe works and what memory it needs."),
    "generate": ("answers:generate", "Continue prompts with a steered model."),
    "explain": ("explain:explain", "Show why each token of an answer was chosen, in the terminal or as a page."),
    "analyze": ("analyze:analyze", "Show what steering did over a set of traces, by class of token."),
    "limit": ("limit:limit", "Show which gold answers steering can reach, and where the base cannot say them."),
    "doctor": ("doctor:doctor", "Examine on a sample whether steering with this pair pays off, and why."),
    "chat": ("chat:chat", "Chat with a steered model."),
    "serve": ("answers:serve", "Serve a recipe with an OpenAI-compatible server, transformers' or vLLM's."),
    "demo": ("answers:demo", "Show proxy-tuning at work on a small real model."),
    "tasks": ("evaluation:tasks", "List the tasks that `eval`, `sweep` and `score` know."),
    "eval": ("evaluation:evaluate", "Evaluate a recipe, its members and controls on the same prompts."),
    "sweep": ("evaluation:sweep", "Evaluate a recipe at several alphas."),
    "score": ("evaluation:score", "Score a file of predictions."),
    "bench": ("speed:bench", "Measure what steering costs."),
    "plan": ("speed:plan", "Predict what steering will cost, without loading anything."),
}


class Commands(TyperGroup):
    """The commands, each imported on use. Every expected failure prints one sentence."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before the command, as the help shows them."""
        return without_types(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words begin with, or an error that names the most similar one."""
        if args and args[0] not in COMMANDS:
            self.commands = {name: Command(name) for name in COMMANDS}  # the names that the error suggests from
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """A command, its module imported."""
        if name not in COMMANDS:
            return None
        if name not in self.commands:
            module, _, function = COMMANDS[name][0].partition(":")
            self.commands[name] = _command(getattr(import_module(f"proxytune.cli.{module}"), function), name)
        return self.commands[name]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, without importing them."""
        self.commands = {name: Command(name, short_help=summary) for name, (_, summary) in COMMANDS.items()}
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # here, where a full disk can still be reported
            return value
        except ProxyTuneError as error:
            fail(str(error))
        except BrokenPipeError:  # the reader has closed the pipe, as in `| head`
            drop_stdout()
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's
                raise
            fail("out of memory; `proxytune check` says what a recipe needs, --dtype and --device-map change it")
        except OSError as error:
            drop_stdout()
            where = f"{error.filename}: " if error.filename else ""
            kept = "; what was written before is kept" if where and error.errno == errno.ENOSPC else ""
            fail(f"{where}{error.strerror or error}{kept}")


def _command(function: Any, name: str) -> Any:
    """One command, as typer builds it."""
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    passes_on = {"allow_extra_args": True, "ignore_unknown_options": True} if name == "serve" else {}
    settings = {"help_option_names": ["-h", "--help"], **passes_on}
    alone.command(name, cls=Command, context_settings=settings)(flat(function))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="Steer a language model at decoding time with two small ones: logits = base + alpha * (expert - anti_expert).",
    epilog="RECIPE is a directory made by `proxytune new`, a hub id, or an embedded recipe (demo, demo-word-problems). "
    "`proxytune COMMAND --help` explains a command and gives examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes takes a quarter of a second
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line (the entry point ``proxytune``)."""
    for name in LIBRARIES:
        os.environ.setdefault(name, "error")  # users need no advice on options that we set ourselves
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' bars, which ours replace
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from proxytune import __version__

        typer.echo(f"proxytune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
