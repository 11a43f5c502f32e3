"""Does an expert trained inside the mixture steer better than one trained alone? The demo's members answer.

    python scripts/consistent.py --seeds 0,1,2 --work runs/consistent

For each seed two experts are made of the demo's M-, on the same problems in the same order, with the same adapter to
begin with and as many steps: one by `proxytune train`, one by `proxytune train --consistent`. Then both recipes, and
both experts alone, answer held-out problems greedily. What is done already is kept in ``--work``: a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxytune import ProxyTunedForCausalLM
from proxytune.demo import demo_recipe
from proxytune.evaluation.problems import Problem, is_correct, is_exact, make_problems
from proxytune.evaluation.statistics import mcnemar, wilson
from proxytune.lanes.kernels import pack
from proxytune.training import TrainingOptions, train
from proxytune.training.run import Progress, members_of

ARMS = ("plain", "consistent")
MAX_NEW_TOKENS = 28  # the demo's


@dataclass(frozen=True)
class Plan:
    """How both experts are trained; rank and rate are those of the demo's own expert (scripts/build_demo.py)."""

    problems: int = 800
    steps: int = 100
    batch: int = 12
    rank: int = 32
    lr: float = 1e-3
    alpha: float = 1.0
    ending: str = "\n"  # behind an answer, before the end token


def make_recipe(plan: Plan, arm: str, seed: int, work: Path) -> Path:
    """Train one expert; its recipe's directory."""
    data = work / f"problems-{seed}.jsonl"
    rows = [
        {"prompt": problem.prompt, "completion": problem.completion + plan.ending}
        for problem in make_problems("train", plan.problems, seed=2000 + seed)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = TrainingOptions(
        data=str(data),
        recipe="demo",
        alpha=plan.alpha,
        consistent=arm == "consistent",
        rank=plan.rank,
        lr=plan.lr,
        batch_size=plan.batch,
        micro_batch=plan.batch,
        max_steps=plan.steps,
        gradient_checkpointing=False,
        seed=seed,
        resume=True,
    )
    out = work / f"{arm}-{seed}"

    def report(now: Progress) -> None:
        if now.step % 20 == 0 or now.loss is None:
            loss = "" if now.loss is None else f"  loss {now.loss:.3f}"
            print(f"{out.name}: {now.doing} {now.step}/{now.steps}{loss}", flush=True)

    train(options, out, report=report)
    return out


@torch.inference_mode()
def nll(model: Any, tokenizer: Any, problems: list[Problem], ending: str) -> float:
    """The mean negative log-likelihood of a token of the right answers, the end token with them, in nats."""
    total, count = 0.0, 0
    for problem in problems:
        prompt = tokenizer(problem.prompt).input_ids
        whole = tokenizer(problem.prompt + problem.completion + ending).input_ids
        answer = [*whole[len(prompt) :], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, problems: list[Problem]) -> list[str]:
    """Greedy answers."""
    texts: list[str] = []
    for start in range(0, len(problems), 50):
        prompts = [problem.prompt for problem in problems[start : start + 50]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def measure(recipe: Path, problems: list[Problem], split: str, ending: str) -> dict[str, Any]:
    """The steered base, and the expert alone: verdicts, problem by problem, and likelihoods; kept in the recipe."""
    kept = recipe / "training" / f"{split}-{len(problems)}.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))  # type: ignore[no-any-return]
    tokenizer = AutoTokenizer.from_pretrained(recipe, padding_side="left")
    found: dict[str, Any] = {}
    for arm in ("mixture", "expert"):
        if arm == "mixture":
            model: Any = ProxyTunedForCausalLM.from_pretrained(recipe, pack=True)
        else:
            from peft import PeftModel

            _, anti_expert, _, _ = members_of(str(recipe))
            alone: Any = AutoModelForCausalLM.from_pretrained(str(anti_expert.model), dtype=torch.float32)
            model = PeftModel.from_pretrained(alone, str(recipe / "expert")).merge_and_unload().eval()  # type: ignore[operator]
            pack(model)
        texts = answers(model, tokenizer, problems)
        found[arm] = {
            "correct": [is_correct(text, problem) for text, problem in zip(texts, problems, strict=True)],
            "exact": [is_exact(text, problem) for text, problem in zip(texts, problems, strict=True)],
            "nll": nll(model, tokenizer, problems, ending),
            "texts": texts,
        }
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(found), "utf-8")
    part.replace(kept)
    return found


def table(found: dict[int, dict[str, dict[str, Any]]], console: Console) -> None:
    """Both arms, seed by seed and together, as Markdown."""

    def counted(verdicts: list[bool]) -> str:
        low, high = wilson(sum(verdicts), len(verdicts))
        share = 100 * sum(verdicts) / len(verdicts)
        return f"{sum(verdicts)}/{len(verdicts)} = {share:.1f} % ({100 * low:.1f}–{100 * high:.1f})"

    lines = [
        "| seed | expert | mixture correct | nothing else | mixture nats/token | expert alone correct | nats/token |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    pooled: dict[str, list[bool]] = {arm: [] for arm in ARMS}
    shares: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed, arms in found.items():
        for arm in ARMS:
            mixture, expert = arms[arm]["mixture"], arms[arm]["expert"]
            pooled[arm] += mixture["correct"]
            shares[arm].append(100 * sum(mixture["correct"]) / len(mixture["correct"]))
            lines.append(
                f"| {seed} | {arm} | {counted(mixture['correct'])} | {sum(mixture['exact'])} | {mixture['nll']:.3f} | "
                f"{sum(expert['correct'])} | {expert['nll']:.3f} |"
            )
        won, lost, p = mcnemar(*(arms[arm]["mixture"]["correct"] for arm in ("consistent", "plain")))
        lines.append(f"| {seed} | only consistent : only plain | {won} : {lost}, p = {p:.2g} | | | | |")
    won, lost, p = mcnemar(pooled["consistent"], pooled["plain"])
    console.print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)
    means = ", ".join(
        f"{arm} {statistics.mean(values):.1f} %"
        + (f" (s.d. {statistics.stdev(values):.1f})" if len(values) > 1 else "")
        for arm, values in shares.items()
    )
    console.print(f"\nMean over seeds: {means}. All pairs: {won} : {lost}, p = {p:.2g}.", markup=False, soft_wrap=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/consistent"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--answers", type=int, default=200, help="held-out problems")
    parser.add_argument("--no-newline", action="store_true", help="end token right behind the answer's number")
    numbers = {name: value for name, value in asdict(Plan()).items() if name != "ending"}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ending = "" if arguments.no_newline else Plan.ending
    plan = Plan(**{name: getattr(arguments, name) for name in numbers}, ending=ending)
    arguments.work.mkdir(parents=True, exist_ok=True)
    demo_recipe()  # made now, where it is missing
    disable_progress_bars()
    problems = make_problems(arguments.split, arguments.answers, seed=0)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        found[seed] = {
            arm: measure(make_recipe(plan, arm, seed, arguments.work), problems, arguments.split, ending)
            for arm in ARMS
        }
        table(found, Console())  # after each seed: what is known so far


if __name__ == "__main__":
    main()
