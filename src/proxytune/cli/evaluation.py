"""``proxytune tasks``, ``eval``, ``sweep`` and ``score``: commands that measure answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli.flags import Settings, only
from proxytune.cli.shared import (
    FAILED,
    UNFINISHED,
    Recipe,
    ResultOptions,
    RunOptions,
    complain,
    counted_bar,
    progress_bar,
    resumable,
    say,
)
from proxytune.errors import need
from proxytune.evaluation import EVAL_TASKS, TASK_DIR, TASKS, check_tasks
from proxytune.evaluation.options import CodeOptions, EvaluationOptions, JudgeOptions, SweepOptions
from proxytune.recipe.alpha import alpha_range
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.place import check_alpha

if TYPE_CHECKING:
    from proxytune.evaluation.scoring import Scores
    from proxytune.recipe.config import ProxyTuneConfig
    from proxytune.tables import Table

__all__ = ["evaluate", "score", "sweep", "tasks"]


def _tasks_dir(wanted: bool) -> None:
    if wanted:
        typer.echo(TASK_DIR)
        raise typer.Exit


def tasks(results: Annotated[ResultOptions, only("json")]) -> None:
    """List the tasks that `eval`, `sweep` and `score` know.

    `score` takes the tasks for which published prediction files exist. docs/evaluation.md describes each task.

    Examples:

        proxytune tasks
        proxytune tasks --json
    """
    from proxytune.tables import Table

    about = {
        name: {"asks": asks, "scored_by": scored, "score": name in TASKS} for name, (asks, scored) in EVAL_TASKS.items()
    }
    rows = [(name, asks, scored, "yes" if name in TASKS else "no") for name, (asks, scored) in EVAL_TASKS.items()]
    notes = [f"Their files, for lm_eval --include_path: {TASK_DIR}"]
    legend = {"score": "whether `proxytune score` takes a file of its answers"}
    results.give(about, Table(("task", "examples", "scored by", "score"), rows, legend=legend, notes=notes))


def evaluate(
    recipe: Recipe,
    *,
    options: EvaluationOptions,
    results: RunOptions,
    judges: JudgeOptions,
    code: Annotated[CodeOptions, only("unguarded")],
    loading: Annotated[
        LoadingOptions,
        only("dtype", "device_map", "trust_remote_code", "speculate", "pack", "way", "max_calls", "max_tokens"),
    ],
    settings: Settings,
    tasks_dir: Annotated[
        bool,
        typer.Option(
            "--tasks-dir",
            callback=_tasks_dir,
            is_eager=True,
            help="Print the directory of the tasks, for `lm_eval --include_path`, and exit.",
        ),
    ] = False,
) -> None:
    """Evaluate a recipe: the base, the experts alone, the proxy-tuned base and controls answer the same prompts.

    Predictions are written to DIR/TASK/ARM.jsonl while the run goes on. A killed run continues where it stopped, and
    you can add arms and tasks to a finished one. The tables are printed; DIR also gets results.json, results.md,
    results.png and results.svg, with intervals, paired tests, the gap closed and examples per second. An arm or task
    that is not possible is left out with its reason. Then the exit status is 2, or 3 if a judge did not answer or
    a budget of requests is spent.

    Examples:

        proxytune eval demo --tasks demo_facts --limit 40 --pack
        proxytune eval mine --tasks gsm8k,triviaqa --tuned ./big-tuned --output runs/mine
        proxytune eval --config runs/mine/manifest.json --limit 500 --output runs/more
        proxytune eval mine --tasks gsm8k --engine vllm --engine-option tensor_parallel_size=4
    """
    check_alpha(recipe, options.alpha)
    place, run = results.place("eval", recipe), _harness()
    from proxytune.evaluation.results import results_tables

    with _run(recipe, place, options, code, judges, settings) as (config, how):
        found = run.evaluate(config, options, place, loading=loading, **how)
    _end(found, place, results, results_tables(found))


def sweep(
    recipe: Recipe,
    *,
    options: Annotated[
        EvaluationOptions, only("tasks", "data", "limit", "samples", "seed", "batch_size", "engine", "engine_options")
    ],
    alphas: SweepOptions,
    results: RunOptions,
    judges: JudgeOptions,
    code: Annotated[CodeOptions, only("unguarded")],
    loading: Annotated[
        LoadingOptions, only("dtype", "device_map", "trust_remote_code", "pack", "way", "max_calls", "max_tokens")
    ],
    settings: Settings,
) -> None:
    """Evaluate a recipe at several alphas: a table and a plot of the curve, with intervals.

    With transformers each prompt is read once for all alphas; vLLM gets one request per alpha. Predictions go to
    DIR/TASK/alpha=A.jsonl. A killed run continues where it stopped, and you can add alphas.

    Examples:

        proxytune sweep demo --tasks demo_facts --alpha 0:2:0.5 --limit 40 --pack
        proxytune sweep mine --tasks gsm8k --alpha code=0,0.5,1 --output runs/curve
        proxytune sweep mine --tasks gsm8k --fit
    """
    expert, values = alpha_range(alphas.alpha)
    check_alpha(recipe, None if expert is None else {expert: values[0]})
    place, run = results.place("sweep", recipe), _harness()
    from proxytune.evaluation.results import sweep_tables

    with _run(recipe, place, options, code, judges, settings) as (config, how):
        found = run.sweep(config, options, values, place, expert=expert, fit=alphas.fit, loading=loading, **how)
    _end(found, place, results, sweep_tables(found))


def _harness() -> Any:
    """The module for evaluation, after checking that everything it needs is installed, including matplotlib for the
    plots."""
    need("evaluating", "eval", "lm_eval", "datasets", "matplotlib")
    from proxytune.evaluation import run

    return run


@contextlib.contextmanager
def _run(
    recipe: str,
    place: Path,
    options: EvaluationOptions,
    code: CodeOptions,
    judges: JudgeOptions,
    settings: Settings,
) -> Iterator[tuple[ProxyTuneConfig, dict[str, Any]]]:
    """A run's recipe, and its functions for scoring tasks and for progress."""
    from proxytune.evaluation.scoring import CODE, JUDGED, scorer_options
    from proxytune.evaluation.tasks.utils import problems_file
    from proxytune.recipe.parts import ApiBase
    from proxytune.recipe.store import load_recipe

    config = load_recipe(recipe).with_mixing(options.combine, options.gate)
    if options.engine == "vllm" and not isinstance(config.base_member, ApiBase):
        from proxytune.vllm.plan import refuse

        refuse(config)
    code = replace(code, ks=(10, 1))  # pass@10 first, the paper's

    def scoring(task: str) -> dict[str, Any]:
        data = problems_file(task, options.data) if task in CODE else None
        judging = judges if task in JUDGED else JudgeOptions()
        return scorer_options(task, code, judging, data=data, kept=place / task / "verdicts.jsonl")

    kept = f"everything so far is kept in {place}"
    with resumable(kept), counted_bar() as progress:
        yield config, {"settings": settings, "scoring": scoring, "progress": progress, "note": say}


