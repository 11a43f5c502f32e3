"""The paper's experiments at a small scale: a format expert and a code expert for the demo's base, all arms, by seed.

    python scripts/small_scale.py format --seeds 0,1,2 --work runs/small
    python scripts/small_scale.py code --seeds 0,1,2 --work runs/small

For each seed `proxytune train` makes an expert of the demo's M-, and `proxytune eval` holds its recipe beside all other
arms; what is done already is kept in ``--work``, so a killed run goes on. ``--tuned`` also trains M itself on each
seed's data, as the directly tuned model (four times the work). ``PROXYTUNE_DATA`` names the folder with ``flan_cot``
(format) and ``mbpp`` (code).

The task expert is the demo's own: scripts/build_demo.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxytune.demo import demo_recipe
from proxytune.evaluation.statistics import compare, interval
from proxytune.evaluation.tasks.utils import ecqa_json


@dataclass(frozen=True)
class Plan:
    """One experiment: what is learned, how, and what it is measured by."""

    task: str
    rows: int  # drawn anew for each seed
    steps: int
    batch: int
    lr: float = 1e-3
    tuned_lr: float = 5e-5  # of all weights of M


PLANS = {
    "format": Plan("ecqa_json", rows=1600, steps=100, batch=16),
    "code": Plan("mbpp_likelihood", rows=374, steps=50, batch=8),
}


def examples(name: str, seed: int) -> Iterator[dict[str, str]]:
    """The rows that an expert learns, in the task's own prompt; none of them is among the test's."""
    if name == "format":
        for row in random.Random(seed).sample(list(ecqa_json()["train"]), PLANS[name].rows):
            options = ", ".join(row["options"])
            yield {
                "prompt": f"Question: {row['question']}\nOptions: {options}\nAnswer:",
                "completion": f" {row['solution']}\n",
            }
    else:  # MBPP's own training problems, 601 to 974; its test is 11 to 510
        file = Path(os.environ["PROXYTUNE_DATA"]) / "mbpp" / "mbpp.jsonl"
        for text in file.read_text("utf-8").splitlines():
            row = json.loads(text)
            if row["task_id"] > 600:
                asserts = "\n".join(row["test_list"])
                code = row["code"].replace("\r\n", "\n")
                yield {"prompt": f'"""\n{row["text"]}\n{asserts}\n"""\n', "completion": code}


def run(*arguments: str) -> None:
    """One command of ours."""
    print("$ proxytune", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "proxytune.cli", *arguments], check=True)


def train(name: str, seed: int, work: Path, *members: str, out: Path, lr: float) -> None:
    """Train on the experiment's rows, unless that is done."""
    plan = PLANS[name]
    data = work / f"{name}-{seed}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in examples(name, seed)), "utf-8")
    how = ["--lr", str(lr), "--batch-size", str(plan.batch), "--max-steps", str(plan.steps), "--seed", str(seed)]
    run("train", str(out), *members, "--data", str(data), *how, "--no-gradient-checkpointing", "--resume")


def results(name: str, seed: int, work: Path, limit: int, batch_size: int, tuned: bool) -> Mapping[str, Any]:
    """One seed's experts and their evaluation."""
    plan, out = PLANS[name], work / f"{name}-{seed}"
    train(name, seed, work, "--recipe", "demo", "--rank", "32", out=out, lr=plan.lr)
    options = ["--tasks", plan.task, "--limit", str(limit), "--out", str(out / "eval"), "--pack"]
    options += ["--batch-size", str(batch_size)]
    if tuned:
        base, place = str(demo_recipe().parent / "base"), work / f"{name}-{seed}-tuned"
        train(name, seed, work, "--base", base, "--anti-expert", base, "--full", out=place, lr=plan.tuned_lr)
        options += ["--tuned", str(place / "expert")]
    run("eval", str(out), *options)
    found: Mapping[str, Any] = json.loads((out / "eval" / "results.json").read_text("utf-8"))["tasks"][plan.task]
    return found


def together(name: str, seeds: list[int], work: Path) -> str:
    """All seeds' examples as one table: each arm's mean, and proxy-tuned against it."""
    from proxytune.evaluation.results import score_lines

    plan = PLANS[name]
    arms: dict[str, list[float]] = {}
    for seed in seeds:
        for file in sorted((work / f"{name}-{seed}" / "eval" / plan.task).glob("*.jsonl")):
            lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            lines.sort(key=lambda line: str(line["id"]))
            arms.setdefault(file.stem, []).extend(score_lines(plan.task, lines).examples)
    rows = ["| arm | mean over all seeds | 95 % interval | p, proxy-tuned against it |", "|---|---|---|---|"]
    steered = arms["proxy_tuned"]
    for arm, values in arms.items():
        spread = interval(values)
        against = arm != "proxy_tuned" and len(values) == len(steered)
        p = f"{compare(steered, values)[0]:.2g}" if against else ""
        rows.append(f"| {arm} | {spread.value:.4f} | {spread.low:.4f}–{spread.high:.4f} | {p} |")
    return "\n".join(rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(PLANS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/small"))
    parser.add_argument("--limit", type=int, default=200, help="examples of the test")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tuned", action="store_true", help="also tune M itself")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        results(arguments.experiment, seed, arguments.work, arguments.limit, arguments.batch_size, arguments.tuned)
    print(together(arguments.experiment, seeds, arguments.work))


if __name__ == "__main__":
    main()
