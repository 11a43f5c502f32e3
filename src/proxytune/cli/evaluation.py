"""``proxytune eval``, ``sweep`` and ``score``: answers measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.cli.options import (
    Alpha,
    DeviceMap,
    Dtype,
    JsonFile,
    Pack,
    Recipe,
    Speculate,
    TrustRemoteCode,
    checked_dtype,
    drafts_of,
    panel,
    progress_bar,
    say,
    share_bar,
    show_table,
    split_names,
)
from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:
    from proxytune.evaluation.scoring import Scores
    from proxytune.recipe.config import ProxyTuneConfig

__all__ = ["evaluate", "score", "sweep"]


Tasks = Annotated[
    str,
    typer.Option(
        "--tasks", "-t", metavar="NAME,...", help="What is evaluated; see docs/evaluation.md.", show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Predictions and results; a run that is there is carried on. By default eval-RECIPE or sweep-RECIPE.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        envvar="PROXYTUNE_DATA",
        help="A file or a folder in place of the hub.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="So many examples of each task, drawn by --seed; all by default.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Samples a problem, in tasks that sample; 20 as in the paper by default.",
        rich_help_panel="Data",
        show_default=False,
    ),
]
EvalSeed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of the examples drawn and of sampling.", rich_help_panel="Data")
]
EvalBatch = Annotated[
    int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Rows at once.", rich_help_panel="Speed")
]

_judges = "Judges and code"
JudgeNames = Annotated[
    list[str] | None,
    panel(_judges, "--judge", metavar="DIR|ID", help="A local classifier or language model, as `score` takes it."),
]
JudgeLabel = Annotated[str | None, panel(_judges, "--judge-label", metavar="NAME", help="Its label that means yes.")]
JudgeUrl = Annotated[
    str | None, panel(_judges, "--judge-url", metavar="URL", help="An OpenAI-compatible endpoint, with its /v1.")
]
JudgeModels = Annotated[
    list[str] | None,
    panel(_judges, "--judge-model", metavar="NAME", help="The model there, or an annotator of alpaca_eval."),
]
JudgeChat = Annotated[
    bool, typer.Option("--judge-chat", help="The endpoint has chat completions alone.", rich_help_panel=_judges)
]
JudgeKey = Annotated[
    str, typer.Option("--judge-key", metavar="VARIABLE", help="Where its key is.", rich_help_panel=_judges)
]
Unguarded = Annotated[
    bool,
    typer.Option(
        "--unguarded",
        help="Run generated code even where it cannot be locked up: it may then do what you may do.",
        rich_help_panel=_judges,
    ),
]


def _tasks_dir(wanted: bool) -> None:
    if wanted:
        from proxytune.evaluation import TASK_DIR

        typer.echo(TASK_DIR)
        raise typer.Exit


def evaluate(
    recipe: Recipe,
    tasks: Tasks,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="base, anti_expert, expert, proxy_tuned, tuned, base_few_shot, mean_logits; all but tuned by default.",
            show_default=False,
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A directly tuned model, for the gap closed.", show_default=False),
    ] = None,
    alpha: Alpha = None,
    out: Out = None,
    json_file: JsonFile = None,
    data: Data = None,
    limit: Limit = None,
    samples: Samples = None,
    seed: EvalSeed = 0,
    batch_size: EvalBatch = 8,
    judge: JudgeNames = None,
    judge_label: JudgeLabel = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModels = None,
    judge_chat: JudgeChat = False,
    judge_key: JudgeKey = "OPENAI_API_KEY",
    unguarded: Unguarded = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    speculate: Speculate = "auto",
    pack: Pack = False,
    tasks_dir: Annotated[
        bool,
        typer.Option(
            "--tasks-dir",
            callback=_tasks_dir,
            is_eager=True,
            help="Print where the tasks lie, for `lm_eval --include_path`, and leave.",
        ),
    ] = False,
) -> None:
    """Evaluate a recipe: base, experts alone, proxy-tuned and controls on the same prompts.

    Each prediction is written as it comes to DIR/TASK/ARM.jsonl, and what is there is not made again: a killed run goes
    on where it was, and arms and tasks can be added. DIR gets results.json, results.md, results.png and results.svg
    with intervals, paired tests, the gap closed and examples a second; the tables are printed.
    """
    from proxytune.evaluation.results import results_table
    from proxytune.evaluation.run import evaluate as run

    config, settings = _evaluation(
        recipe,
        tasks,
        arms,
        tuned,
        alpha,
        data,
        limit,
        samples,
        seed,
        batch_size,
        dtype,
        device_map,
        trust_remote_code,
        speculate,
        pack,
    )
    place = out or _out("eval", recipe)
    scoring = _scoring(place, data, judge, judge_label, judge_url, judge_model, judge_chat, judge_key, unguarded)
    with _judged(f"all until here is kept in {place}"), share_bar() as bar:
        results = run(config, settings, place, scoring=scoring, progress=_counted(bar), note=say)
    typer.echo(results_table(results), nl=False)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def sweep(
    recipe: Recipe,
    tasks: Tasks,
    alpha: Annotated[
        str,
        typer.Option(
            "--alpha", "-a", metavar="[NAME=]START:STOP:STEP", help="The alphas, or A,B,...; of one expert, or of all."
        ),
    ] = "0:2:0.25",
    out: Out = None,
    json_file: JsonFile = None,
    data: Data = None,
    limit: Limit = None,
    samples: Samples = None,
    seed: EvalSeed = 0,
    batch_size: EvalBatch = 8,
    judge: JudgeNames = None,
    judge_label: JudgeLabel = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModels = None,
    judge_chat: JudgeChat = False,
    judge_key: JudgeKey = "OPENAI_API_KEY",
    unguarded: Unguarded = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    pack: Pack = False,
) -> None:
    """Evaluate a recipe at several alphas: a table and a plot of the curve, with intervals.

    Each prompt is read once for all alphas. Predictions go to DIR/TASK/alpha=A.jsonl, and a killed run goes on where
    it was; alphas can be added.
    """
    from proxytune.evaluation.results import sweep_table
    from proxytune.evaluation.run import alpha_range
    from proxytune.evaluation.run import sweep as run

    expert, values = alpha_range(alpha)
    config, settings = _evaluation(
        recipe,
        tasks,
        None,
        None,
        None,
        data,
        limit,
        samples,
        seed,
        batch_size,
        dtype,
        device_map,
        trust_remote_code,
        "off",
        pack,
    )
    place = out or _out("sweep", recipe)
    scoring = _scoring(place, data, judge, judge_label, judge_url, judge_model, judge_chat, judge_key, unguarded)
    with _judged(f"all until here is kept in {place}"), share_bar() as bar:
        results = run(config, settings, values, place, expert=expert, scoring=scoring, progress=_counted(bar), note=say)
    typer.echo(sweep_table(results), nl=False)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def _evaluation(
    recipe: str,
    tasks: str,
    arms: str | None,
    tuned: str | None,
    alpha: Sequence[str] | None,
    data: str | None,
    limit: int | None,
    samples: int | None,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    speculate: str,
    pack: bool,
) -> tuple[ProxyTuneConfig, Any]:
    """What ``eval`` and ``sweep`` evaluate: the recipe, and the settings as the run takes them."""
    from proxytune.evaluation import EVAL_TASKS, check_tasks
    from proxytune.recipe.alpha import alpha_of_text, resolve_alpha
    from proxytune.recipe.compose import device_map as parsed
    from proxytune.recipe.store import load_recipe

    names = check_tasks(split_names(tasks), EVAL_TASKS)
    try:
        from proxytune.evaluation.run import Settings
    except ImportError as error:
        raise ProxyTuneError(f"evaluating needs {error.name}: pip install 'proxytune[eval]'") from error
    config = load_recipe(recipe)
    experts = [expert.name for expert in config.expert_list]
    settings = Settings(
        names,
        arms=None if arms is None else split_names(arms),
        tuned=tuned,
        limit=limit,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        alphas=resolve_alpha(alpha_of_text(alpha), experts, config.alphas),
        data=data,
        dtype=checked_dtype(dtype),
        device_map=parsed(device_map),
        trust_remote_code=trust_remote_code,
        pack=pack,
        speculate=drafts_of(speculate),
    )
    return config, settings


def _scoring(
    out: Path,
    data: str | None,
    names: list[str] | None,
    label: str | None,
    url: str | None,
    models: list[str] | None,
    chat: bool,
    key: str,
    unguarded: bool,
) -> Any:
    """What each task's scorer takes besides the predictions."""
    from proxytune.evaluation.results import JUDGED
    from proxytune.evaluation.scoring import CODE

    def options(task: str) -> dict[str, Any]:
        if task in CODE:
            from proxytune.evaluation.code import limits_of
            from proxytune.evaluation.tasks.utils import problems_file

            # pass@10 first, the paper's; where there are fewer samples it is left out.
            return {"data": problems_file(task, data), "ks": (10, 1), "limits": limits_of(task), "unguarded": unguarded}
        if task not in JUDGED or not (names or url or models):
            return {}
        from proxytune.evaluation.judges import choose

        kept = out / task / "verdicts.jsonl"
        judge = choose(
            task, names or (), url=url, models=models or (), key_variable=key, chat=chat, label=label, kept=kept
        )
        return {"judge": judge, "kept": kept}

    return options


