"""The demo: an evaluation of held-out problems, shown live.

The arms, their greedy answers, the counts, intervals and tests are those of ``proxytune eval`` for the same task. In
addition the demo shows some problems with their answers side by side, and a growing table. It ends when the evidence is
clear or a minute is over. Within the minute, a control whose result is already clear gets no more problems.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from proxytune.demo.assets import about, materialize
from proxytune.demo.tasks import FACTS, DemoTask
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import shots_of
from proxytune.evaluation.answering import TaskPlan, answer_jobs
from proxytune.evaluation.arms import Arm, Arms
from proxytune.evaluation.results import LEGEND as WORDS
from proxytune.evaluation.results import task_results
from proxytune.evaluation.statistics import highest_e_value, mcnemar
from proxytune.recipe.checkpoints import quiet_transformers
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.store import load_recipe
from proxytune.tables import Table, rendered

__all__ = ["DemoResult", "run_demo"]

SECONDS = 60.0
CLEAR = 20.0  # the e-value at which two arms differ at the level of 5 %
FIRST, BATCH, SMALLEST = 8, 32, 4  # problems per batch: the first (small, to show something soon), at most, at least
LEGEND = {
    "and nothing else": WORDS["nothing_else"],
    "won : lost": "problems that only the proxy-tuned base has right, and that only this arm has right",
    "e": f"the strongest evidence so far that the two differ; from {CLEAR:.0f} on it is clear, at the level of 5 %",
}
SHOWN = 4  # problems of each batch whose answers are printed
ALONE = ("expert", "anti_expert")  # arms without the base
SIDE_BY_SIDE = {"base": "base", "expert": "expert alone", "proxy_tuned": "proxy-tuned"}


class Comparison(NamedTuple):
    """The proxy-tuned base against another arm.

    Attributes:
        won, lost: problems that only the proxy-tuned base solved, and that only the other arm solved.
        p: McNemar's p. It is valid if the number of problems was given, but not if the minute determined it.
        e: the highest e-value so far. It is valid whenever the run stops.
    """

    arm: str
    won: int
    lost: int
    p: float
    e: float


@dataclass
class DemoResult:
    """Every arm's predictions, each list in the order of the problems.

    Attributes:
        asked: the number of problems that was asked for, or all; None: what fits a minute.
        place: the directory of the models.
        parts: activity -> seconds. seconds: in total.
    """

    task: DemoTask
    problems: Sequence[Any]
    seed: int = 0
    asked: int | Literal["all"] | None = None
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    place: Path = Path()
    parts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.lines = {arm: [] for arm in (self.task.minute if self.timed else self.task.arms)} | self.lines

    @property
    def timed(self) -> bool:
        """Whether the run ends with the minute, or when the evidence is clear."""
        return self.asked is None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds spent inside as those of a part."""
        began = time.monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - began

    @property
    def n_answered(self) -> int:
        """How many problems the proxy-tuned base has answered."""
        return len(self.lines["proxy_tuned"])

    def asked_next(self) -> list[str]:
        """The arms that get further problems. Within the minute, a control gets none once its result is clear."""
        left_out = set(self.clear()) - set(SIDE_BY_SIDE) if self.timed else ()
        return [arm for arm in self.lines if arm not in left_out]

    def scores(self) -> dict[str, Any]:
        """The scores in the form of an evaluation's results.json."""
        return task_results(self.task.plan(()).name, self.lines)

    def to_json(self) -> dict[str, Any]:
        arms = self.scores()["arms"]
        return {
            "task": self.task.name,
            "arms": {arm: {"correct": of["count"], "total": of["of"]} for arm, of in arms.items()},
            "seconds": round(self.seconds, 1),
            "seconds_of": {part: round(seconds, 1) for part, seconds in self.parts.items()},
            "seed": self.seed,
            **({"nothing_else": {arm: sum(self.nothing_else(arm)) for arm in arms}} if self.task.is_exact else {}),
            "proxy_tuned_against": [
                {"arm": of.arm, "only_proxy_tuned": of.won, "only_other": of.lost, "p": of.p, "e_value": of.e}
                for of in self.comparisons()
            ],
        }

    def right(self, arm: str, rule: Callable[[str, Any], bool] | None = None) -> list[bool]:
        """Whether each answer of an arm is right, by the task's rule or by another one."""
        rule = rule or self.task.is_correct
        return [rule(str(line["model_output"]), of) for line, of in zip(self.lines[arm], self.problems)]

    def nothing_else(self, arm: str) -> list[bool]:
        """The task's stricter question for each answer."""
        return self.right(arm, self.task.is_exact)

    def comparisons(self) -> list[Comparison]:
        """Comparisons of the proxy-tuned base with every other arm, on the problems that both have answered."""

        def against(arm: str, right: Callable[[str], list[bool]], name: str = "") -> Comparison:
            both = right("proxy_tuned"), right(arm)
            pairs = [answers[: min(map(len, both))] for answers in both]
            return Comparison(name or arm, *mcnemar(*pairs), highest_e_value(*pairs))

        found = [against(arm, self.right) for arm in self.lines if arm not in ("anti_expert", "proxy_tuned")]
        if self.task.is_exact is not None:
            found.append(against("mean_logits", self.nothing_else, "mean_logits, nothing else"))
        return found

    def clear(self) -> list[str]:
        """The arms that clearly differ from the proxy-tuned base."""
        return [of.arm for of in self.comparisons() if of.e >= CLEAR]

    def unclear(self) -> list[str]:
        """The arms that do not clearly differ from it."""
        return [of.arm for of in self.comparisons() if of.arm in self.lines and of.e < CLEAR]

    # -- what is shown at the end ---------------------------------------------------------------------------
    def table(self) -> Table:
        against = {of.arm: of for of in self.comparisons()}
        heads = ["arm", "right", "95 % interval", "and nothing else", "won : lost", "e"]
        rows = []
        for arm, of in self.scores()["arms"].items():
            low, high = (f"{100 * of[key]:.0f}" for key in ("low", "high"))
            exact = f"{sum(self.nothing_else(arm))}/{of['of']}" if self.task.is_exact else ""
            other = against.get(arm)
            compared = [f"{other.won} : {other.lost}", _evidence(other.e)] if other else ["", ""]
            rows.append([self.task.title(arm), f"{of['count']}/{of['of']}", f"{low} – {high} %", exact, *compared])
        bold = [at for at, arm in enumerate(self.lines) if arm == "proxy_tuned"]
        about = f", {self.n_answered} held-out problems, strict exact match"
        return Table(heads, rows, self.task.name, about, bold, LEGEND)

    def notes(self) -> str:
        """Notes on what the counts do not show, and on the time."""
        found = []
        if unclear := self.unclear():
            whole = not isinstance(self.asked, int) and self.n_answered == len(self.problems)
            arms = "; ".join(_short(self.task.title(arm)) for arm in unclear)
            found.append(
                f"Not clear against: {arms}."
                if whole
                else f"Not yet clear against: {arms}. {self.with_all()} asks more."
            )
        for arm, of in self.lines.items():
            if len(of) < self.n_answered:
                found.append(f"Clear after {len(of)} problems and asked no further: {_short(self.task.title(arm))}.")
        parts = "; ".join(f"{part} {seconds:.0f} s" for part, seconds in self.parts.items())
        return "\n".join([*found, f"{self.seconds:.0f} s: {parts}."])

    def try_next(self) -> list[str]:
        recipe = self.task.recipe
        example = shlex.quote(load_recipe(self.place / self.task.folder).examples[0])
        return [f"proxytune chat {recipe}", f"proxytune generate {recipe} --chat {example}", self.with_all()]

    def with_all(self) -> str:
        """The command that asks all problems."""
        task = "" if self.task is FACTS else f"--task {self.task.name} "
        return f"proxytune demo {task}--problems all"


