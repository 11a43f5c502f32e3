"""The demo: an evaluation of held-out problems, shown live.

The arms, their greedy answers, the counts, intervals and tests are those of ``proxytune eval demo --tasks demo_math``.
What is the demo's own: the first problems are shown side by side, the table grows, and it ends within about a minute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from proxytune.demo.assets import ASSETS, materialize
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.answering import Job, TaskPlan, answer_jobs, shots_of
from proxytune.evaluation.arms import Arm, Arms
from proxytune.evaluation.problems import FEW_SHOT, Problem, Split, is_correct, is_exact, make_problems
from proxytune.evaluation.results import ARMS, DEFAULT_ARMS, LEGEND, task_results
from proxytune.evaluation.statistics import mcnemar
from proxytune.recipe.checkpoints import quiet_transformers
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.store import load_recipe

__all__ = ["DemoResult", "plan_of", "run_demo"]

TITLES = {**ARMS, "base": "base (SmolLM2-135M-Instruct)", "base_few_shot": "control: base, 4 examples shown"}
SECONDS = 60.0


def plan_of(problems: Sequence[Problem]) -> TaskPlan:
    """The task demo_math (see its YAML) of these problems; lm_eval is not needed for it."""
    shown = "".join(f"{problem.prompt}{problem.completion}\n\n" for problem in FEW_SHOT)
    options = {"until": ["Question:"], "max_gen_toks": 28, "do_sample": False}
    rows = [problem.row(index) for index, problem in enumerate(problems)]
    jobs = {
        shots: [Job(row["id"], 0, before + problem.prompt, row, options) for row, problem in zip(rows, problems)]
        for shots, before in (("raw", ""), ("few_shot", shown))
    }
    return TaskPlan("demo_math", jobs, metadata={"fields": ["question", "answer"], "output": "model_output"})


@dataclass
class DemoResult:
    """Every arm's predictions, each list in the order of the problems."""

    seed: int
    problems: Sequence[Problem] = ()
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {arm: [] for arm in DEFAULT_ARMS})
    seconds: float = 0.0

    def scores(self) -> dict[str, Any]:
        """What results.json of an evaluation says of the task."""
        return task_results("demo_math", self.lines)

    def to_json(self) -> dict[str, Any]:
        arms = self.scores()["arms"]
        return {
            "arms": {arm: {"correct": of["count"], "total": of["of"]} for arm, of in arms.items()},
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "nothing_else": {arm: sum(self.nothing_else(arm)) for arm in arms},
            "proxy_tuned_against": [
                {"arm": name, "only_proxy_tuned": won, "only_other": lost, "p": p}
                for name, won, lost, p in self.comparisons()
            ],
        }

    def nothing_else(self, arm: str) -> list[bool]:
        """The stricter question, see :func:`is_exact`, for each answer."""
        return [is_exact(line["model_output"], problem) for line, problem in zip(self.lines[arm], self.problems)]

    def comparisons(self) -> list[tuple[str, int, int, float]]:
        """Against each arm: problems that only the proxy-tuned base solved, that only the other did, and p."""
        against = self.scores()["proxy_tuned_against"]
        keys = ("only_proxy_tuned", "only_other", "p")
        rows: list[Any] = [(arm, *map(of.get, keys)) for arm, of in against.items() if arm != "anti_expert"]
        pairs = list(zip(self.nothing_else("proxy_tuned"), self.nothing_else("mean_logits")))
        return [*rows, ("mean_logits, nothing else", *mcnemar(*([pair[at] for pair in pairs] for at in (0, 1))))]


