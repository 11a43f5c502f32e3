"""``proxytune train``: its options, and what it shows while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from proxytune.cli.options import counting_bar, panel
from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:
    from proxytune.training.run import Progress

__all__ = ["train"]


def train(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to be made: the recipe, M+ in it.", show_default=False)
    ],
    data: Annotated[
        str,
        panel(
            "Data",
            "--data",
            metavar="FILE|NAME",
            help="JSONL, JSON, CSV, TSV or Parquet, or a data set (NAME or NAME:CONFIG), with the columns prompt and "
            "completion, or messages.",
        ),
    ],
    base: Annotated[str | None, panel("Members", "--base", metavar="MODEL", help="M, which is to be steered.")] = None,
    anti_expert: Annotated[
        str | None, panel("Members", "--anti-expert", metavar="MODEL", help="M-, which M+ is made of.")
    ] = None,
    recipe: Annotated[
        str | None,
        panel(
            "Members",
            "--recipe",
            metavar="RECIPE",
            help="Take base and anti-expert from a recipe, or from `demo`, in place of naming them.",
        ),
    ] = None,
    name: Annotated[
        str | None, panel("Members", "--name", metavar="NAME", help="The expert's name; the recipe's, or `expert`.")
    ] = None,
    alpha: Annotated[
        float | None, panel("Members", "--alpha", "-a", metavar="NUMBER", help="Its strength; the recipe's, or 1.")
    ] = None,
    split: Annotated[
        str, panel("Data", "--split", metavar="SPLIT", help="Of a data set.", show_default=True)
    ] = "train",
    prompt: Annotated[
        str | None,
        panel("Data", "--prompt", metavar="TEXT", help="Make prompts of other columns: 'Question: {question}'."),
    ] = None,
    completion: Annotated[
        str | None, panel("Data", "--completion", metavar="TEXT", help="Make completions: ' {answer}'.")
    ] = None,
    max_length: Annotated[
        int | None,
        panel(
            "Data",
            "--max-length",
            metavar="N",
            help="Most tokens of a row; 2048, or what the members can read. Longer rows are cut, and counted.",
        ),
    ] = None,
    full: Annotated[bool, panel("What is trained", "--full", help="All of M-'s weights, not a LoRA adapter.")] = False,
    rank: Annotated[
        int, panel("What is trained", "--rank", metavar="N", help="The adapter's rank.", show_default=True)
    ] = 16,
    lora_alpha: Annotated[
        int | None, panel("What is trained", "--lora-alpha", metavar="N", help="Its alpha; twice the rank.")
    ] = None,
    targets: Annotated[
        str,
        panel(
            "What is trained",
            "--targets",
            metavar="NAME,…",
            help="The modules that get one: all-linear, or q_proj,v_proj …",
            show_default=True,
        ),
    ] = "all-linear",
    consistent: Annotated[
        bool,
        panel(
            "What is trained",
            "--consistent",
            help="Train inside the mixture: the loss is taken of base + alpha * (expert - anti-expert).",
        ),
    ] = False,
    hidden_cache: Annotated[
        str,
        panel(
            "What is trained",
            "--hidden-cache",
            metavar="auto|off|DIR",
            help="With --consistent, where the frozen members' hidden states are kept: in OUT while it trains, if it "
            "is longer than an epoch; nowhere; or in DIR, for later runs too.",
            show_default=True,
        ),
    ] = "auto",
    epochs: Annotated[
        float, panel("How", "--epochs", metavar="N", help="Passes over the data.", show_default=True)
    ] = 2.0,
    max_steps: Annotated[
        int | None, panel("How", "--max-steps", metavar="N", help="This many steps in place of epochs.")
    ] = None,
    lr: Annotated[
        float | None,
        panel("How", "--lr", metavar="RATE", help="Peak learning rate; 2e-4 for an adapter, 2e-5 with --full."),
    ] = None,
    warmup: Annotated[
        float, panel("How", "--warmup", metavar="SHARE", help="Of the steps; then it falls to 0.", show_default=True)
    ] = 0.03,
    batch_size: Annotated[int, panel("How", "--batch-size", metavar="N", help="Rows a step.", show_default=True)] = 128,
    micro_batch: Annotated[
        int | None,
        panel("How", "--micro-batch", metavar="N", help="Rows in memory at once; it divides the batch. At most 8."),
    ] = None,
    precision: Annotated[
        str,
        panel(
            "How",
            "--precision",
            metavar="auto|bf16|fp16|float32",
            help="Mixed precision; bf16 where the hardware has it.",
            show_default=True,
        ),
    ] = "auto",
    no_gradient_checkpointing: Annotated[
        bool, panel("How", "--no-gradient-checkpointing", help="Faster, for more memory.")
    ] = False,
    seed: Annotated[
        int, panel("How", "--seed", metavar="N", help="Of the adapter and the order of rows.", show_default=True)
    ] = 0,
    save_every: Annotated[
        int | None,
        panel("The run", "--save-every", metavar="N", help="Steps between checkpoints; a tenth of the run."),
    ] = None,
    resume: Annotated[
        bool, panel("The run", "--resume", help="Go on where a killed run with the same options was.")
    ] = False,
    trust_remote_code: Annotated[
        bool, panel("The run", "--trust-remote-code", help="Run code that the members bring along.")
    ] = False,
) -> None:
    """Make an expert of a small model and data, and the recipe that steers a large one with it.

    M+ begins as the anti-expert M- and is trained on the completions alone, by TRL's SFTTrainer; the defaults are the
    paper's. OUT is then a recipe: proxytune check OUT. Logs for TensorBoard lie in OUT/training/logs.
    """
    from proxytune.recipe.config import Member
    from proxytune.training.run import Settings, members_of
    from proxytune.training.run import train as run

    if recipe is not None:
        if base is not None or anti_expert is not None:
            raise ProxyTuneError("--recipe names the members; leave out --base and --anti-expert")
        made_base, made_anti, known_name, known_alpha = members_of(recipe)
    elif base is None or anti_expert is None:
        raise ProxyTuneError("name the members with --base and --anti-expert, or take them with --recipe")
    else:
        made_base, made_anti, known_name, known_alpha = Member(base), Member(anti_expert), "expert", 1.0
    settings = Settings(
        base=made_base,
        anti_expert=made_anti,
        data=data,
        split=split,
        prompt=prompt,
        completion=completion,
        name=known_name if name is None else name,
        alpha=known_alpha if alpha is None else alpha,
        consistent=consistent,
        hidden_cache=hidden_cache,
        full=full,
        rank=rank,
        lora_alpha=lora_alpha,
        targets=targets,
        epochs=epochs,
        max_steps=max_steps,
        lr=lr,
        warmup=warmup,
        batch_size=batch_size,
        micro_batch=micro_batch,
        max_length=max_length,
        precision=precision,
        gradient_checkpointing=not no_gradient_checkpointing,
        save_every=save_every,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with _shown() as report:
        trained = run(settings, out, resume=resume, report=report)
    for note in trained.notes:
        typer.echo(f"note: {note}", err=True)
    loss = trained.manifest["loss"]
    if loss is not None:
        typer.echo(f"loss {loss['first']:.4g} -> {loss['last']:.4g} in {trained.manifest['steps']} steps", err=True)
    typer.echo(f"wrote {out}; try it: proxytune generate {out} PROMPT", err=True)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal's stderr; elsewhere a line for each twentieth of the steps."""
    with _quiet_libraries():
        console = Console(stderr=True)
        if not console.is_terminal:
            yield _line
            return
        with counting_bar(console) as bar:
            task = bar.add_task("", total=None)
            doing = ""

            def report(now: Any) -> None:
                nonlocal doing
                if now.doing != doing:
                    doing = now.doing
                    bar.reset(task, total=now.steps)
                loss = "" if now.loss is None else f", loss {now.loss:.3f}"
                bar.update(task, completed=now.step, total=now.steps, description=now.doing + loss)

            yield report


def _line(now: Progress) -> None:
    if now.loss is None:
        if now.step in (0, now.steps):
            typer.echo(now.doing, err=True)
    elif now.step in (1, now.steps) or now.step % max(1, now.steps // 20) == 0:
        typer.echo(f"{now.doing} {now.step}/{now.steps}  loss {now.loss:.4f}  lr {now.lr:.2e}", err=True)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No bars of datasets' own, and none of the libraries' advice on options that we set ourselves."""
    import warnings

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):  # what is missing is told by the run
            from datasets import disable_progress_bars, enable_progress_bars

            disable_progress_bars()
            stack.callback(enable_progress_bars)
        yield
