"""What prompted experts and guidance do to the demo's base: the tables of docs/guidance.md.

    python scripts/guidance.py --problems 120 --work runs/guidance

Two tasks on the demo's held-out facts. ``terse``: a system prompt asks for one word; a reply keeps to it if it has
three words at most, and is right if it contains the fact's answer. ``house``: solved examples show the house format, a
code word, a colon and the answer. Greedy, in the base's chat form. What is done is kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from proxytune import Member, Prompt, ProxyTunedForCausalLM
from proxytune.answers.generation import Sampling, answer_batches, encode
from proxytune.demo import materialize
from proxytune.evaluation.facts import Fact, facts, is_correct, shown
from proxytune.evaluation.statistics import mcnemar
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.prompts import render_chat
from proxytune.tables import Table, markdown

TERSE = "Answer with one word only."
MAX_TOKENS = {"terse": 24, "house": 12}


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Attributes:
        made: what ``proxytune new`` is given. alpha: of its only expert; 0 is the base alone.
        system, examples: what the base reads in its own prompt: a system prompt, and how many solved examples.
    """

    task: str
    name: str
    made: Sequence[str] = ()
    alpha: float = 0.0
    system: str | None = None
    examples: int = 0


def settings(base: Path, small: Path, solved: Path) -> list[Setting]:
    """All that is measured."""
    asked = ("--expert-system", TERSE)
    of_base, of_small = ("--small", str(base), *asked), ("--small", str(small), *asked)
    found = [
        Setting("terse", "base", of_base),
        Setting("terse", "base, asked in its own prompt", of_base, system=TERSE),
    ]
    found += [Setting("terse", f"expert: base, asked; alpha {a:g}", of_base, a) for a in (1.0, 1.5, 2.0, 3.0, 5.0)]
    found += [Setting("terse", f"expert: six layers, asked; alpha {a:g}", of_small, a) for a in (1.0, 2.0)]
    shot: tuple[str, ...] = (
        "--expert-examples",
        str(solved),
        "--expert-prompt",
        "chat",
        "--anti-expert-prompt",
        "chat",
    )
    by_base, by_small = ("--small", str(base), *shot), ("--small", str(small), *shot)
    found += [
        Setting("house", "base", by_base),
        Setting("house", "base, 16 examples in its own prompt", by_base, examples=16),
    ]
    found += [Setting("house", f"expert: base, 16 examples; alpha {a:g}", by_base, a) for a in (1.0,)]
    found += [Setting("house", f"expert: six layers, 16 examples; alpha {a:g}", by_small, a) for a in (1.0, 2.0)]
    return found


def scores(task: str) -> dict[str, Callable[[str, Fact], bool]]:
    """What is counted of each reply."""

    def right(text: str, fact: Fact) -> bool:
        return re.search(rf"\b{re.escape(fact.answer)}\b", text, re.IGNORECASE) is not None

    def keeps(text: str, _: Fact) -> bool:
        if task == "house":
            return re.match(r"[a-z]+: \S", text.strip()) is not None
        return 0 < len(text.split()) <= 3

    found: dict[str, Callable[[str, Fact], bool]] = {
        "right answer": right,
        {"house": "keeps the form", "terse": "three words at most"}[task]: keeps,
        "both": lambda text, fact: right(text, fact) and keeps(text, fact),
    }
    if task == "house":
        found["right code word too"] = lambda text, fact: is_correct(text, fact.solution)
    return found


def measure(setting: Setting, recipe: Path, problems: Sequence[Fact], batch_size: int) -> dict[str, Any]:
    """The replies."""
    loading = LoadingOptions(pack=True)
    model = ProxyTunedForCausalLM.from_pretrained(recipe, **loading.of_model())
    tokenizer = model.recipe_tokenizer
    before = [{"role": "system", "content": setting.system}] if setting.system else []
    for fact in shown()[: setting.examples]:
        before += [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.solution}]
    encoded = []
    for fact in problems:
        own = encode(model, tokenizer, fact.question)
        ids = render_chat(tokenizer, [*before, {"role": "user", "content": fact.question}], "the base")
        encoded.append(replace(own, ids=ids))
    made = answer_batches(
        model,
        tokenizer,
        encoded,
        [(setting.alpha,)] * len(problems),
        rows=range(len(problems)),
        batch_size=batch_size,
        max_new_tokens=MAX_TOKENS[setting.task],
        sampling=Sampling(),
        stop_strings=["\n"] if setting.task == "house" else [],
    )
    return {"texts": [one.text for batch in made for one in batch]}


