"""Figures of a set of traces: the shift by class of token, and the share of changed choices by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from proxytune.evaluation.plots import ACCENT, PLAIN, STYLE, save

__all__ = ["plot_alpha", "plot_tokens"]


def plot_tokens(found: Mapping[str, Any], place: Path) -> list[Path]:
    """Draw the result of :func:`proxytune.analysis.tokens.analyze`: classes and positions, as PNG and SVG."""
    place.mkdir(parents=True, exist_ok=True)
    classes = [(name.replace("_", " "), of) for name, of in found["classes"].items() if of["tokens"]]
    positions = [(f"{of['from']}–{of['to']}", of) for of in found["positions"]]
    written = _bars([("all tokens", found["shift"]), *classes], "mean shift of probability", place / "classes")
    return written + _bars([("all", found["changed"]), *positions], "share of changed choices", place / "positions")


def _bars(rows: Sequence[tuple[str, Mapping[str, Any]]], label: str, path: Path) -> list[Path]:
    """One bar per mean with its 95 % interval; the first one in colour."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 0.9 + 0.36 * len(rows)), layout="constrained")
        panel = figure.subplots()
        for at, (_, of) in enumerate(rows):
            mean = of["mean"] or 0.0
            panel.barh(at, mean, height=0.66, color=PLAIN if at else ACCENT)
            if of["low"] is not None:
                error = [[max(0.0, mean - of["low"])], [max(0.0, of["high"] - mean)]]
                panel.errorbar(mean, at, xerr=error, color="#333333", capsize=3, linewidth=1, fmt="none")
        panel.set_yticks(range(len(rows)), [name for name, _ in rows])
        panel.invert_yaxis()
        panel.set_xlabel(f"{label}, with 95 % intervals")
        return save(figure, path)


def plot_alpha(found: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw how probable the gold answers are at each alpha, with the best one and its interval, PNG and SVG."""
    alpha = found["alpha"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        panel = figure.subplots()
        curve = alpha["curve"]
        panel.plot([point["alpha"] for point in curve], [point["logprob"] for point in curve], color=ACCENT)
        panel.axvline(alpha["best"], color="#333333", linewidth=1)
        if alpha["low"] is not None:
            panel.axvspan(alpha["low"], alpha["high"], color=PLAIN, alpha=0.5, linewidth=0)
        for value in set(alpha["recipe"].values()):
            panel.axvline(value, color="#c8553d", linewidth=1, linestyle="--")
        panel.set_xlabel("alpha (line: most likely, band: 95 % interval, dashed: the recipe's)")
        panel.set_ylabel("log-probability per gold token, nats")
        return save(figure, path)
