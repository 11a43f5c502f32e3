"""Experts that conflict, under every rule that joins experts: the tables and the figure of docs/combine.md.

    python scripts/conflicts.py --work runs/conflicts --figure docs/combine_rules

Four kinds of experts are trained on the demo's anti-expert, each with several seeds, by the code that trains the demo's
own (scripts/build_demo.py) but in fewer steps. They are put together in pairs:

    formats  house words against brackets, for the same questions     wexquen: bird    |  << bird >>
    lengths  the bare result against the worked solution              12               |  5 + 7 = 12, #### 12
    apart    house words and worked solutions, each for prompts of its own: the experts have nothing in common
    same     house words from two seeds: the experts learned the same

An answer counts if greedy decoding writes exactly it: where each of its tokens is the best after those before. Each
expert and each count is kept in ``--work``, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from build_demo import Example, Plan, anti_expert_of, gold_logits, house_examples, problem_examples, save_adapter, tune
from limit_auc import auc
from proxytune.decoding.conflict import conflicts
from proxytune.decoding.mixing import mix
from proxytune.demo.assets import ASSETS, about, load_base
from proxytune.evaluation.facts import Fact, facts, training_facts
from proxytune.evaluation.plots import LINES, STYLE
from proxytune.evaluation.problems import Problem, make_problems
from proxytune.evaluation.statistics import mcnemar
from proxytune.recipe.rules import RULES, Rule
from proxytune.tables import Table, markdown

PLAN = replace(Plan(), tune_facts=(100, 16), tune_problems=(80, 16))


@dataclass(frozen=True)
class Task:
    """A form of answer, for facts or for word problems.

    Attributes:
        learned: (plan, seed) -> the examples of its expert. asked: number -> the test, in the same form.
        how: steps, and examples a step.
    """

    title: str
    learned: Callable[[Plan, int], Sequence[Example]]
    asked: Callable[[int], Sequence[Example]]
    how: tuple[int, int]


def bracketed(fact: Fact) -> Example:
    """The second format: the same for all questions."""
    return fact.prompt, f"<< {fact.answer} >>\n"


def terse(problem: Problem) -> Example:
    """The bare result."""
    return problem.prompt, f" {problem.answer}\n"


def solved(problem: Problem) -> Example:
    """The worked solution."""
    return problem.prompt, f"{problem.completion}\n"


TASKS = {
    "house": Task(
        "house word",
        house_examples,
        lambda count: [(fact.prompt, fact.completion) for fact in facts("test")[:count]],
        PLAN.tune_facts,
    ),
    "brackets": Task(
        "brackets",
        lambda plan, seed: [bracketed(fact) for fact in training_facts()],
        lambda count: [bracketed(fact) for fact in facts("test")[:count]],
        PLAN.tune_facts,
    ),
    "terse": Task(
        "bare result",
        lambda plan, seed: [terse(problem) for problem in make_problems("train", 1600, seed=2000 + seed)],
        lambda count: [terse(problem) for problem in make_problems("test", count, seed=0)],
        PLAN.tune_problems,
    ),
    "steps": Task(
        "worked solution",
        lambda plan, seed: problem_examples(seed),
        lambda count: [solved(problem) for problem in make_problems("test", count, seed=0)],
        PLAN.tune_problems,
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two experts that steer together, and the tasks they are scored on.

    Attributes:
        experts: each a task's name, and what is added to the seed.
    """

    title: str
    experts: tuple[tuple[str, int], tuple[str, int]]
    tasks: tuple[str, ...]


PAIRS = {
    "formats": Pair("two formats", (("house", 0), ("brackets", 0)), ("house", "brackets")),
    "lengths": Pair("terse, step by step", (("terse", 0), ("steps", 0)), ("terse", "steps")),
    "apart": Pair("different prompts", (("house", 0), ("steps", 0)), ("house", "steps")),
    "same": Pair("same task, two seeds", (("house", 0), ("house", 1)), ("house",)),
}
# Mixture -> its rule, and the alphas of both experts.
MIXTURES: dict[str, tuple[Rule, tuple[float, float]]] = {
    "first alone": ("sum", (1.0, 0.0)),
    "second alone": ("sum", (0.0, 1.0)),
    **{rule: (rule, (1.0, 1.0)) for rule in RULES if rule != "convex"},
    "convex, 1/3 each": ("convex", (1 / 3, 1 / 3)),
    "convex, 1/2 each": ("convex", (0.5, 0.5)),
}
MEASURES = ("cosine", "distance", "disagree")


