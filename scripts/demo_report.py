"""The tables of the demo in docs/experiments.md and the figure of docs/demo.md, from what build_demo.py has counted.

    python scripts/demo_report.py runs/demo/seed-*.json --shown runs/demo/measured/recipe --figure docs/demo_why

A JSON file is one seed's (``build_demo.py count``); ``--shown`` is a folder of predictions (``build_demo.py measure``),
of which the arms that are shown examples are read: they depend on no seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from proxytune.answers.journal import Journal
from proxytune.evaluation import ARMS
from proxytune.evaluation.plots import ACCENT, PLAIN, STYLE
from proxytune.evaluation.scoring import score_lines
from proxytune.evaluation.statistics import mcnemar
from proxytune.tables import Table, markdown

SHOWN = ("base_few_shot", "base_many_shot", "base_own_examples")
TASKS = {"demo_facts": "seen wordings", "demo_facts_reworded": "held-out wordings"}


def arms_of(seed: Mapping[str, Any], task: str, shown: Path | None) -> dict[str, list[bool]]:
    """Each arm's facts, right or not, in the order of the test set."""
    right = seed[task]["right"]
    mixtures = {"base": "base", "anti_expert": "anti_expert", "expert": "expert", "proxy_tuned": "proxy_tuned 1"}
    mixtures |= {"mean_logits": "mean 1", "weighted_mean": f"mean {seed['mean_weight']:g}"}
    found = {arm: right[mixture] for arm, mixture in mixtures.items()}
    for arm in SHOWN if shown else ():
        file = shown / task / f"{arm}.jsonl"  # type: ignore[operator]
        if file.exists():
            lines = sorted(Journal(file).read().lines, key=lambda line: int(line["id"]))
            found[arm] = [bool(value) for value in score_lines(task, lines).examples]
    return found


def table(seeds: Sequence[Mapping[str, Any]], task: str, shown: Path | None) -> Table:
    """The counts of every seed, and proxy-tuned against each arm, seed by seed and pooled."""
    of_seeds = [arms_of(seed, task, shown) for seed in seeds]
    columns = ["arm", *(f"M- {seed['seed']}, adapter {seed['adapter_seed']}" for seed in seeds), "pooled", "p"]
    rows = []
    for arm in (arm for arm in ARMS if all(arm in of for of in of_seeds)):
        cells = []
        for of in of_seeds:
            won, lost, p = mcnemar(of["proxy_tuned"], of[arm])
            pairs = "" if arm == "proxy_tuned" else f" ({won} : {lost}, {p:.1g})"
            cells.append(f"{sum(of[arm])}/{len(of[arm])}{pairs}")
        pooled = [[value for of in of_seeds for value in of[each]] for each in ("proxy_tuned", arm)]
        won, lost, p = mcnemar(*pooled)
        total = f"{sum(pooled[1])}/{len(pooled[1])}"
        rows.append([ARMS[arm], *cells, total, "" if arm == "proxy_tuned" else f"{won} : {lost}, {p:.1g}"])
    bold = [at for at, row in enumerate(rows) if row[0] == ARMS["proxy_tuned"]]
    return Table(columns, rows, task, f", {TASKS[task]}", bold)


def figure(seed: Mapping[str, Any], path: Path) -> None:
    """How probable a token of the right answer is under each model: the house word, and what follows it."""
    names = {"base": "base", "anti_expert": "anti-expert", "expert": "expert", "mean 1": "mean of base and expert"}
    names |= {"proxy_tuned 1": "proxy-tuned"}
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(7.5, 2.6), layout="constrained")
        panels = drawn.subplots(1, 2, sharey=True)
        for panel, key, title in zip(panels, ("form", "content"), ("the house word", "the answer")):
            values = [fmean(seed["demo_facts"][key][name]) for name in names]
            colors = [ACCENT if name.startswith("proxy") else PLAIN for name in names]
            panel.barh(range(len(values), 0, -1), values, height=0.66, color=colors)
            for place, value in zip(range(len(values), 0, -1), values):
                panel.annotate(
                    f"{round(value, 1) or 0.0:.1f}",
                    (value, place),
                    (-4, 0),
                    textcoords="offset points",
                    va="center",
                    ha="right",
                )
            panel.set_yticks(range(len(values), 0, -1), list(names.values()))
            panel.set_xlim(1.18 * min(values), 0)
            panel.set_title(title, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel("log-probability of a token, nats")
        drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counted", nargs="+", type=Path)
    parser.add_argument("--shown", type=Path)
    parser.add_argument("--figure", type=Path, help="of the first file; .svg is added")
    given = parser.parse_args()
    seeds = [json.loads(path.read_text("utf-8")) for path in given.counted]
    print(markdown([table(seeds, task, given.shown) for task in TASKS]))
    for seed in seeds:
        print("formed", {name: sum(values) for name, values in seed["demo_facts"]["formed"].items()})
        for key in ("form", "content"):
            print(key, {name: round(fmean(values), 2) for name, values in seed["demo_facts"][key].items()})
    if given.figure:
        figure(seeds[0], given.figure)


if __name__ == "__main__":
    main()