def _short(title: str) -> str:
    """An arm's title within a sentence."""
    return title.removeprefix("control: ").partition(" (")[0]


def _evidence(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}" if value < 10_000 else "> 9999"


# ---- measuring ---------------------------------------------------------------------------------------


def answers(arm: Arm, plan: TaskPlan, batch: slice, read: dict[str, Any]) -> list[dict[str, Any]]:
    """An arm's predictions for some of the problems, in order. ``read`` holds caches of arms with the same prompts."""
    shots = shots_of(arm.name)
    jobs = plan.jobs[shots][batch]
    shared = read if shots == "raw" and arm.name not in ALONE else None
    (lines,) = (new for (new,) in answer_jobs(arm, plan, jobs, batch_size=len(jobs), read=shared))
    return sorted(lines, key=lambda line: int(line["id"]))


def run_demo(
    problems: int | Literal["all"] | None = None,
    seed: int = 0,
    json_path: Path | None = None,
    *,
    task: DemoTask = FACTS,
    console: Console | None = None,
    cache_dir: Path | None = None,
    began: float | None = None,
) -> DemoResult:
    """Show proxy-tuning at work on held-out problems, and count.

    Args:
        problems: the first so many, or all of the task's set. By default the run ends when the evidence is clear (see
            :func:`proxytune.evaluation.statistics.e_value`), at the latest after a minute, loading included.
        seed: for the problems and their order.
        json_path: a file for the counts, written after every batch.
        console: shows progress and some answers. The caller prints the tables.
        cache_dir: see :func:`proxytune.demo.materialize`.
        began: the start of the minute, by ``time.monotonic()``; by default now.

    Raises:
        ProxyTuneError: if a file cannot be written, the task has fewer problems, or the base model is not installed.
    """
    began, now = began or time.monotonic(), time.monotonic()
    console = console or Console(highlight=False)
    chosen = task.choose("test", problems if isinstance(problems, int) else None, seed)
    result = DemoResult(task, chosen, seed, problems)
    result.parts["imports"] = now - began
    _save(result, json_path)  # find out before the work that the file cannot be written

    with quiet_transformers():
        with console.status("Unpacking the models (only the first time takes long)"), result.part("unpacking"):
            result.place = materialize(cache_dir)
        console.print(f"Models: {result.place}", style="dim", soft_wrap=True)
        with console.status("Loading"), result.part("loading"):
            recipe = load_recipe(result.place / task.folder)
            weight = about()["mean_weight"]
            maker = Arms(recipe, list(result.lines), LoadingOptions(pack=True, speculate=False), mean_weight=weight)
            arms = {name: maker.make(name) for name in sorted(result.lines, key=lambda name: name not in SIDE_BY_SIDE)}

        plan = task.plan(result.problems)
        with Live(console=console, transient=True, auto_refresh=False) as live:
            for batch in _batches(result, began):
                lines: dict[str, list[dict[str, Any]]] = {}
                read: dict[str, Any] = {}
                counts = [rendered(replace(result.table(), legend={}), console.width)] if result.n_answered else []
                asked = result.asked_next()
                for name in (each for each in arms if each in asked):
                    doing = f"{_short(task.title(name))}: problems {batch.start + 1} to {batch.stop} …"
                    live.update(Group(Text(), *counts, Text(doing, "dim")), refresh=True)
                    with result.part(_short(task.title(name))):
                        lines[name] = answers(arms[name], plan, batch, read)
                    if set(lines) == set(SIDE_BY_SIDE):
                        console.print(_side_by_side(result, plan, arms["proxy_tuned"], batch, lines, console))
                for name, new in lines.items():  # all at once, so that all counts are over the same problems
                    result.lines[name] += new
                result.seconds = time.monotonic() - began
                _save(result, json_path)
                if result.timed and not result.unclear():
                    break
        console.print()
    return result