def speeds(models: Path, rounds: int = 7, n_new: int = 48) -> str:
    """What a token costs beside the base alone, in rounds of one answer each: the median of the rounds' ratios."""
    base, small = str(models / "base"), str(models / "anti_expert")
    negative = Member(base, prompt=Prompt("negative", template="Write a boring story."))
    asked, plain = Prompt("chat", system=TERSE), Prompt("chat")
    made = {
        "guidance": {"expert": Member(base), "anti_expert": negative, "alpha": 0.5},
        "prompted expert of six layers": {
            "expert": Member(small, prompt=asked),
            "anti_expert": Member(small, prompt=plain),
            "alpha": 0.5,
        },
    }
    loaded = {
        name: ProxyTunedForCausalLM.from_members(base, experts=[one], pack=True, speculate=False)
        for name, one in made.items()
    }
    base_model = loaded["guidance"]
    tokenizer = base_model.tokenizer
    ids = tokenizer("Once upon a time there was a fox who lived in", return_tensors="pt")["input_ids"]
    options: Any = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    called: dict[str, Any] = {"base": base_model.member("base"), **loaded}
    calls = {name: partial(model.generate, ids, **options) for name, model in called.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.monotonic()
            call()
            if number:  # the first warms up
                seconds[name].append(time.monotonic() - began)
    rows = []
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["base"])]
        rows.append([name, f"{median(ratios):.2f}"])
    return markdown([Table(["one row, float32, packed", "seconds per token to the base alone"], rows)])


def main() -> None:
    """Measure what is not measured yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--only-speed", action="store_true", help="measure what a token costs, and nothing else")
    asked = parser.parse_args()
    if asked.only_speed:
        print(speeds(materialize()))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    models = materialize()
    solved = asked.work / "solved.jsonl"
    lines = [json.dumps({"prompt": fact.question, "completion": fact.solution}) for fact in shown()[:16]]
    solved.write_text("\n".join(lines) + "\n", encoding="utf-8")
    problems = facts("test")[: asked.problems]
    results: dict[str, list[tuple[Setting, dict[str, Any]]]] = {"terse": [], "house": []}
    for number, setting in enumerate(settings(models / "base", models / "anti_expert", solved)):
        file = asked.work / f"{number}.json"
        if not file.exists():
            recipe = asked.work / f"recipe-{number}"
            command = ["new", str(recipe), "--force", "--base", str(models / "base"), *setting.made]
            subprocess.run([sys.executable, "-m", "proxytune", *command], check=True)
            file.write_text(json.dumps(measure(setting, recipe, problems, asked.batch_size)))
        results[setting.task].append((setting, json.loads(file.read_text())))
        print(setting.task, setting.name, flush=True)
    for task, of in results.items():
        rules = scores(task)
        rows = []
        for setting, found in of:
            counts = {
                name: [rule(text, fact) for text, fact in zip(found["texts"], problems)] for name, rule in rules.items()
            }
            last = "both"
            own = [rules[last](text, fact) for text, fact in zip(of[1][1]["texts"], problems)]
            won, lost, p = mcnemar(counts[last], own)
            against = "" if setting is of[1][0] else f"{won} : {lost}, {p:.1g}"
            cells = [f"{sum(values)}/{len(values)}" for values in counts.values()]
            rows.append([setting.name, *cells, against])
        heads = [task, *rules, "only this : only the base with that prompt, p"]
        print("\n" + markdown([Table(heads, rows, task, f", {len(problems)} facts")]))


if __name__ == "__main__":
    main()
