"""From predictions to results: each task's scores, intervals, comparisons of the arms, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from proxytune.evaluation import ARMS, shots_of
from proxytune.evaluation.judges import NeedsJudge
from proxytune.evaluation.scoring import Scores, mean, score_lines
from proxytune.evaluation.statistics import Interval, compare, gap_closed, interval, mcnemar, wilson, zero_or_one
from proxytune.tables import Table, percent

__all__ = [
    "LEGEND",
    "results_tables",
    "shots_of",
    "spread_of",
    "sweep_results",
    "sweep_tables",
    "task_results",
]

# The meaning of words in the tables that need an explanation.
LEGEND: Mapping[str, str] = {
    "right": "examples that count as right, of all",
    "p to proxy-tuned": "the chance of a difference as large as this one if there were none, paired by example",
    "examples/s": "of generating only, without loading and scoring",
    "nothing_else": "right, and no word before or after the two lines of an answer",
    "valid": "an object of the right form, with any of the options",
    "acc": "of the answers that have a letter",
    "acc_of_all": "of all answers; one without a letter is wrong",
    "num_invalid_predictions": "answers without a letter",
    "byte_probability": "the geometric mean of the probability of a byte",
    "bits_per_byte": "of all texts together; fewer are better",
    "certain": "tokens that are known to be the choice of the whole mixture, of all",
    "requests": "to the base's server, without those that find out what it offers",
}
NO_SHARES = ("bits_per_byte",)  # every other metric that is not a count is between 0 and 1
NOT_SCORED = "not scored: needs a judge"
Lines = Sequence[Mapping[str, Any]]
Name = TypeVar("Name", str, float)


# -- comparison -----------------------------------------------------------------------------------------------
def task_results(
    task: str,
    lines: Mapping[str, Lines],
    *,
    samples: int = 1,
    options: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """One task's part of the results.

    Args:
        lines: arm -> its predictions. samples: of an example. options: of :func:`score_lines`.
        note: is told where there is no judge; the arms then have no scores.
    """
    scores = _scored(task, lines, options, note)
    seconds = {name: sum(float(line["seconds"]) for line in of) for name, of in lines.items()}
    speeds = {name: len(of) / seconds[name] if seconds[name] else 0.0 for name, of in lines.items()}
    found: dict[str, Any] = {
        **_about(scores, lines, samples),
        "arms": {name: _measured(of, lines[name]) for name, of in scores.items()},
        "examples_per_second": speeds,
        "steered_to_base": None,
        "gap_closed": None,
        "proxy_tuned_against": {},
    }
    if speeds.get("base") and speeds.get("proxy_tuned"):
        found["steered_to_base"] = speeds["proxy_tuned"] / speeds["base"]
    if {"base", "proxy_tuned", "tuned"} <= set(scores):
        base, steered, tuned = _paired(scores["base"], scores["proxy_tuned"], scores["tuned"])
        found["gap_closed"] = vars(gap_closed(base, steered, tuned))
    if "proxy_tuned" in scores:
        found["proxy_tuned_against"] = {
            name: _against(*_paired(scores["proxy_tuned"], of)) for name, of in scores.items() if name != "proxy_tuned"
        }
    return found


def sweep_results(
    task: str,
    lines: Mapping[float, Lines],
    *,
    samples: int = 1,
    options: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The results of one task of a sweep; ``lines``: alpha -> its predictions. See :func:`task_results`."""
    scores = _scored(task, lines, options, note)
    points = [{"alpha": alpha, **_measured(of, lines[alpha])} for alpha, of in scores.items()]
    return {**_about(scores, lines, samples), "points": points}


def _scored(
    task: str, lines: Mapping[Name, Lines], options: Mapping[str, Any] | None, note: Callable[[str], None]
) -> dict[Name, Scores]:
    """The scores of each arm or alpha; empty if a judge is missing."""
    try:
        return {name: score_lines(task, of, **(options or {})) for name, of in lines.items()}
    except NeedsJudge as error:
        note(f"{error}; the predictions are kept and will not be made again")
        return {}