def _batches(result: DemoResult, began: float) -> Iterator[slice]:
    """Which problems are asked together. Within the minute: as many as will probably be done in time."""
    at, size = 0, FIRST
    while size := min(size, len(result.problems) - at):
        start = time.monotonic()
        yield slice(at, at + size)
        now = time.monotonic()
        at, of_one = at + size, (now - start) / size
        left = 0.85 * (SECONDS - (now - began))  # a smaller batch takes somewhat more for each of its problems
        size = min(BATCH, 2 * size, max(0, int(left / of_one))) if result.timed else BATCH
        if size < SMALLEST:
            return


# ---- what is shown -----------------------------------------------------------------------------------


@torch.inference_mode()
def steered_tokens(arm: Arm, contexts: Sequence[str], texts: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """The tokens of proxy-tuned answers, each with a flag whether the base alone would have chosen another one."""
    prompts, written = ([arm.tokenizer(text).input_ids for text in each] for each in (contexts, texts))
    rows = [prompt + answer for prompt, answer in zip(prompts, written)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # padding on the right changes nothing
    base = arm.model(input_ids=ids, output_member_logits=True, gate="none", use_cache=False).member_logits["base"]
    found = []
    for prompt, answer, choices in zip(prompts, written, base.argmax(dim=-1).tolist()):
        chosen = choices[len(prompt) - 1 :]
        found.append([(arm.tokenizer.decode([token]), token != other) for token, other in zip(answer, chosen)])
    return found


def _side_by_side(
    result: DemoResult,
    plan: TaskPlan,
    steered: Arm,
    batch: slice,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    console: Console,
) -> Group:
    """The first problems of a batch, each with its three answers."""
    problems = result.problems[batch][:SHOWN]
    texts = {arm: [str(line["model_output"]).strip() for line in lines[arm][:SHOWN]] for arm in SIDE_BY_SIDE}
    cells = {arm: [Text(text) for text in of] for arm, of in texts.items()}
    marks = console.is_terminal and not console.quiet and console.color_system is not None
    if marks:
        contexts = [job.context for job in plan.jobs["raw"][batch][:SHOWN]]
        outputs = [str(line["model_output"]).rstrip() for line in lines["proxy_tuned"][:SHOWN]]
        cells["proxy_tuned"] = [
            Text.assemble(*((token, "bold reverse" if changed else "") for token, changed in tokens))
            for tokens in steered_tokens(steered, contexts, outputs)
        ]
    parts: list[Any] = [Text(), _in_columns([Text(title, "bold") for title in SIDE_BY_SIDE.values()])]
    for at, problem in enumerate(problems):
        solution = problem.completion.strip().rsplit("\n", 1)[-1]
        parts.append(Text.assemble((problem.question, "italic"), (f"  ({solution})", "dim")))
        row = []
        for arm in SIDE_BY_SIDE:
            right = result.task.is_correct(str(lines[arm][at]["model_output"]), problem)
            mark = ("✓ ", "green") if right else ("✗ ", "red")
            row.append(Text.assemble(mark, _on_one_line(cells[arm][at])))
        parts.append(_in_columns(row))
    if marks and batch.start == 0:
        parts.append(Text("✓ right, ✗ wrong; reversed: tokens that the base alone would not have chosen", "dim"))
    elif batch.start == 0:
        parts.append(Text("✓ right, ✗ wrong", "dim"))
    return Group(*parts)


def _on_one_line(text: Text) -> Text:
    """A text without blanks around it, with a sign for each line end."""
    lines = [line for line in text.split("\n") if line.plain.strip()]
    joined = Text.assemble((" ⏎ ", "dim")).join(lines)
    return (
        joined[len(joined.plain) - len(joined.plain.lstrip()) :] if joined.plain.strip() else Text("(nothing)", "dim")
    )


def _in_columns(cells: Sequence[Text]) -> Grid:
    grid = Grid.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in cells:
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row(*cells)
    return grid


# ---- surroundings ------------------------------------------------------------------------------------


def _save(result: DemoResult, path: Path | None) -> None:
    try:
        if path is not None:
            path.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ProxyTuneError(f"cannot write {path}: {error.strerror or error}") from error