def _end(found: dict[str, Any], place: Path, results: ResultOptions, tables: list[Table]) -> None:
    """Show the results, their place, and what was left out. Then the exit status is 2, or 3 if the same command can
    continue."""
    results.give(found, *tables)
    for left_out in found["left_out"]:
        what = f"{left_out['arm']} is left out of" if left_out["arm"] else "there are no scores of"
        resumes = "; the same command continues from there" if left_out["resumes"] else ""
        complain(f"{what} {left_out['task']}: {left_out['reason']}{resumes}")
    say(f"results: {place / 'results.md'}, results.json and plots; predictions beside them")
    if found["left_out"]:
        raise typer.Exit(UNFINISHED if any(left_out["resumes"] for left_out in found["left_out"]) else FAILED)


def score(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help=f"{', '.join(TASKS)}; see `proxytune tasks`.",
        ),
    ],
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="JSON lines, or a JSON list.")],
    *,
    results: ResultOptions,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Also judge lines that already have a verdict (passed, is_toxic, …).")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID",
            help="The problems of a code task, or the reference answers of alpacafarm: JSON lines, or a hub data set; "
            "by default the hub's own.",
        ),
    ] = None,
    code: CodeOptions,
    judges: JudgeOptions,
    verdicts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that keeps the judge's verdicts; by default next to the predictions.",
            rich_help_panel="Judges",
        ),
    ] = None,
) -> None:
    """Score a file of predictions: your own, or those that the paper's authors published.

    The rules and the field names are the authors', so the figures are too. Code runs in a sandbox; if it cannot be
    sandboxed, it is not run. A judge's verdicts are saved while it works. If the judge does not answer, the exit status
    is 3, and the same command continues from there.

    Examples:

        proxytune score gsm8k predictions.jsonl --output scores.json
        proxytune score humaneval predictions.jsonl --k 1,10 --workers 4
        proxytune score toxigen predictions.jsonl --judge ./toxicity-classifier
    """
    check_tasks([task])
    predictions.open("rb").close()
    from proxytune.evaluation import records
    from proxytune.evaluation.scoring import score as scored
    from proxytune.evaluation.scoring import scorer_options

    lines = records.read(predictions)
    kept = verdicts or predictions.with_name(f"{predictions.name}.verdicts.jsonl")
    options = scorer_options(task, code, judges, data=data, kept=kept)
    total = len(records.parse(task, lines))
    with resumable(f"its verdicts so far are kept in {kept}"), progress_bar(total, True) as advance:
        result = scored(task, lines, rerun=rerun, progress=advance, **options)
    outcomes = {"outcomes": result.outcomes} if result.outcomes else {}
    results.give({"task": task, "metrics": result.metrics, **outcomes}, scores_table(result))


def scores_table(result: Scores) -> Table:
    """A table of a task's figures: the main one with its interval, then the others."""
    from proxytune.evaluation.results import LEGEND, metric_text, spread_of
    from proxytune.tables import Table, percent

    counts = {name: value for name, value in result.metrics.items() if isinstance(value, int)}
    total = counts["total"] - counts.get("num_invalid_predictions", 0)
    spread = spread_of(result, result.headline)
    value, low, high = spread.value, spread.low, spread.high
    whole = abs(value * total - round(value * total)) < 1e-6
    headline = f"{round(value * total)}/{total}" if whole else f"mean of {total}"
    rows = [(result.headline, headline, percent(value), f"{100 * low:.1f} – {100 * high:.1f}")]
    rows += [(name, "", metric_text(name, v), "") for name, v in list(result.metrics.items())[1:] if name not in counts]
    rows += [(name.replace("_", " "), str(value), "", "") for name, value in counts.items()]
    rows += [(f"samples: {name}", str(value), "", "") for name, value in result.outcomes.items()]
    return Table((result.task, "count", "share", "95 % interval"), rows, legend=LEGEND)