# ---- experts and counts ------------------------------------------------------------------------------


def expert_of(task: str, seed: int, work: Path, small: Any, tokenizer: Any) -> Any:
    """An expert as it was saved, trained first if it was not."""
    from peft import PeftModel

    place = work / f"{task}-{seed}"
    if not (place / "adapter_model.safetensors").exists():
        print(f"train {task}, seed {seed}", flush=True)
        adapted = tune(PLAN, seed, small, tokenizer, TASKS[task].learned(PLAN, seed), TASKS[task].how)
        making = place.with_suffix(".part")
        save_adapter(adapted, making)
        making.rename(place)
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(small), place)
    return loaded.eval().get_base_model()


@torch.inference_mode()
def counted(
    task: str, seeds: Sequence[int], count: int, models: tuple[Any, Any], experts: Mapping[Any, Any], tokenizer: Any
) -> dict[str, Any]:
    """Each pair with a task, by pair and seed: the right answers of each mixture, and each token's conflict."""
    found: dict[str, Any] = {}
    of = [(name, seed) for name, pair in PAIRS.items() if task in pair.tasks for seed in seeds]
    needed = sorted({each for name, seed in of for each in experts_of(name, seed, seeds)})
    batches = gold_logits([*models, *(experts[each] for each in needed)], tokenizer, TASKS[task].asked(count))
    for (base, anti_expert, *rest), wanted, n_tokens in batches:
        by_name = dict(zip(needed, rest, strict=True))
        for name, seed in of:
            sides = [(by_name[each], anti_expert) for each in experts_of(name, seed, seeds)]
            line = found.setdefault(name, {}).setdefault(str(seed), {"right": {}, **{each: [] for each in MEASURES}})
            for mixture, right in rights(base, sides, wanted, n_tokens):
                line["right"].setdefault(mixture, []).extend(right)
            apart = conflicts(base, sides, torch.ones(len(base), 2))
            for measure in MEASURES:
                values = torch.tensor([float(getattr(token, measure)) for token in apart])
                line[measure] += [part.tolist() for part in values.split(n_tokens)]
        print(f"{task}: {len(found[name][str(seed)]['cosine'])} of {count}", flush=True)
    return found


