"""``proxytune new``, ``presets`` and ``check``: commands that make and check recipes."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli.flags import only
from proxytune.cli.shared import FAILED, Recipe, ResultOptions, complain, count, load_model, say, size, write_out
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import ComposeOptions, LoadingOptions
from proxytune.recipe.parts import ApiBase
from proxytune.recipe.place import check_target

if TYPE_CHECKING:
    from rich.console import Console

    from proxytune.recipe.check import Report

__all__ = ["check", "new", "presets"]


def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to create.")],
    *,
    options: ComposeOptions,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that is not empty.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not use the hub; leave out what is not cached.")
    ] = False,
    loading: Annotated[LoadingOptions, only("trust_remote_code")],
) -> None:
    """Make a recipe: a model directory that names its members and how they mix.

    A member is a hub id, a local directory or a .gguf file. Its weights stay where they are. The base's config,
    tokenizer and generation config are copied. Relative paths are stored relative to DIR. Then the recipe is checked.
    The exit status is 2 if it does not work.

    Examples:

        proxytune new mine --base ./big --expert ./small-tuned --anti-expert ./small
        proxytune new mine --base ./big --anti-expert ./small --expert-adapter ./lora --alpha 0.8
        proxytune new mine --preset llama2-13b-chat --offline
        proxytune new french --base ./big --small ./small --expert-system "Answer only in French."
        proxytune new guided --base ./big --negative-prompt "Write a boring story." --guidance 1.5
        proxytune new remote --base-api https://host/v1 --base-model big --base-tokenizer ./big-tokenizer \\
            --base-key BIG_API_KEY --expert ./small-tuned --anti-expert ./small
    """
    check_target(directory, force)
    from proxytune.recipe.check import check_recipe
    from proxytune.recipe.compose import compose, configure
    from proxytune.recipe.members import Loading
    from proxytune.recipe.store import load_recipe

    trust = loading.trust_remote_code
    examples = [] if options.expert_examples is None else _solved(options.expert_examples)
    notes = compose(configure(options, examples), directory, force=force, offline=offline, trust_remote_code=trust)
    for note in notes:
        say(f"note: {note}")
    hub = {"local_files_only": True} if offline else {}
    found = check_recipe(load_recipe(directory), Loading.of(loading, **hub))
    if found.problems and not offline:
        complain(f"wrote {directory}, but it does not work here: {'; '.join(found.problems)}")
        raise typer.Exit(FAILED)
    if found.problems:
        say(f"wrote {directory}; not all of it can be checked offline, so run: proxytune check {directory}")
    else:
        works = "it works" if found.works else "nothing is wrong in what was checked"
        say(f"wrote {directory}; {works}, and needs {size(found.weight_bytes)} for its weights")


def _solved(path: Path) -> list[tuple[str, str]]:
    """Read the prompts of a file, each with its answer.

    Raises:
        ProxyTuneError: if the file cannot be read, or a row is not one prompt and one answer.
    """
    if not path.is_file():
        raise ProxyTuneError(f"there is no file {path}")
    from proxytune.training.data import Rows

    read = Rows.read(str(path))
    pairs = []
    for place, row in zip(read.places, read.rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list) and len(prompt) == len(completion) == 1:
            prompt, completion = prompt[0]["content"], completion[0]["content"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ProxyTuneError(f"{place} must have one prompt and one answer, to be an example for --expert-examples")
        pairs.append((prompt, completion))
    return pairs


def presets(results: Annotated[ResultOptions, only("json")]) -> None:
    """List the recipes that `new --preset` starts from: the paper's trios, and two newer ones.

    We have not run them: the models are too large for our machines. Make a recipe from one, and `proxytune check` shows
    whether it works.

    Examples:

        proxytune presets
        proxytune new mine --preset qwen2.5-32b-chat
    """
    from proxytune.recipe.presets import PRESETS
    from proxytune.tables import Table

    def model(member: str | dict[str, str]) -> str:
        return member if isinstance(member, str) else member["model"]

    experts = {name: preset["experts"][0] for name, preset in PRESETS.items()}
    members = [
        (name, model(PRESETS[name]["base"]), model(of["expert"]), model(of["anti_expert"]))
        for name, of in experts.items()
    ]
    results.give(PRESETS, Table(("preset", "base", "expert", "anti-expert"), members))


def check(
    recipe: Recipe,
    *,
    run: Annotated[
        bool, typer.Option("--run", help="Load the recipe and compare its answers with the plain loop.")
    ] = False,
    results: ResultOptions,
    loading: Annotated[LoadingOptions, only("dtype", "trust_remote_code")],
) -> None:
    """Check whether a recipe works and what memory it needs.

    This reads configs, tokenizers and the headers of weight files, and loads no weights. It lists what cannot be
    checked that way. With --run the recipe is loaded, and a few answers are compared with the paper's plain loop: at
    alpha 0, at the recipe's alpha, without a cache, with and without drafts, and as a batch. The exit status is 0 if
    nothing is wrong, else 2.

    Where the base is behind an API, its server is asked a few times what it offers: which log-probabilities, how many,
    and for which prompts.

    Examples:

        proxytune check demo
        proxytune check mine --run
        proxytune check mine --json
    """
    from rich.console import Console
    from rich.markup import escape

    from proxytune.recipe.check import check_recipe
    from proxytune.recipe.members import Loading
    from proxytune.recipe.store import load_recipe

    config = load_recipe(recipe)
    console, server = Console(highlight=False), None
    report = check_recipe(config, Loading.of(loading), asked=True)
    if isinstance(config.base_member, ApiBase) and not report.problems:
        from proxytune.assembling import ask_server
        from proxytune.lanes.probing import findings

        if run:
            raise ProxyTuneError("--run compares with the base's own forward, and this base is behind an API")
        server = findings(ask_server(config, Loading.of(loading)))
    if not results.json:
        show_report(report, recipe, console)
        for what, value in (server or {}).items():
            console.print(f"the base's server: {escape(what)}: {escape(str(value))}")
    trials = []
    if run and not report.problems:
        from proxytune.answers.selftest import run_trials

        model, _ = load_model(config, loading)
        for trial in run_trials(model):
            trials.append(trial)
            if not results.json:
                word = {True: "[green]ok[/green]", False: "[red]failed[/red]", None: "[yellow]left out[/yellow]"}
                console.print(f"{word[trial.passed]} {trial.name}: {escape(trial.detail)}")
    results.give(
        report.to_json()
        | ({} if server is None else {"server": server})
        | ({"trials": [asdict(trial) for trial in trials]} if run else {})
    )
    if report.problems or any(trial.passed is False for trial in trials):
        raise typer.Exit(FAILED)


def show_report(report: Report, recipe: str, console: Console) -> None:
    """Print the result of ``check`` for ``recipe``: a table of the members, the totals, and what is wrong."""
    from rich.markup import escape
    from rich.table import Table

    if report.description:
        console.print(escape(report.description))
    for example in report.examples:
        command = ["proxytune", "generate", recipe, *(["--"] if example.startswith("-") else []), example]
        write_out(f"try: {shlex.join(command)}\n")  # not wrapped, tabs kept, so that it can be copied
    if report.description or report.examples:
        console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("member", overflow="fold")
    for heading in ("params", "dtype", "weights", "KV/token", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in report.members:
        table.add_row(
            one.name,
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
        model = str(one.model) + (f" + {one.adapter}" if one.adapter else "")
        prompt = f" ({one.reads})" if one.reads else ""
        write_out(f"{one.name}: {model}{prompt}\n")  # not wrapped: a path can be copied
    for one in report.members:
        if one.shares_with:
            console.print(f"{one.name} shares its weights with {one.shares_with}")
        if one.sliding_window:
            console.print(f"{one.name} has layers that keep only {one.sliding_window:,} tokens")
    if not report.problems:
        memory = f"weights {size(report.weight_bytes)}"
        if report.kv_bytes_per_token is not None:
            memory += f", cache {size(report.kv_bytes_per_token)} per token"
            if report.context is not None:
                memory += f" ({size(report.kv_bytes_per_token * report.context)} for the whole context)"
        console.print(f"memory: {memory}")
        if report.context is not None:
            shortest = next(one.name for one in report.members if one.context == report.context)
            console.print(f"context: {report.context:,} tokens, set by {shortest}")
        alpha = ", ".join(f"{name} {value:g}" for name, value in report.alpha.items())
        console.print(f"alpha: {alpha}")
    for note in report.notes:
        console.print(f"[yellow]note[/yellow] {note}")
    for what in report.unchecked:
        console.print(f"[yellow]not checked[/yellow] {what}")
    for problem in report.problems:
        console.print(f"[red]wrong[/red] {problem}")
    if report.problems:
        console.print("[red]the recipe does not work[/red]")
    elif report.unchecked:
        console.print("nothing is wrong in what was checked")
    else:
        console.print("[green]the recipe works[/green]")
