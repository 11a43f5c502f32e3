"""How well `proxytune limit` predicts which problems a steered model solves: the table of docs/limit.md.

    python scripts/limit_auc.py --problems 100 --assets runs/assets-1 --work runs/limit

For each problem: the share of gold tokens that greedy decoding can choose at the recipe's alpha and at some alpha, and
whether the steered model's own greedy answer is right. The table has the area under the ROC curve (AUC) of each share,
with a 95 % bootstrap interval over problems. ``--figure`` shows the gold tokens. The recipes are the demo's two, and
``demo`` made of other ``--assets`` of scripts/build_demo.py. What is done is kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from proxytune import load_recipe
from proxytune.analysis.limit import limit
from proxytune.analysis.references import Reference
from proxytune.answers.generation import Sampling, answer_batches, encode
from proxytune.answers.text import load
from proxytune.demo import materialize
from proxytune.demo.tasks import FACTS, WORD_PROBLEMS, DemoTask
from proxytune.evaluation.plots import LINES, STYLE, save
from proxytune.recipe.options import LoadingOptions
from proxytune.tables import Table, markdown


def measure(recipe: Path, task: DemoTask, problems: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each problem the two shares, and whether it is solved."""
    model, tokenizer = load(load_recipe(recipe), LoadingOptions(pack=True))
    jobs = task.plan(problems).jobs["raw"]
    alphas = tuple(expert.alpha for expert in model.experts)
    shown = {"chat": False, "system": None, "negative_prompt": None}
    references = [Reference(job.context, (problem.completion,), job.id) for job, problem in zip(jobs, problems)]
    reached = list(limit(model, tokenizer, references, alphas, shown=shown))
    written = answer_batches(
        model,
        tokenizer,
        [encode(model, tokenizer, job.context) for job in jobs],
        [alphas] * len(jobs),
        rows=range(len(jobs)),
        batch_size=16,
        max_new_tokens=28,
        sampling=Sampling(),
        stop_strings=["\n\n"],
    )
    texts = [one.text for batch in written for one in batch]
    return [
        {
            "recipe": one.share(False),
            "some": one.share(True),
            "solved": task.is_correct(text, problem),
            "tokens": [[t.needed, t.given, t.at_recipe_alpha, t.reachable is not None] for t in one.tokens],
        }
        for one, text, problem in zip(reached, texts, problems, strict=True)
    ]


def auc(shares: Sequence[float], solved: Sequence[bool]) -> str:
    """The area under the curve, with its interval."""

    def area(shares: Any, solved: Any) -> float:
        of, was = np.asarray(shares), np.asarray(solved, dtype=bool)
        right, wrong = of[was], of[~was]
        if not len(right) or not len(wrong):
            return float("nan")
        return float(stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong)))

    found = area(shares, solved)
    if np.isnan(found):
        return "–"
    drawn = stats.bootstrap(
        (np.array(shares), np.array(solved)),
        area,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=0,
    ).bootstrap_distribution
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def figure(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> list[Path]:
    """A panel for each recipe: what the gold tokens need to become the choice, and what the experts give them."""
    groups = {
        "chosen at the recipe's alpha": (LINES[0], lambda at_recipe, reachable: at_recipe),
        "within reach at another": (LINES[2], lambda at_recipe, reachable: reachable and not at_recipe),
        "out of reach": (LINES[1], lambda at_recipe, reachable: not reachable),
    }
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 4.0), layout="constrained")
        for panel, (name, lines) in zip(drawn.subplots(1, len(found), sharey=True), found.items()):
            tokens = [token for line in lines for token in line["tokens"]]
            for label, (color, of) in groups.items():
                points = [(needed, given) for needed, given, *flags in tokens if of(*flags)]
                panel.scatter(*zip(*points), s=9, color=color, alpha=0.5, linewidth=0, label=label)
            top = max(needed for needed, *_ in tokens)
            panel.plot([0, top], [0, top], color="#999999", linewidth=1, linestyle="--")
            panel.set_title(name, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel("needed on the base's first choice, nats")
        drawn.axes[0].set_ylabel("given by the experts at the recipe's alpha, nats")
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return save(drawn, path)


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--assets", type=Path, nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("runs/limit"))
    parser.add_argument("--figure", type=Path, help=".png and .svg are added")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    recipes = [(task.recipe, materialize() / task.folder, task) for task in (FACTS, WORD_PROBLEMS)]
    for assets in asked.assets:
        recipes.append((assets.name, materialize(asked.work / "cache", assets) / FACTS.folder, FACTS))
    rows, found = [], {}
    for name, recipe, task in recipes:
        file = asked.work / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(measure(recipe, task, task.choose("test", asked.problems, 0))))
        lines = found[name] = json.loads(file.read_text())
        solved = [line["solved"] for line in lines]
        whole = sum(line["some"] == 1 for line in lines)
        shares = [[line[key] for line in lines] for key in ("some", "recipe")]
        rows.append([name, f"{sum(solved)}/{len(lines)}", f"{whole}/{len(lines)}", *(auc(of, solved) for of in shares)])
        print(name, flush=True)
    heads = ["recipe", "solved", "whole answer reachable", "AUC, some alpha", "AUC, the recipe's alpha"]
    print(markdown([Table(heads, rows)]))
    if asked.figure:
        figure({task.recipe: found[task.recipe] for task in (FACTS, WORD_PROBLEMS)}, asked.figure)


if __name__ == "__main__":
    main()
