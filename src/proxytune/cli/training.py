"""``proxytune train``: its options, and its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli.flags import Settings
from proxytune.cli.shared import counted_bar, draws_bars, resumable, say
from proxytune.training.options import TrainingOptions

if TYPE_CHECKING:
    from proxytune.training.callbacks import Progress

__all__ = ["train"]


def train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create: the recipe, with M+ in it.")],
    options: TrainingOptions,
    settings: Settings,
) -> None:
    """Train an expert from a small model and data, and make the recipe that steers a large model with it.

    The expert M+ starts as the anti-expert M- and learns the completions, with TRL's SFTTrainer. The defaults are the
    paper's. OUT is then a recipe: try proxytune check OUT. Logs for TensorBoard are in OUT/training/logs.

    Examples:

        proxytune train mine --data answers.jsonl --base ./big --anti-expert ./small
        proxytune train mine --data gsm8k:main --prompt "Question: {question}" --completion " {answer}" --recipe demo
        proxytune train again --config mine/training/manifest.json --seed 1
    """
    options.check(out)
    from proxytune.training.run import train as run

    with resumable(f"the checkpoints so far are kept in {out}", add="--resume"), _shown() as report:
        trained = run(options, out, settings=settings, report=report, note=lambda text: say(f"note: {text}"))
    for line in _losses(trained.manifest):
        say(line)
    say(f"wrote {out}; try it: proxytune generate {out} PROMPT")


def _losses(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The first and last losses of a run, in words."""
    if (loss := manifest["loss"]) is not None:
        yield f"loss {loss['first']:.4f} -> {loss['last']:.4f} in {manifest['steps']} steps"
    if (validated := manifest.get("validation")) is not None:
        first, best = validated["losses"][0], validated["best"]
        end = f"; stopped early, at step {manifest['steps']}" if validated["stopped_early"] else ""
        yield (
            f"validation loss {first['loss']:.4f} at step {first['step']} -> {best['loss']:.4f} at step "
            f"{best['step']}, which is kept{end}"
        )


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on stderr; if that is not a terminal, one line per twentieth of the steps."""
    with _quiet_libraries():
        if not draws_bars():
            yield _line
            return
        losses = {}
        with counted_bar() as bar:

            def report(now: Progress) -> None:
                for name, loss in (("loss", now.loss), ("validation loss", now.validation)):
                    if loss is not None:
                        losses[name] = f", {name} {loss:.3f}"  # the last line of each kind stays visible
                shown = "".join((now.doing, *losses.values())) if now.doing == "training" else now.doing
                bar(shown, now.step, now.steps)

            yield report


def _line(now: Progress) -> None:
    if now.validation is not None:
        say(f"{now.doing} {now.step}/{now.steps}  validation loss {now.validation:.4f}")
    elif now.loss is None:
        if now.step in (0, now.steps):
            say(now.doing)
    elif now.step in (1, now.steps) or now.step % max(1, now.steps // 20) == 0:
        say(f"{now.doing} {now.step}/{now.steps}  loss {now.loss:.4f}  lr {now.lr:.2e}")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the bars of datasets, and the libraries' advice on options that we set ourselves."""
    import warnings

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):  # the run reports what is missing
            from datasets import disable_progress_bars, enable_progress_bars

            disable_progress_bars()
            stack.callback(enable_progress_bars)
        yield