@torch.inference_mode()
def steered_tokens(arm: Arm, problem: Problem, text: str) -> list[tuple[str, bool]]:
    """The tokens of the proxy-tuned answer, each with whether the base alone would have chosen another."""
    prompt, answer = (arm.tokenizer(each).input_ids for each in (problem.prompt, text))
    output = arm.model(input_ids=torch.tensor([prompt + answer]), output_member_logits=True, use_cache=False)
    choices = output.member_logits["base"][0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    return [(arm.tokenizer.decode([t]), t != choice) for t, choice in zip(answer, choices, strict=True)]


def measure(
    arms: Mapping[str, Arm], plan: TaskPlan, batch: slice, result: DemoResult, report: Callable[[], None]
) -> None:
    """Let every arm answer some of the problems, into ``result``."""
    for name, arm in arms.items():
        jobs = plan.jobs[shots_of(name)][batch]
        (lines,) = (new for (new,) in answer_jobs(arm, plan, jobs, batch_size=len(jobs)))
        result.lines[name] += sorted(lines, key=lambda line: int(line["id"]))
        report()


def run_demo(
    problems: int | None = None,
    seed: int = 0,
    json_path: Path | None = None,
    *,
    quiet: bool = False,
    console: Console | None = None,
    cache_dir: Path | None = None,
    assets: Path = ASSETS,
    split: Split = "test",
    examples: int = 3,
) -> DemoResult:
    """Show proxy-tuning at work on held-out problems, and count.

    Args:
        problems: how many; by default as many as fit about a minute, loading included.
        seed: of the problems.
        json_path: where the counts go, after every batch. quiet: show nothing.
        cache_dir, assets: see :func:`proxytune.demo.materialize`.
        split: which templates the problems are made of.
        examples: how many problems are shown side by side.

    Raises:
        ProxyTuneError: if a file cannot be written, or the base model is not installed.
    """
    if problems is not None and problems < 1:
        raise ProxyTuneError(f"the demo needs at least one problem, not {problems}")
    started = time.monotonic()
    console = console or Console(quiet=quiet)
    chosen = make_problems(split, problems or 400, seed)
    result = DemoResult(seed, chosen)
    _save(result, json_path)  # an unwritable place is found before the work, not after it

    with quiet_transformers():
        with console.status("Preparing the demo's models (only the first time takes long)"):
            place = materialize(cache_dir, assets)
        console.print(f"Models: {place}", style="dim", soft_wrap=True)
        with console.status("Loading"):
            maker = Arms(load_recipe(place / "recipe"), DEFAULT_ARMS, LoadingOptions(pack=True))
            arms = {name: maker.make(name) for name in DEFAULT_ARMS}

        size, plan = 8 if problems is None else min(problems, 50), plan_of(chosen)
        begun = [time.monotonic()]  # each batch, the last one's end
        with console.status("Solving the first problems"):
            measure(arms, plan, slice(size), result, lambda: None)
        for at in range(min(examples, size)):
            console.print(_side_by_side(arms["proxy_tuned"], result, at))

        with Live(_table(result), console=console, refresh_per_second=4) as live:

            def report() -> None:
                result.seconds = time.monotonic() - started
                live.update(_table(result))
                _save(result, json_path)

            report()
            for start in range(size, len(chosen), size):
                begun.append(time.monotonic())
                longest = max(b - a for a, b in pairwise(begun))
                # With no number given: only while another batch, as long as the longest so far, fits the minute.
                if problems is None and begun[-1] - started + longest >= SECONDS:
                    break
                measure(arms, plan, slice(start, start + size), result, report)
    result.seconds = time.monotonic() - started
    _save(result, json_path)
    console.print()
    console.print(_comparisons(result))
    return result


# ---- what is shown -----------------------------------------------------------------------------------


def _side_by_side(steered: Arm, result: DemoResult, at: int) -> Panel:
    problem = result.problems[at]
    texts = {arm: lines[at]["model_output"] for arm, lines in result.lines.items()}
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    for heading in ("base", "expert alone", "proxy-tuned"):
        table.add_column(heading, ratio=1, overflow="fold")
    marked = Text()
    for token, changed in steered_tokens(steered, problem, texts["proxy_tuned"].rstrip()):
        marked.append(token, style="bold reverse" if changed else "")
    cells = []
    for arm in ("base", "expert", "proxy_tuned"):
        mark = Text("  right", "green") if is_correct(texts[arm], problem) else Text("  wrong", "red")
        text = marked if arm == "proxy_tuned" else Text(texts[arm])
        text.rstrip()
        cells.append(Group(text[len(text.plain) - len(text.plain.lstrip(" \n")) :], mark))
    table.add_row(*cells)
    note = Text("reversed: tokens that the base alone would not have chosen", style="dim")
    return Panel(Group(Text(problem.question, style="italic"), Text(), table, note), title="held-out problem")


def _table(result: DemoResult) -> Table:
    table = Table(title="Held-out problems, strict exact match", title_justify="left")
    for heading in ("arm", "correct", "share", "95 % interval", "and nothing else"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", overflow="fold")
    for arm, of in result.scores()["arms"].items():
        total = of["of"]
        value, low, high = (100 * of[key] for key in ("value", "low", "high"))
        shares = (f"{value:.1f} %", f"{low:.1f} – {high:.1f}") if total else ("", "")
        cells = (f"{of['count']}/{total}", *shares, f"{sum(result.nothing_else(arm))}/{total}")
        table.add_row(TITLES[arm], *cells, style="bold" if arm == "proxy_tuned" else "")
    table.caption = f"{result.seconds:.0f} s\nand nothing else: {LEGEND['nothing_else']}"
    return table


def _comparisons(result: DemoResult) -> Table:
    table = Table(title="Proxy-tuned against", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "only it right", "only the other right", "p (exact McNemar)"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, won, lost, p in result.comparisons():
        arm, _, rest = name.partition(",")
        table.add_row(TITLES[arm] + (f",{rest}" if rest else ""), str(won), str(lost), f"{p:.2g}")
    return table


# ---- surroundings ------------------------------------------------------------------------------------


def _save(result: DemoResult, path: Path | None) -> None:
    try:
        if path is not None:
            path.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ProxyTuneError(f"cannot write {path}: {error.strerror or error}") from error
