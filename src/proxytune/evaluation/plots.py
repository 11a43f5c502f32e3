"""Figures of an evaluation, as PNG and SVG: bars of the arms with their intervals, and the alpha curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from proxytune.evaluation import ARMS

__all__ = ["ACCENT", "PLAIN", "STYLE", "plot_arms", "plot_sweep", "save"]

ACCENT, PLAIN, LINES = "#1b6ca8", "#b8c4ce", ("#1b6ca8", "#c8553d", "#5b8c5a", "#8d6a9f", "#7f7f7f")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "proxytune",  # so that the same numbers give the same file
}


def plot_arms(tasks: Mapping[str, Mapping[str, Any]], path: Path) -> list[Path]:
    """One panel a task: each arm's share with its 95 % interval, the proxy-tuned base in colour.

    Args:
        tasks: the tasks with a score, as in results.json.
        path: path without a suffix; .png and .svg are written.
    """
    n_arms = sum(len(task["arms"]) for task in tasks.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.3 + 0.9 * len(tasks) + 0.36 * n_arms), layout="constrained")
        heights = [2.5 + len(task["arms"]) for task in tasks.values()]
        panels = figure.subplots(len(tasks), squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, task) in zip(panels, tasks.items()):
            arms = list(task["arms"])
            for place, arm in enumerate(reversed(arms)):
                of = task["arms"][arm]
                value, low, high = (100 * of[key] for key in ("value", "low", "high"))
                color = ACCENT if arm == "proxy_tuned" else PLAIN
                panel.barh(place, value, height=0.66, color=color)
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                panel.errorbar(value, place, xerr=error, color="#333333", capsize=3, linewidth=1, fmt="none")
                panel.annotate(
                    f"{value:.1f}", (max(high, value), place), (6, 0), textcoords="offset points", va="center"
                )
            panel.set_yticks(range(len(arms)), [ARMS.get(arm, arm) for arm in reversed(arms)])
            panel.set_xlim(0, min(112.0, 8 + 1.12 * max(100 * of["high"] for of in task["arms"].values())))
            panel.set_xticks([tick for tick in panel.get_xticks() if tick <= 100])
            panel.set_xlabel(f"{_said(task['headline'])}, %, with 95 % intervals")
            panel.set_title(f"{name}, {task['examples']} examples", loc="left", fontweight="bold", fontsize=10)
        return save(figure, path)


def plot_sweep(name: str, task: Mapping[str, Any], path: Path) -> list[Path]:
    """The metrics of a task over alpha, the headline's with its 95 % interval as a band."""
    points = task["points"]
    alphas = [point["alpha"] for point in points]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        panel = figure.subplots()
        # The shares; not bits per byte, and not a metric's parts, such as one a group.
        parts = (f"{task['headline']}_", "bits_")
        shares = [name for name, value in points[0]["metrics"].items() if isinstance(value, float)]
        metrics = [task["headline"], *(n for n in shares if n != task["headline"] and not n.startswith(parts))]
        for metric, color in zip(metrics, LINES):
            values = [100 * point["metrics"][metric] for point in points]
            panel.plot(alphas, values, marker="o", markersize=4, color=color, label=_said(metric))
        low, high = ([100 * point[side] for point in points] for side in ("low", "high"))
        panel.fill_between(alphas, low, high, color=LINES[0], alpha=0.18, linewidth=0)
        if (fit := task.get("fit")) is not None:
            panel.axvline(fit["best"], color="#333333", linewidth=1, label="most likely alpha")
            if fit["low"] is not None:
                panel.axvspan(fit["low"], fit["high"], color=PLAIN, alpha=0.4, linewidth=0)
        panel.set_xlabel("alpha")
        panel.set_ylabel(f"{_said(task['headline'])}, %" if len(metrics) == 1 else "%")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.set_title(f"{name}, {task['examples']} examples", loc="left", fontweight="bold", fontsize=10)
        if len(metrics) > 1 or fit is not None:
            panel.legend(frameon=False)
        return save(figure, path)


def _said(metric: str) -> str:
    return metric.replace("_", " ")


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG; ``path`` has no suffix."""
    written = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(written[0], dpi=150)
    figure.savefig(written[1], metadata={"Date": None})
    return written
