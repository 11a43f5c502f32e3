"""``proxytune bench`` and ``plan``: what steering costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli.flags import only
from proxytune.cli.shared import FAILED, JsonFile, Recipe, number_text, say, share_bar, show_table, size, write_json
from proxytune.recipe.options import LoadingOptions
from proxytune.speed.options import BenchOptions, PlanOptions

if TYPE_CHECKING:
    from proxytune.speed.bench import BenchResult
    from proxytune.speed.plan import Plan

__all__ = ["bench", "plan", "show_bench"]


def bench(
    recipe: Recipe,
    *,
    options: BenchOptions,
    json_file: JsonFile = None,
    loading: Annotated[LoadingOptions, only("device_map", "trust_remote_code")],
) -> None:
    """Measure what steering costs: against the base alone and against the plain three-forward loop, in one run.

    All arms are greedy unless --temperature is given, read the same prompts and write the same number of tokens (end
    tokens are put off until then, so that long outputs repeat themselves); they take turns round by round.
    The arms: base, base_lookup (with prompt-lookup drafts), plain_loop (three models, three forwards a token),
    composite (the recipe, nothing shared), shared (members of one set of weights in one forward) and speculative (the
    recipe as it is loaded by default). The result is a Markdown table. Ctrl-C ends with what was measured until then.
    The exit status is 2 if steered arms wrote different tokens that no near tie explains.
    """
    from proxytune.recipe.store import load_recipe
    from proxytune.speed.bench import bench_recipe

    config = load_recipe(recipe)
    if json_file is not None:
        json_file.open("a").close()  # now, not after twenty minutes, is when to say that it cannot be written
    with share_bar() as progress:
        result = bench_recipe(config, options, loading, progress=progress)
    show_bench(result)
    write_json(json_file, result.to_json())
    for bad in result.mismatches():
        say(
            f"error: {bad.arm} ({bad.options}, {bad.case}) wrote another token at {bad.differs_at} than "
            f"{bad.reference}, with logits {bad.gap:.2g} apart"
        )
    if result.interrupted:
        raise typer.Exit(130)
    if result.mismatches():
        raise typer.Exit(FAILED)


def show_bench(result: BenchResult) -> None:
    """Print what ``bench`` found, as Markdown: the machine, a table of each case, the overhead, the outputs."""
    machine = result.machine
    memory = "" if machine["memory_bytes"] is None else f", {size(machine['memory_bytes'])} of memory"
    typer.echo(
        f"{machine['gpu'] or machine['cpu']}; {machine['cores']} cores, {machine['threads']} threads{memory}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}\n"
    )
    for case in dict.fromkeys(map(_case, result.rows)):
        rows = [row for row in result.rows if _case(row) == case]
        typer.echo(f"**{case}**\n")
        show_table(
            "arm|options|tokens/s|min – max|to base|to plain loop|acceptance|first token|memory|rounds",
            [
                (
                    row["arm"],
                    row["options"],
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['tokens_per_second_low']:.1f} – {row['tokens_per_second_high']:.1f}",
                    number_text(row["ratio_to_base"]),
                    number_text(row["ratio_to_plain_loop"]),
                    number_text(row["acceptance"]),
                    f"{1000 * row['time_to_first_token_s']:.0f} ms",
                    size(row["peak_memory_bytes"]),
                    str(row["repeats"]),
                )
                for row in rows
            ],
        )
        for row in rows:
            if row["speculation"]:
                said = (
                    "Drafts ({options}): {drafted} by an expert, {accepted} accepted; "
                    "{looked_up} copied from the text, {lookups_accepted} accepted; {cycles} cycles.\n"
                )
                typer.echo(said.format(options=row["options"], **row["speculation"]))
    if result.overheads:
        typer.echo("**a step of `generate` beyond the forwards in it**\n")
        show_table(
            "arm|options|batch|step|its forwards|overhead",
            [
                (
                    one["arm"],
                    one["options"],
                    str(one["batch"]),
                    f"{1000 * one['step_seconds']:.2f} ms",
                    f"{1000 * one['forwards_seconds']:.2f} ms",
                    f"{100 * one['overhead']:+.1f} %",
                )
                for one in result.overheads
            ],
        )
    outputs = result.outputs()
    if outputs["compared"]:
        said = f"{outputs['identical']} of {outputs['compared']} steered rows are token-identical"
        if outputs["near_ties"]:
            said += f", {outputs['near_ties']} first differ at a near tie"
        if result.mismatches():
            said += f", {len(result.mismatches())} differ"
        typer.echo(f"Outputs: {said}.")
    typer.echo(f"Memory: {machine['memory']}. Tokens/s include the prompt. {result.seconds:.0f} s.")
    for note in result.notes:
        typer.echo(f"Note: {note}.")


def _case(row: dict[str, Any]) -> str:
    return "prompt/output {prompt}/{output}, batch {batch}".format(**row)


def plan(
    recipe: Recipe,
    *,
    options: PlanOptions,
    json_file: JsonFile = None,
    loading: Annotated[LoadingOptions, only("device_map", "trust_remote_code")],
) -> None:
    """Predict what steering will cost beside the base alone, before anything is loaded.

    From the members' configs: neither weights nor tokenizers need to be there. Costs are of one more token of every
    row, where the base alone costs 1: naive is a forward of every member, shared one of every set of weights, and
    speculative lets the cheapest of them draft, as many tokens as pay best. With --probe the recipe is loaded and its
    forwards are timed; without, a step costs the bytes of weights that it moves.
    """
    from proxytune.recipe.store import load_recipe
    from proxytune.speed.plan import plan_recipe

    found = plan_recipe(load_recipe(recipe), options, loading)
    show_plan(found)
    if found.compared:
        typer.echo("**held against the bench: a step after the prompt**\n")
        show_table(
            "arm|prompt/output|batch|predicted|measured|error",
            [
                (
                    one["arm"],
                    f"{one['prompt']}/{one['output']}",
                    str(one["batch"]),
                    f"{1000 * one['predicted']:.1f} ms",
                    f"{1000 * one['measured']:.1f} ms",
                    f"{100 * one['error']:+.0f} %",
                )
                for one in found.compared
            ],
        )
    write_json(json_file, asdict(found))


def show_plan(plan: Plan) -> None:
    """Print what ``plan`` predicts, as Markdown: the sets of weights, memory, and the predictions."""
    show_table(
        "weights of|dtype|seats|size|read a step|KV/token",
        [
            (
                ", ".join(lane.members),
                lane.dtype,
                str(lane.n_seats),
                size(lane.weight_bytes),
                size(lane.read_bytes),
                "unknown" if lane.kv_bytes_per_token is None else size(lane.kv_bytes_per_token),
            )
            for lane in plan.lanes
        ],
    )
    kinds = {"base": "base alone", "naive": "every member apart", "shared": "the recipe"}
    cache = {
        kind: "" if grown is None else f" + {size(grown)}/token" for kind, grown in plan.kv_bytes_per_token.items()
    }
    memory = ", ".join(f"{said} {size(plan.weight_bytes[kind])}{cache[kind]}" for kind, said in kinds.items())
    typer.echo(f"Memory: {memory}.\n")
    timed = plan.predictions[0].base_seconds is not None
    show_table(
        "batch|acceptance|naive|shared|speculative|drafts|tokens/s to base|to naive" + ("|tokens/s" if timed else ""),
        [
            (
                str(one.batch),
                f"{one.acceptance:g}",
                f"{one.naive:.2f}",
                f"{one.shared:.2f}",
                f"{one.speculative:.2f}",
                str(one.n_drafts),
                f"{one.ratio_to_base:.2f}",
                f"{one.ratio_to_naive:.2f}",
                *((f"{one.batch / (one.speculative * one.base_seconds):.1f}",) if one.base_seconds is not None else ()),
            )
            for one in plan.predictions
        ],
    )
    typer.echo(f"Costs are of a token after the prompt; the base alone costs 1. From {plan.basis}.")
    if not any(one.n_drafts for one in plan.predictions):
        typer.echo("Note: drafting cannot pay here.")
    for note in plan.notes:
        typer.echo(f"Note: {note}.")