def _about(scores: Mapping[Name, Scores], lines: Mapping[Name, Lines], samples: int) -> dict[str, Any]:
    return {
        "headline": compared_metric(next(iter(scores.values()))) if scores else None,
        "examples": max((len({line["id"] for line in of}) for of in lines.values()), default=0),
        "samples": samples,
    }


def _measured(scores: Scores, lines: Lines) -> dict[str, Any]:
    """The values of an arm or an alpha for tables and figures."""
    spread = spread_of(scores, compared_metric(scores))
    return {
        "value": spread.value,
        "low": spread.low,
        "high": spread.high,
        "interval": spread.method,
        "count": round(sum(scores.examples)) if zero_or_one(scores.examples) else None,
        "of": len(scores.examples),
        "metrics": scores.metrics,
        # Examples that were longer than the model's context, and lost their beginning.
        "cut": sum(any(line.get("cut", ())) for line in lines),
        **_asked(lines),
    }


def _asked(lines: Lines) -> dict[str, Any]:
    """For a base behind an API: the share of tokens that are certain, and the number of requests."""
    asked = [line for line in lines if "calls" in line]
    marks = [float(mark) for line in asked for mark in line["certified"]]
    return {"certified": mean(marks) if marks else None, "calls": sum(line["calls"] for line in asked)} if asked else {}


def spread_of(scores: Scores, metric: str) -> Interval:
    """A metric and its 95 % interval: of the mean of the examples, or of ``acc``, the share of the valid answers.

    If every example is 0 or 1 it is Wilson's. Otherwise (pass@k, several samples) it is a bootstrap over the examples.
    """
    if metric == compared_metric(scores):
        return interval(scores.examples)
    valid = int(scores.metrics["total"] - scores.metrics["num_invalid_predictions"])
    return Interval(float(scores.metrics[metric]), *wilson(round(scores.metrics[metric] * valid), valid), "Wilson")


