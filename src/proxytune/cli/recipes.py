"""``proxytune new`` and ``check``: recipes made, and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from proxytune.cli.options import (
    FAILED,
    Dtype,
    Recipe,
    TrustRemoteCode,
    checked_dtype,
    count,
    load_model,
    panel,
    say,
    size,
)
from proxytune.recipe.presets import PRESETS

if TYPE_CHECKING:
    from proxytune.recipe.check import Report

__all__ = ["check", "new"]


def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to be made.", show_default=False)],
    base: Annotated[str | None, panel("Members", "--base", metavar="MODEL", help="The model that is steered.")] = None,
    expert: Annotated[
        str | None, panel("Members", "--expert", metavar="MODEL", help="The model it is steered towards.")
    ] = None,
    anti_expert: Annotated[
        str | None, panel("Members", "--anti-expert", metavar="MODEL", help="What the expert was before it was tuned.")
    ] = None,
    alpha: Annotated[
        float | None, panel("Mixing", "--alpha", "-a", metavar="NUMBER", help="Strength; 1 by default.")
    ] = None,
    name: Annotated[
        str | None, panel("Mixing", "--name", metavar="NAME", help="The expert's name; `expert` by default.")
    ] = None,
    add_expert: Annotated[
        list[str] | None,
        panel(
            "Members",
            "--add-expert",
            metavar="NAME=EXPERT[,FIELD=VALUE…]",
            help="One more expert; fields: anti, alpha, adapter, and prompt, dtype, revision (anti-… for the "
            "anti-expert). With no EXPERT the adapter is on the anti-expert. Repeatable.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        panel(
            "Members",
            "--preset",
            metavar="NAME",
            help=f"A trio to start from, whose parts other options replace (none was run by us): {', '.join(PRESETS)}.",
        ),
    ] = None,
    expert_adapter: Annotated[
        str | None,
        panel(
            "Members",
            "--expert-adapter",
            metavar="PATH",
            help="LoRA adapter on the expert, or, without one, on the anti-expert.",
        ),
    ] = None,
    base_revision: Annotated[
        str | None, panel("Members", "--base-revision", metavar="REVISION", help="The base's branch, tag or commit.")
    ] = None,
    expert_revision: Annotated[
        str | None, panel("Members", "--expert-revision", metavar="REVISION", help="The expert's.")
    ] = None,
    anti_expert_revision: Annotated[
        str | None, panel("Members", "--anti-expert-revision", metavar="REVISION", help="The anti-expert's.")
    ] = None,
    base_prompt: Annotated[
        str | None,
        panel("Prompts", "--base-prompt", metavar="raw|chat|TEXT", help="What the base is shown; TEXT holds {prompt}."),
    ] = None,
    expert_prompt: Annotated[
        str | None, panel("Prompts", "--expert-prompt", metavar="raw|chat|TEXT", help="The expert's.")
    ] = None,
    anti_expert_prompt: Annotated[
        str | None, panel("Prompts", "--anti-expert-prompt", metavar="raw|chat|TEXT", help="The anti-expert's.")
    ] = None,
    system: Annotated[
        str | None,
        panel("Prompts", "--system", metavar="TEXT", help="System prompt of the members whose prompt is chat."),
    ] = None,
    response_prefix: Annotated[
        str | None,
        panel(
            "Prompts",
            "--response-prefix",
            metavar="TEXT",
            help="Words that answers begin with, such as 'Answer:', moved behind the members' own prompts.",
        ),
    ] = None,
    base_dtype: Annotated[
        str | None, panel("Loading", "--base-dtype", metavar="DTYPE", help="The base's: float32, bfloat16 …")
    ] = None,
    expert_dtype: Annotated[
        str | None, panel("Loading", "--expert-dtype", metavar="DTYPE", help="The expert's.")
    ] = None,
    anti_expert_dtype: Annotated[
        str | None, panel("Loading", "--anti-expert-dtype", metavar="DTYPE", help="The anti-expert's.")
    ] = None,
    base_device_map: Annotated[
        str | None, panel("Loading", "--base-device-map", metavar="DEVICE", help="Where it goes: auto, cuda:1.")
    ] = None,
    expert_device_map: Annotated[
        str | None, panel("Loading", "--expert-device-map", metavar="DEVICE", help="The expert.")
    ] = None,
    anti_expert_device_map: Annotated[
        str | None, panel("Loading", "--anti-expert-device-map", metavar="DEVICE", help="The anti-expert.")
    ] = None,
    plausibility: Annotated[
        float | None,
        panel("Mixing", "--plausibility", metavar="P", help="Choose only tokens with p_base >= P * max p_base."),
    ] = None,
    renamed_tokens: Annotated[
        str | None,
        panel(
            "Members",
            "--renamed-tokens",
            metavar="JSON",
            help="Ids whose token has another name in some member: what the message about vocabularies shows.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that is not empty.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not reach the hub; leave out what is not cached.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a recipe: a model directory that names its members and how they mix.

    A member is a hub id, a local directory or a .gguf file. Its weights stay where they are; the base's config,
    tokenizer and generation config are copied. Relative paths are kept relative to DIR.
    """
    from proxytune.recipe.compose import Given, compose, configure

    config = configure(
        preset=preset,
        base=Given(base, base_revision, base_dtype, base_prompt, base_device_map),
        expert=Given(expert, expert_revision, expert_dtype, expert_prompt, expert_device_map),
        anti_expert=Given(
            anti_expert, anti_expert_revision, anti_expert_dtype, anti_expert_prompt, anti_expert_device_map
        ),
        expert_adapter=expert_adapter,
        name=name,
        alpha=alpha,
        add_expert=add_expert or (),
        system=system,
        response_prefix=response_prefix,
        plausibility=plausibility,
        renamed_tokens=renamed_tokens,
    )
    notes = compose(config, directory, force=force, offline=offline, trust_remote_code=trust_remote_code)
    for note in notes:
        say(f"note: {note}")
    say(f"wrote {directory}; whether it works is told by: proxytune check {directory}")


