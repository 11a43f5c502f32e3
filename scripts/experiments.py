"""The experiments of docs/experiments.md: experts of the demo's members, trained and evaluated seed by seed.

    python scripts/experiments.py format --seeds 0,1,2 --work runs/small
    python scripts/experiments.py code --seeds 0,1,2 --work runs/small
    python scripts/experiments.py consistent --seeds 0,1,2 --work runs/consistent

``format`` and ``code`` hold an expert of the demo's M- beside all other arms. ``consistent`` asks whether an expert
that is trained inside the mixture steers better than one trained alone; both learn the same problems in the same order.

What is done already is kept in ``--work``, so a killed run goes on. ``--tuned`` also trains M itself on each seed's
data, as the directly tuned model (four times the work). ``PROXYTUNE_DATA`` names the folder with ``flan_cot`` (format)
and ``mbpp`` (code). The demo's own expert is made by scripts/build_demo.py.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from proxytune import load_recipe
from proxytune.answers.generation import batches
from proxytune.answers.journal import Journal, json_line
from proxytune.demo import demo_recipe
from proxytune.evaluation.answering import TaskPlan, choice_scores
from proxytune.evaluation.arms import Arms
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.problems import Problem, make_problems
from proxytune.evaluation.run import load_plans
from proxytune.evaluation.scoring import score_lines
from proxytune.evaluation.statistics import compare, interval
from proxytune.recipe.options import LoadingOptions


@dataclass(frozen=True)
class Experiment:
    """What is learned, how, and what it is measured by; the rank and the rates are those of the demo's own expert.

    Attributes:
        rows: drawn again for each seed.
        experts: the experts that are made for each seed, and how each is trained besides.
        options: of the evaluation.
    """

    task: str
    rows: int
    steps: int
    batch: int
    experts: Mapping[str, Sequence[str]]
    options: Sequence[str] = field(default=())
    lr: float = 1e-3
    tuned_lr: float = 5e-5  # of all weights of M


_AT_ONCE = ("--micro-batch", "12")
EXPERIMENTS = {
    "format": Experiment("ecqa_json", rows=1600, steps=100, batch=16, experts={"format": ()}),
    "code": Experiment("mbpp_likelihood", rows=374, steps=50, batch=8, experts={"code": ()}),
    "consistent": Experiment(
        "demo_math",
        rows=800,
        steps=100,
        batch=12,
        experts={"plain": _AT_ONCE, "consistent": (*_AT_ONCE, "--consistent")},
        options=("--arms", "expert,proxy_tuned"),
    ),
}


def examples(name: str, seed: int) -> Iterator[tuple[str, str]]:
    """The prompts and completions that an expert learns, in the task's own form; none of them is among the test's."""
    of = EXPERIMENTS[name]
    if name == "consistent":
        for problem in make_problems("train", of.rows, seed=2000 + seed):
            yield problem.prompt, f"{problem.completion}\n"
        return
    task = load_plans(EvaluationOptions((of.task,), limit=1))[0].task
    rows = list(task.dataset["train"])
    if name == "format":
        for row in random.Random(seed).sample(rows, of.rows):
            yield task.doc_to_text(row), f" {row['solution']}\n"
    else:  # MBPP's own training problems, after the ten that are shown as examples
        for row in rows[-of.rows :]:
            yield f"{task.doc_to_text(row)}\n", row["code"]


def run(*arguments: object) -> None:
    """One command of ours."""
    words = [str(argument) for argument in arguments]
    print("$ proxytune", " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "proxytune", *words], check=True)


def evaluate(name: str, expert: str, seed: int, work: Path, limit: int, batch_size: int, tuned: bool) -> Path:
    """Make one seed's expert and evaluate its recipe, as far as that is not done; the recipe's directory."""
    of, out, data = EXPERIMENTS[name], work / f"{expert}-{seed}", work / f"{name}-{seed}.jsonl"
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in examples(name, seed)]
    data.write_text("".join(map(json_line, rows)), "utf-8")

    def train(place: Path, lr: float, *how: object) -> None:
        how = (*how, "--data", data, "--lr", lr, "--batch-size", of.batch, "--max-steps", of.steps, "--seed", seed)
        run("train", place, *how, "--no-gradient-checkpointing", "--resume")

    train(out, of.lr, "--recipe", "demo", "--rank", 32, *of.experts[expert])
    options = [*of.options, "--limit", limit, "--output", out / "eval", "--pack", "--batch-size", batch_size]
    if tuned:
        base, place = demo_recipe().parent / "base", work / f"{name}-{seed}-tuned"
        train(place, of.tuned_lr, "--base", base, "--anti-expert", base, "--full")
        options += ["--tuned", place / "expert"]
    run("eval", out, "--tasks", of.task, *options)
    return out


@torch.inference_mode()
def nats(recipe: Path, problems: Sequence[Problem]) -> str:
    """The mean negative log-likelihood of a token of the right answers, the end token with them."""
    arms, found = Arms(load_recipe(recipe), ["proxy_tuned"], LoadingOptions(pack=True)), []
    for name in ("proxy_tuned", "expert"):
        arm, pairs = arms.make(name), []
        for problem in problems:
            answer = f"{problem.completion}\n{arm.tokenizer.eos_token}"
            pairs += arm.reader.encode_pairs(TaskPlan("demo_math", {}), problem.prompt, [answer])
        scores = [score for some in batches(pairs, 20) for score, _ in choice_scores(arm, some, [arm.alphas])[0]]
        found.append(f"{name} {-sum(scores) / sum(len(pair.continuation) for pair in pairs):.3f}")
    return f"{recipe.name}, nats a token of the right answers: {', '.join(found)}"


def together(name: str, seeds: Sequence[int], work: Path) -> str:
    """All seeds' examples as one table: each arm's mean, and the (last) expert's steered base against it."""
    of = EXPERIMENTS[name]
    arms: dict[str, list[float]] = {}
    for expert in of.experts:
        said = f"{expert}, " if len(of.experts) > 1 else ""
        steered = f"{said}proxy_tuned"
        for seed in seeds:
            for file in sorted((work / f"{expert}-{seed}" / "eval" / of.task).glob("*.jsonl")):
                lines = sorted(Journal(file).read().lines, key=lambda line: str(line["id"]))
                arms.setdefault(f"{said}{file.stem}", []).extend(score_lines(of.task, lines).examples)
    rows = [f"| arm | mean over all seeds | 95 % interval | p, {steered} against it |", "|---|---|---|---|"]
    for arm, values in arms.items():
        spread = interval(values)
        against = arm != steered and len(values) == len(arms[steered])
        p = f"{compare(arms[steered], values)[0]:.2g}" if against else ""
        rows.append(f"| {arm} | {spread.value:.4f} | {spread.low:.4f}–{spread.high:.4f} | {p} |")
    return "\n".join(rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/small"))
    parser.add_argument("--limit", type=int, default=200, help="examples of the test")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tuned", action="store_true", help="also tune M itself")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    given.work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for expert in EXPERIMENTS[given.experiment].experts:
            place = evaluate(given.experiment, expert, seed, given.work, given.limit, given.batch_size, given.tuned)
            if given.experiment == "consistent":
                print(nats(place, make_problems("test", given.limit, seed=0)), flush=True)
    print(together(given.experiment, seeds, given.work))


if __name__ == "__main__":
    main()