def _against(steered: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    p, test = compare(steered, other)
    found: dict[str, Any] = {"p": p, "test": test, "difference": mean(steered) - mean(other)}
    if test == "exact McNemar":
        won, lost, _ = mcnemar([bool(v) for v in steered], [bool(v) for v in other])
        found |= {"only_proxy_tuned": won, "only_other": lost}
    return found


def compared_metric(scores: Scores) -> str:
    """The metric that is the mean of the examples, which intervals and tests are of."""
    return "acc_of_all" if "acc_of_all" in scores.metrics else scores.headline


def _paired(*scores: Scores) -> list[list[float]]:
    """The examples that all arms have, in one order. (A judge or a parser may leave some out.)"""
    by_id = [dict(zip(of.ids, of.examples)) for of in scores]
    shared = [name for name in scores[0].ids if all(name in of for of in by_id)]
    return [[of[name] for name in shared] for of in by_id]


# -- tables ---------------------------------------------------------------------------------------------------
def results_tables(results: Mapping[str, Any]) -> list[Table]:
    """The results as tables, one per task."""
    tables = []
    for name, task in results["tasks"].items():
        samples = f", {task['samples']} samples each" if task["samples"] > 1 else ""
        about = f" ({task['examples']} examples{samples})"
        if not task["arms"]:
            tables.append(Table((), (), name, about, notes=[NOT_SCORED]))
            continue
        heads, measured = _columns(task["headline"], list(task["arms"].values()))
        rows = []
        for arm, cells in zip(task["arms"], measured):
            against = task["proxy_tuned_against"].get(arm)
            p = "" if against is None else f"{against['p']:.2g}"
            rows.append([ARMS.get(arm, arm), *cells, p, f"{task['examples_per_second'][arm]:.2f}"])
        bold = [at for at, arm in enumerate(task["arms"]) if arm == "proxy_tuned"]
        columns = ["arm", *heads, "p to proxy-tuned", "examples/s"]
        tables.append(Table(columns, rows, name, about, bold, LEGEND, _notes(task)))
    return tables


def _notes(task: Mapping[str, Any]) -> list[str]:
    said = []
    gap = task["gap_closed"]
    if gap is not None:
        if gap["value"] is None:
            said.append("Gap closed: undefined, the tuned model is no better or worse than the base.")
        else:
            spread = "not bounded here" if gap["low"] is None else f"{percent(gap['low'])} – {percent(gap['high'])}"
            said.append(f"Gap closed: {percent(gap['value'])} (95 % interval {spread}).")
    if task["steered_to_base"] is not None:
        said.append(f"The steered arm ran at {task['steered_to_base']:.2f} times the speed of the base.")
    said += _cut_notes(task["arms"].values())
    tests = {of["test"] for of in task["proxy_tuned_against"].values()}
    methods = {of["interval"] for of in task["arms"].values()}
    said.append(f"Intervals: {', '.join(sorted(methods))}." + (f" p: {', '.join(sorted(tests))}." if tests else ""))
    return said


def _cut_notes(measured: Iterable[Mapping[str, Any]]) -> list[str]:
    if not (most := max(of["cut"] for of in measured)):
        return []
    return [f"Examples that were longer than the context, and lost their beginning as in lm_eval: {most}."]


def sweep_tables(results: Mapping[str, Any]) -> list[Table]:
    """A sweep's results as tables, one per task."""
    tables = []
    for name, task in results["tasks"].items():
        about = f" ({task['examples']} examples)"
        if not task["points"]:
            tables.append(Table((), (), name, about, notes=[NOT_SCORED]))
            continue
        heads, measured = _columns(task["headline"], task["points"])
        rows = [[f"{point['alpha']:g}", *cells] for point, cells in zip(task["points"], measured)]
        notes = [*_cut_notes(task["points"]), *_fit_notes(task)]
        tables.append(Table(["alpha", *heads], rows, name, about, legend=LEGEND, notes=notes))
    return tables


def _fit_notes(task: Mapping[str, Any]) -> list[str]:
    """What the likelihood of the gold answers says of alpha, beside the best score."""
    if "fit" not in task:
        return []
    fit = task["fit"]
    bounds = "" if fit["low"] is None else f" (95 % interval {fit['low']:.2f} to {fit['high']:.2f})"
    best = max(task["points"], key=lambda point: point["value"])
    at = f"at least {fit['best']:g}" if fit["at_end"] else f"{fit['best']:.2f}"
    return [
        f"The gold answers are most probable at alpha {at}{bounds}, by {fit['gain']:.3f} nats per token over alpha 0; "
        f"the best {task['headline']} is at {best['alpha']:g}."
    ]


def _columns(headline: str, measured: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The measured values: the heads of the columns, and the cells of each arm or alpha.

    Counts that the table already has, and parts of a metric, such as one per group, are left out.
    """
    names = dict.fromkeys(name for of in measured for name in of["metrics"])
    left_out = (headline, "samples", "total")
    others = [name for name in names if name not in left_out and not name.startswith(f"{headline}_")]
    cells = [
        [
            "" if of["count"] is None else f"{of['count']}/{of['of']}",
            percent(of["value"]),
            f"{100 * of['low']:.1f} – {100 * of['high']:.1f}",
            *(metric_text(metric, of["metrics"].get(metric)) for metric in others),
            metric_text("certain", of.get("certified")),
            metric_text("requests", of.get("calls")),
        ]
        for of in measured
    ]
    return ["right", headline, "95 % interval", *others, "certain", "requests"], cells


def metric_text(name: str, value: float | None) -> str:
    """A metric as text for tables: counts unchanged, shares in per cent, bits as a number."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if name in NO_SHARES else percent(value)
