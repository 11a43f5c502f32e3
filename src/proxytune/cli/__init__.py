"""The command line: ``proxytune new``, ``train``, ``check``, ``generate``, ``chat``, ``serve``, ``demo``, ``eval`` …

Thin on purpose: each command reads its options, calls the module that does the work, and shows what comes back.
Results go to stdout, everything else to stderr. What was raised on purpose is told in one sentence, with status 2.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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


class Commands(TyperGroup):
    """The commands, with every foreseen failure told in one sentence."""

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
    add_completion=False,
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


app.command()(flat(new))
app.command()(flat(train))
app.command()(flat(check))
app.command()(flat(generate))
app.command()(flat(chat))
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(demo)
app.command("eval")(flat(evaluate))
app.command()(flat(sweep))
app.command()(flat(bench))
app.command()(flat(score))
app.command()(flat(plan))
