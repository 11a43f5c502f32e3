"""``proxytune bench`` and ``plan``: what steering costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.answers.options import JobOptions
from proxytune.cli.flags import Given, Settings, only
from proxytune.cli.shared import FAILED, Recipe, ResultOptions, complain, number_text, share_bar, size
from proxytune.errors import ProxyTuneError
from proxytune.recipe.options import LoadingOptions
from proxytune.speed.options import BenchOptions, PlanOptions, RequestOptions

if TYPE_CHECKING:
    from proxytune.speed.bench import BenchResult
    from proxytune.speed.plan import Plan
    from proxytune.speed.requests import RequestPlan
    from proxytune.tables import Table

__all__ = ["bench", "bench_tables", "plan"]


def bench(
    recipe: Recipe,
    *,
    options: BenchOptions,
    results: ResultOptions,
    loading: Annotated[LoadingOptions, only("device_map", "trust_remote_code")],
    settings: Settings,
) -> None:
    """Measure what steering costs: against the base alone and against the plain three-forward loop, in one run.

    All arms read the same prompts and write the same number of tokens, round by round in turn. They are greedy unless
    --temperature is given. An answer cannot end before that number, so long outputs repeat themselves.
    The arms: base, base_lookup (with prompt-lookup drafts), plain_loop (three models, three forwards per token),
    composite (the recipe, nothing shared), shared (members of one set of weights in one forward), speculative (the
    recipe as it is loaded by default) and traced (the same with a trace of each token). Ctrl-C ends the run and shows
    what was measured so far.
    The exit status is 2 if steered arms wrote different tokens that no near tie explains.

    Examples:

        proxytune bench demo --batch-size 1 --lengths 64/128 --options auto+pack
        proxytune bench mine --arms base,plain_loop,speculative --output bench.json
    """
    from proxytune.recipe.store import load_recipe
    from proxytune.speed.bench import bench_recipe

    config = load_recipe(recipe)
    with share_bar() as progress:
        result = bench_recipe(config, options, loading, progress=progress)
    results.give({"config": settings, **result.to_json()}, *bench_tables(result))
    for bad in result.mismatches():
        complain(
            f"{bad.arm} ({bad.options}, {bad.case}) wrote another token at position {bad.differs_at} than "
            f"{bad.reference}; their logits differ by {bad.gap:.2g}"
        )
    if result.interrupted:
        raise typer.Exit(130)
    if result.mismatches():
        raise typer.Exit(FAILED)


BENCH_LEGEND = {
    "to base": "tokens/s as a multiple of the base alone",
    "to plain loop": "tokens/s as a multiple of the paper's loop of three forwards",
    "acceptance": "the share of the checked drafts that the mixture kept; it checks none after a rejected one",
    "first token": "from the prompt to the first token",
    "shared": "members of one set of weights in one forward",
    "speculative": "the recipe as it is loaded by default",
    "traced": "the same with a trace of each token",
}


def bench_tables(result: BenchResult) -> list[Table | str]:
    """The results of ``bench`` as tables: the machine, one table per case, the overhead, the outputs."""
    from proxytune.tables import Table

    machine = result.machine
    memory = "" if machine["memory_bytes"] is None else f", {size(machine['memory_bytes'])} of memory"
    parts: list[Table | str] = [
        f"{machine['gpu'] or machine['cpu']}; {machine['cores']} cores, {machine['threads']} threads{memory}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}"
    ]
    for case in dict.fromkeys(map(_case, result.rows)):
        rows = [row for row in result.rows if _case(row) == case]
        parts.append(
            Table.of(
                rows,
                {
                    "arm": lambda row: row["arm"],
                    "options": lambda row: row["options"],
                    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
                    "min – max": lambda row: (
                        f"{row['tokens_per_second_low']:.1f} – {row['tokens_per_second_high']:.1f}"
                    ),
                    "to base": lambda row: number_text(row["ratio_to_base"]),
                    "to plain loop": lambda row: number_text(row["ratio_to_plain_loop"]),
                    "acceptance": lambda row: number_text(row["acceptance"]),
                    "first token": lambda row: f"{1000 * row['time_to_first_token_s']:.0f} ms",
                    "memory": lambda row: size(row["peak_memory_bytes"]),
                    "rounds": lambda row: str(row["repeats"]),
                },
                case,
                legend=BENCH_LEGEND,
                notes=[
                    *(_drafts(row["options"], row["speculation"]) for row in rows if row["speculation"]),
                    *(_traced(row) for row in rows if row["ratio_to_untraced"] is not None),
                ],
            )
        )
    if result.overheads:
        parts.append(
            Table.of(
                result.overheads,
                {
                    "arm": lambda one: one["arm"],
                    "options": lambda one: one["options"],
                    "batch": lambda one: str(one["batch"]),
                    "step": lambda one: f"{1000 * one['step_seconds']:.2f} ms",
                    "its forwards": lambda one: f"{1000 * one['forwards_seconds']:.2f} ms",
                    "overhead": lambda one: f"{100 * one['overhead']:+.1f} %",
                },
                "a step of `generate` beyond the forwards in it",
            )
        )
    lines = []
    outputs = result.outputs()
    if outputs["compared"]:
        text = f"{outputs['identical']} of {outputs['compared']} steered rows are token-identical"
        if outputs["near_ties"]:
            text += f", {outputs['near_ties']} first differ at a near tie"
        if result.mismatches():
            text += f", {len(result.mismatches())} differ"
        lines.append(f"Outputs: {text}.")
    lines.append(f"Memory: {machine['memory']}. Tokens/s include the prompt. {result.seconds:.0f} s.")
    return [*parts, "\n".join([*lines, *(f"Note: {note}." for note in result.notes)])]


def _drafts(options: str, of: dict[str, int]) -> str:
    """A sentence on how many tokens were drafted and accepted."""
    drafted, accepted = of["drafted"] + of["looked_up"], of["accepted"] + of["lookups_accepted"]
    return (
        f"Drafts ({options}): {drafted}, of which {of['drafted']} by an expert and {of['looked_up']} copied from the "
        f"text. The mixture checked {of['judged']} of them and accepted {accepted} ({of['accepted']} of the expert's, "
        f"{of['lookups_accepted']} copied ones), in {of['cycles']} cycles."
    )


def _traced(row: dict[str, Any]) -> str:
    """A sentence on the cost of tracing."""
    return (
        f"Traced ({row['options']}): {row['ratio_to_untraced']:.2f} of the speed without a trace, the median of the "
        "rounds' ratios."
    )


def _case(row: dict[str, Any]) -> str:
    return "prompt/output {prompt}/{output}, batch {batch}".format(**row)


def plan(
    recipe: Recipe,
    *,
    options: PlanOptions,
    requests: RequestOptions,
    results: ResultOptions,
    loading: Annotated[LoadingOptions, only("device_map", "trust_remote_code")],
    given: Given,
) -> None:
    """Predict what steering will cost compared to the base alone, without loading anything.

    Only the members' configs are read: their weights and tokenizers need not be there. A cost is that of one more token
    in every row, and the base alone costs 1. naive is a forward of every member, shared is a forward of every set of
    weights, and in speculative the cheapest set drafts as many tokens as pay best. With --probe the recipe is loaded
    and its forwards are timed. Without it a step costs the bytes of weights that it reads.

    For a base behind an API it gives the requests, the billed tokens and, from your prices, the cost of a run, for each
    way to ask. The server is not asked. plain is the base alone, which writes each answer in one request. A range ends
    where every choice is asked about again as often as possible.

    Examples:

        proxytune plan demo
        proxytune plan mine --acceptance 0.6,0.8 --batch-size 1,8 --device cuda
        proxytune plan demo --probe --options auto+pack
        proxytune plan mine --prompts 500 --prompt-tokens 120 -n 60 --price-in 0.5 --price-out 1.5
    """
    from proxytune.recipe.members import Loading
    from proxytune.recipe.parts import ApiBase
    from proxytune.recipe.store import load_recipe
    from proxytune.speed.plan import plan_recipe
    from proxytune.speed.requests import plan_requests

    config = load_recipe(recipe)
    remote = isinstance(config.base_member, ApiBase)
    if idle := next((flag for flag in (OF_MODELS if remote else OF_REQUESTS) if flag in given), None):
        where = "behind an API" if remote else "a model on this machine"
        raise ProxyTuneError(f"the base of this recipe is {where}, so {idle} would change nothing; leave it out")
    if not remote:
        found = plan_recipe(config, options, loading)
        results.give(asdict(found), *plan_tables(found))
        return
    batches = options.batches if "--batch-size" in given else (JobOptions.batch_size,)
    if len(batches) > 1:
        raise ProxyTuneError("the plan of a base behind an API takes one --batch-size")
    asked = plan_requests(
        config,
        requests,
        acceptances=options.acceptances,
        batch=batches[0],
        loading=Loading(options.members.dtype, trust_remote_code=loading.trust_remote_code, pack=options.members.pack),
    )
    results.give(asdict(asked), *request_tables(asked))


# The flags of `plan` that only one kind of base reads.
OF_MODELS = ("--probe", "--against", "--device", "--device-map")
OF_REQUESTS = ("--prompts", "--prompt-tokens", "--max-new-tokens", "--drafts", "--price-in", "--price-out")


def request_tables(plan: RequestPlan) -> list[Table | str]:
    """The plan of a base behind an API as tables: the members here, and what each way asks."""
    from proxytune.tables import Table

    def cell(low: float, high: float, digits: int = 0) -> str:
        low_text, high_text = (f"{value:,.{digits}f}" for value in (low, high))
        return low_text if low_text == high_text else f"{low_text} – {high_text}"

    names = ", ".join(one.name for one in plan.members)
    grown = "" if plan.kv_bytes_per_token is None else f" + {size(plan.kv_bytes_per_token)}/token"
    about = f", {plan.prompts:,} prompts of {plan.prompt_tokens:,} tokens, {plan.new_tokens:,} new tokens each"
    cells = {
        "way": lambda one: one.way,
        "drafts": lambda one: "" if one.drafts is None else str(one.drafts),
        "acceptance": lambda one: "" if one.acceptance is None else f"{one.acceptance:g}",
        "requests": lambda one: cell(one.low.calls, one.high.calls),
        "tokens in": lambda one: cell(one.low.tokens_in, one.high.tokens_in),
        "tokens out": lambda one: cell(one.low.tokens_out, one.high.tokens_out),
        "cost": lambda one: "" if one.cost is None else cell(one.cost[0], one.cost[1], digits=4),
    }
    notes = [
        f"Each request asks for the {plan.top_logprobs} most probable of {plan.n_vocab:,} tokens. At the end of each "
        f"batch of {plan.batch} one prompt is asked about once more. What loading asks (what the server offers) is not "
        "counted, nor is a lower price of prompts that the server has cached.",
        *(f"Note: {note}." for note in plan.notes),
    ]
    return [
        f"Memory on this machine: {names} {size(plan.weight_bytes)}{grown}.",
        Table.of(plan.ways, cells, "requests", about=about, legend=REQUEST_LEGEND, notes=notes),
    ]


REQUEST_LEGEND = {
    "plain": "the base alone, each answer in one request",
    "verify, one text": "for servers that score given text",
    "verify, list": "for servers that take several prompts in a request, each billed as one",
    "push": "if the server takes the whole vocabulary as logit_bias; a second request, where one is needed, has it",
}


PLAN_LEGEND = {
    "seats": "rows that a set of weights computes for each row of the batch, one for each member",
    "read a step": "bytes of weights that a step reads",
    "KV/token": "bytes that a token adds to the cache",
    "acceptance": "the share of the checked drafts that the mixture keeps; it checks none after a rejected one. An "
    "assumption, see --acceptance",
    "naive": "a forward of every member",
    "shared": "a forward of every set of weights",
    "speculative": "the cheapest of them drafts",
    "drafts": "tokens that are drafted at a time",
}


def plan_tables(plan: Plan) -> list[Table | str]:
    """The results of ``plan`` as tables: the sets of weights, memory, the predictions, and a comparison with a
    bench."""
    from proxytune.tables import Table

    lanes = Table.of(
        plan.lanes,
        {
            "weights of": lambda lane: ", ".join(lane.members),
            "dtype": lambda lane: lane.dtype,
            "seats": lambda lane: str(lane.n_seats),
            "size": lambda lane: size(lane.weight_bytes),
            "read a step": lambda lane: size(lane.read_bytes),
            "KV/token": lambda lane: "unknown" if lane.kv_bytes_per_token is None else size(lane.kv_bytes_per_token),
        },
        legend=PLAN_LEGEND,
    )
    kinds = {"base": "base alone", "naive": "every member apart", "shared": "the recipe"}
    cache = {
        kind: "" if grown is None else f" + {size(grown)}/token" for kind, grown in plan.kv_bytes_per_token.items()
    }
    memory = ", ".join(f"{text} {size(plan.weight_bytes[kind])}{cache[kind]}" for kind, text in kinds.items())
    about = f"Costs are of a token after the prompt; the base alone costs 1. From {plan.basis}."
    predictions = Table.of(
        plan.predictions,
        {
            "batch": lambda one: str(one.batch),
            "acceptance": lambda one: f"{one.acceptance:g}",
            "naive": lambda one: f"{one.naive:.2f}",
            "shared": lambda one: f"{one.shared:.2f}",
            "speculative": lambda one: f"{one.speculative:.2f}",
            "drafts": lambda one: str(one.n_drafts),
            "tokens/s to base": lambda one: f"{one.ratio_to_base:.2f}",
            "to naive": lambda one: f"{one.ratio_to_naive:.2f}",
            "tokens/s": lambda one: (
                "" if one.base_seconds is None else f"{one.batch / (one.speculative * one.base_seconds):.1f}"
            ),
        },
        legend=PLAN_LEGEND,
        notes=[about, *(f"Note: {note}." for note in plan.notes)],
    )
    compared = Table.of(
        plan.compared,
        {
            "arm": lambda one: one["arm"],
            "prompt/output": lambda one: f"{one['prompt']}/{one['output']}",
            "batch": lambda one: str(one["batch"]),
            "predicted": lambda one: f"{1000 * one['predicted']:.1f} ms",
            "measured": lambda one: f"{1000 * one['measured']:.1f} ms",
            "error": lambda one: f"{100 * one['error']:+.0f} %",
        },
        "beside the bench: a step after the prompt",
    )
    return [lanes, f"Memory: {memory}.", predictions, *([compared] if plan.compared else [])]