@contextlib.contextmanager
def _judged(kept: str) -> Iterator[None]:
    """A judge that does not answer ends the command with status 3; ``kept`` says what is kept of it, and where."""
    try:
        yield
    except ProxyTuneError as error:
        from proxytune.evaluation.judges import JudgeDown

        if not isinstance(error, JudgeDown):
            raise
        say(f"error: {error}; {kept}, and the same command goes on from there")
        raise typer.Exit(3) from None


def _out(command: str, recipe: str) -> Path:
    """Where a run goes by default."""
    return Path(f"{command}-{Path(recipe.rstrip('/')).name or 'recipe'}")


def _counted(bar: Any) -> Any:
    return lambda said, done, total: bar(f"{said} {done}/{total}", done / max(total, 1))


def score(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="gsm8k, truthfulqa_mc, truthfulqa_open, toxigen, triviaqa, humaneval, ds1000, mbpp, alpacafarm or "
            "realtimeqa.",
            show_default=False,
        ),
    ],
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="JSON lines, or a JSON list.", show_default=False)
    ],
    json_file: JsonFile = None,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Judge those lines too that carry a verdict already (passed, is_toxic, …).")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID",
            help="The problems of a code task, or the reference answers of alpacafarm: JSON lines, or a hub data set; "
            "the hub's own by default.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        str,
        typer.Option(
            "--k", metavar="K,...", help="pass@k, for every k that the samples allow.", rich_help_panel="Code"
        ),
    ] = "1,10",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Programs at once; by default one a core.",
            rich_help_panel="Code",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=1,
            help="CPU time of a program, by default 3 (ds1000: 60); 7 more of wall time (ds1000: twice as much).",
            rich_help_panel="Code",
            show_default=False,
        ),
    ] = None,
    unguarded: Annotated[
        bool,
        typer.Option(
            "--unguarded",
            help="Run generated code even where it cannot be locked up: it may then do what you may do.",
            rich_help_panel="Code",
        ),
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|ID",
            help="A local classifier or language model. truthfulqa_open takes two: of truth, of information.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_label: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The classifier's label that means yes (or toxic), where its config does not say.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible endpoint, with its /v1.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The model there; truthfulqa_open takes two. For alpacafarm an annotator of alpaca_eval.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
    judge_chat: Annotated[
        bool, typer.Option("--judge-chat", help="The endpoint has chat completions alone.", rich_help_panel="Judges")
    ] = False,
    judge_key: Annotated[
        str, typer.Option(metavar="VARIABLE", help="The environment variable with its key.", rich_help_panel="Judges")
    ] = "OPENAI_API_KEY",
    verdicts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where a judge's verdicts are kept, and taken from; by default beside the predictions.",
            rich_help_panel="Judges",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score a file of predictions, ours or those that the paper's authors published.

    The figures are theirs: the same rules, on the same field names. Code is run in a sandbox; where it cannot be locked
    up it is not run. Verdicts of a judge are kept as they come: the exit status is 3 if the judge does not answer, and
    the same command then goes on from there.
    """
    from proxytune.evaluation import check_tasks, records
    from proxytune.evaluation import score as scored
    from proxytune.evaluation.scoring import CODE

    check_tasks([task])
    lines = records.read(predictions)
    if json_file is not None:
        json_file.open("a").close()  # now, not after an hour, is when to say that it cannot be written
    try:
        ks = [int(part) for part in k.split(",")]
    except ValueError as error:
        raise ProxyTuneError(f"--k is numbers, such as 1,10, not {k!r}") from error
    if min(ks) < 1:
        raise ProxyTuneError(f"--k is numbers from 1 on, not {k!r}")
    kept = verdicts or predictions.with_name(f"{predictions.name}.verdicts.jsonl")
    options: dict[str, Any] = {}
    if task in CODE:
        from proxytune.evaluation.code import limits_of

        options = {
            "data": data,
            "ks": ks,
            "workers": workers,
            "limits": limits_of(task, seconds),
            "unguarded": unguarded,
        }
    given = [judge, judge_label, judge_url, judge_model]
    if any(given) or task == "alpacafarm":
        from proxytune.evaluation import judges

        options["judge"] = judges.choose(
            task,
            judge or (),
            url=judge_url,
            models=judge_model or (),
            key_variable=judge_key,
            chat=judge_chat,
            label=judge_label,
            reference=data,
            kept=kept,
        )
    total = len(records.parse(task, lines))
    with _judged(f"its verdicts until here are kept in {kept}"), progress_bar(total, True) as advance:
        result = scored(task, lines, rerun=rerun, kept=kept, progress=advance, **options)
    show_scores(result)
    if json_file is not None:
        said = {"task": task, "metrics": result.metrics, **({"outcomes": result.outcomes} if result.outcomes else {})}
        json_file.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def show_scores(result: Scores) -> None:
    """Print a task's figures: the headline with its interval, then the others."""
    from proxytune.evaluation.results import metric_text, spread_of

    counts = {name: value for name, value in result.metrics.items() if isinstance(value, int)}
    total = counts["total"] - counts.get("num_invalid_predictions", 0)
    spread = spread_of(result, result.headline)
    value, low, high = spread.value, spread.low, spread.high
    whole = abs(value * total - round(value * total)) < 1e-6
    headline = f"{round(value * total)}/{total}" if whole else f"mean of {total}"
    rows = [(result.headline, headline, f"{100 * value:.1f} %", f"{100 * low:.1f} – {100 * high:.1f}")]
    rows += [(name, "", metric_text(name, v), "") for name, v in list(result.metrics.items())[1:] if name not in counts]
    rows += [(name.replace("_", " "), str(value), "", "") for name, value in counts.items()]
    rows += [(f"samples: {name}", str(value), "", "") for name, value in result.outcomes.items()]
    show_table(f"{result.task}|count|share|95 % interval", rows)