def check(
    recipe: Recipe,
    run: Annotated[
        bool, typer.Option("--run", help="Load the recipe, and try it against the plain loop on its own models.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether a recipe works and what memory it needs; reads configs, tokenizers and the headers of weight files.

    What cannot be told so is listed as not checked. With --run the recipe is loaded, and a few texts that it writes are
    held against the paper's plain loop: at alpha 0, by default, without a cache, with and without drafts, and as a
    batch. The exit status is 0 if nothing is wrong, else 2.
    """
    from proxytune.recipe.check import check_recipe
    from proxytune.recipe.members import Loading
    from proxytune.recipe.store import load_recipe

    config = load_recipe(recipe)
    report = check_recipe(config, Loading(dtype=checked_dtype(dtype), trust_remote_code=trust_remote_code))
    console = Console()
    if not as_json:
        show_report(report, console)
    trials = []
    if run and not report.problems:
        from proxytune.answers.selftest import run_trials

        model, _ = load_model(config, dtype, None, trust_remote_code, "auto", pack=False)
        for trial in run_trials(model):
            trials.append(trial)
            if not as_json:
                word = {True: "[green]ok[/green]", False: "[red]failed[/red]", None: "[yellow]left out[/yellow]"}
                console.print(f"{word[trial.passed]} {trial.name}: {escape(trial.detail)}", highlight=False)
    if as_json:
        told = report.to_json() | ({"trials": [trial.to_json() for trial in trials]} if run else {})
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    if report.problems or any(trial.passed is False for trial in trials):
        raise typer.Exit(FAILED)


def show_report(report: Report, console: Console) -> None:
    """Print what ``check`` found: a table of the members, the totals, and what is wrong."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("member", overflow="fold")
    table.add_column("model", overflow="fold")
    for heading in ("params", "dtype", "weights", "KV/token", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in report.members:
        model = str(one.model) + (f" + {one.adapter}" if one.adapter else "")
        table.add_row(
            one.name,
            model + ("" if one.prompt == "raw" else f" [{one.prompt} prompt]").replace("[", "\\["),
            count(one.parameters),
            one.dtype.replace("bfloat", "bf").replace("float", "f"),
            size(one.weight_bytes) if not one.shares_with else f"+{size(one.weight_bytes)}",
            "unknown" if one.kv_bytes_per_token is None else size(one.kv_bytes_per_token),
            "any" if one.context is None else f"{one.context:,}",
        )
    if report.members:
        console.print(table)
        console.print()
    for one in report.members:
        if one.shares_with:
            console.print(f"{one.name} shares its weights with {one.shares_with}", highlight=False)
        if one.sliding_window:
            console.print(f"{one.name} has layers that keep only {one.sliding_window:,} tokens", highlight=False)
    if not report.problems:
        memory = f"weights {size(report.weight_bytes)}"
        if report.kv_bytes_per_token is not None:
            memory += f", cache {size(report.kv_bytes_per_token)} a token"
            if report.context is not None:
                memory += f" ({size(report.kv_bytes_per_token * report.context)} for the whole context)"
        console.print(f"memory: {memory}", highlight=False)
        if report.context is not None:
            shortest = next(one.name for one in report.members if one.context == report.context)
            console.print(f"context: {report.context:,} tokens, set by {shortest}", highlight=False)
        alpha = ", ".join(f"{name} {value:g}" for name, value in report.alpha.items())
        console.print(f"alpha: {alpha}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/yellow] {note}", highlight=False)
    for what in report.unchecked:
        console.print(f"[yellow]not checked[/yellow] {what}", highlight=False)
    for problem in report.problems:
        console.print(f"[red]wrong[/red] {problem}", highlight=False)
    if report.problems:
        console.print("[red]the recipe does not work[/red]")
    elif report.unchecked:
        console.print("nothing is wrong in what was checked")
    else:
        console.print("[green]the recipe works[/green]")
