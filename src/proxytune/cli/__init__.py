"""The command line: ``proxytune new``, ``train``, ``check``, ``generate``, ``chat``, ``serve``, ``demo``, ``eval`` …

Thin on purpose: each command reads its options, calls the module that does the work, and shows what comes back.
Results go to stdout, everything else to stderr. What was raised on purpose is told in one sentence, with status 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from proxytune.cli.answers import demo, generate, serve
from proxytune.cli.chat import chat
from proxytune.cli.evaluation import evaluate, score, sweep
from proxytune.cli.flags import flat
from proxytune.cli.recipes import check, new
from proxytune.cli.shared import drop_stdout, fail, say
from proxytune.cli.speed import bench, plan
from proxytune.cli.training import train
from proxytune.errors import ProxyTuneError

__all__ = ["app", "main"]


def _flags(parameters: list[Any]) -> list[Any]:
    """Options that take no value, without the word <bool> behind them."""
    for each in parameters:
        if getattr(each, "is_flag", False) and each.metavar is None:
            each.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, as the help shows them."""
        return _flags(super().get_params(ctx))


class Commands(TyperGroup):
    """The commands, with every foreseen failure told in one sentence."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before the command, as the help shows them."""
        return _flags(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()  # here, where a full disk can still be told
            return value
        except ProxyTuneError as error:
            fail(str(error))
        except BrokenPipeError:  # the reader has seen enough, as in `| head`
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


app = typer.Typer(
    cls=Commands,
    help="Steer a language model at decoding time with two small ones: logits = base + alpha * (expert - anti_expert).",
    epilog="RECIPE is a directory made by `proxytune new`, a hub id, or the word demo for the embedded recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line (the entry point ``proxytune``)."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")  # their advice on options that we set ourselves is not the user's concern
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too; ours stand in their place
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from proxytune import __version__

        typer.echo(f"proxytune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., None]] = {
    "new": new,
    "train": train,
    "check": check,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "eval": evaluate,
    "sweep": sweep,
    "bench": bench,
    "score": score,
    "plan": plan,
}
for name, command in COMMANDS.items():
    passes_on = {"allow_extra_args": True, "ignore_unknown_options": True} if command is serve else None
    app.command(name, cls=Command, context_settings=passes_on)(flat(command))