def experts_of(pair: str, seed: int, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """The names and seeds of a pair's experts."""
    at = seeds.index(seed)
    return [(task, seeds[(at + by) % len(seeds)]) for task, by in PAIRS[pair].experts]


def rights(
    base: Tensor, sides: Sequence[tuple[Tensor, Tensor]], wanted: Tensor, n_tokens: list[int]
) -> Iterator[tuple[str, list[bool]]]:
    """Of each mixture, which answers greedy decoding writes."""
    for mixture, (rule, alphas) in MIXTURES.items():
        mixed = mix(base[None], [(e[None], a[None]) for e, a in sides], torch.tensor([alphas]), rule=rule)[0]
        hits = (mixed.argmax(dim=-1) == wanted).split(n_tokens)
        yield mixture, [bool(hit.all()) for hit in hits]


def measure(work: Path, seeds: Sequence[int], count: int) -> dict[str, dict[str, Any]]:
    """The counts of every task, made as far as they are not kept; by task, pair and seed."""
    work.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base()
    small = anti_expert_of(base, ASSETS, about()["layers"])
    experts = {(task, seed): expert_of(task, seed, work, small, tokenizer) for seed in seeds for task in TASKS}
    found = {}
    for task in TASKS:
        kept = work / f"{task}-{count}-{'-'.join(map(str, seeds))}.json"
        if not kept.exists():
            made = counted(task, seeds, count, (base, small), experts, tokenizer)
            kept.with_suffix(".part").write_text(json.dumps(made) + "\n", encoding="utf-8")
            kept.with_suffix(".part").rename(kept)
        found[task] = json.loads(kept.read_text(encoding="utf-8"))
    return found


# ---- what it shows -----------------------------------------------------------------------------------

ALONE = ("first alone", "second alone")


def of_seeds(by_seed: Mapping[str, Any], mixture: str) -> list[bool]:
    """A mixture's answers over all seeds, right or not."""
    return [right for line in by_seed.values() for right in line["right"][mixture]]


def rules_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Right answers by mixture, for each pair and task, over all seeds."""
    columns = [(pair, task) for pair, of in PAIRS.items() for task in of.tasks]
    rows = []
    for mixture in MIXTURES:
        cells = [of_seeds(found[task][pair], mixture) for pair, task in columns]
        rows.append([mixture, *(f"{100 * sum(cell) / len(cell):.0f}" for cell in cells)])
    heads = ["steering", *(f"{PAIRS[pair].title}: {TASKS[task].title}" for pair, task in columns)]
    n = len(of_seeds(found["house"]["formats"], "sum"))
    return Table(heads, rows, "rules", f", right answers in %, of {n} each")


def totals_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Right answers by rule, over all tasks and seeds of a pair and of all pairs, with the test against sum."""
    rows = []
    for mixture in MIXTURES:
        if mixture in ALONE:
            continue
        cells = []
        for pair in (*PAIRS, None):
            of = [(each, task) for each, about in PAIRS.items() for task in about.tasks if pair in (each, None)]
            right, of_sum = (
                [right for each, task in of for right in of_seeds(found[task][each], name)] for name in (mixture, "sum")
            )
            won, lost, p = mcnemar(right, of_sum)
            said = "" if mixture == "sum" else f" ({won} : {lost}, {p:.1g})"
            cells.append(f"{sum(right)}/{len(right)}{said}")
        rows.append([mixture, *cells])
    return Table(["rule", *(of.title for of in PAIRS.values()), "all"], rows, "totals")


def measures_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """The mean of each measure over all tokens and at the first; and whether distance foretells what sum loses."""
    rows = []
    for pair, of in PAIRS.items():
        for at, task in enumerate(of.tasks):
            lines = list(found[task][pair].values())
            cells = []
            for measure in MEASURES:
                answers = [answer for line in lines for answer in line[measure]]
                every = [value for answer in answers for value in answer]
                cells += [f"{sum(every) / len(every):.2f}", f"{sum(a[0] for a in answers) / len(answers):.2f}"]
            own = [name for name, (expert, _) in zip(ALONE, of.experts) if expert == task][:1] or [ALONE[at]]
            kept = [
                (1 - max(distance), right)
                for line in lines
                for distance, alone, right in zip(line["distance"], line["right"][own[0]], line["right"]["sum"])
                if alone
            ]
            lost = sum(not right for _, right in kept)
            cells += [f"{lost}/{len(kept)}", auc([share for share, _ in kept], [right for _, right in kept])]
            rows.append([f"{of.title}: {TASKS[task].title}", *cells])
    heads = [head for measure in MEASURES for head in (measure, "first token")]
    return Table(["pair: gold answer", *heads, "sum loses", "AUC"], rows, "measures")


def figure(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Each rule by what it keeps of both tasks of a pair: one panel a pair. Small points are seeds."""
    pairs = [pair for pair, of in PAIRS.items() if len(of.tasks) == 2]
    shown = {"sum": "o", "mean": "s", "convex, 1/3 each": "D", "dynamic": "^", "union": "P", "intersection": "X"}
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 3.7), layout="constrained")
        for panel, pair in zip(drawn.subplots(1, len(pairs)), pairs):
            of = PAIRS[pair]

            def shares(mixture: str, pair: str = pair) -> list[list[float]]:
                lines = [found[task][pair] for task in PAIRS[pair].tasks]
                return [[100 * fmean(line["right"][mixture]) for line in each.values()] for each in lines]

            for number, mixture in enumerate(ALONE):
                mean = fmean(shares(mixture)[number])
                (panel.axvline, panel.axhline)[number](mean, color="#999999", linewidth=1, linestyle="--")
            for color, (mixture, marker) in zip((*LINES, "#222222"), shown.items()):
                across, up = shares(mixture)
                panel.scatter(across, up, s=12, color=color, alpha=0.45, marker=marker, linewidth=0)
                panel.scatter(fmean(across), fmean(up), s=55, color=color, marker=marker, label=mixture, linewidth=0)
            panel.set_title(of.title, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel(f"{TASKS[of.tasks[0]].title}, right, %")
            panel.set_ylabel(f"{TASKS[of.tasks[1]].title}, right, %")
            panel.set_xlim(-2, max(20.0, panel.get_xlim()[1]))
            panel.set_ylim(bottom=-2)
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/conflicts"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", type=int, default=100, help="of each task")
    parser.add_argument("--figure", type=Path, help=".svg is added")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.work, [int(seed) for seed in given.seeds.split(",")], given.problems)
    print(markdown([rules_table(found), totals_table(found), measures_table(found)]))
    if given.figure:
        figure(found, given.figure)


if __name__ == "__main__":
    main()
