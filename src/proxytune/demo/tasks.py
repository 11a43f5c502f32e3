"""The tasks of the demo, each with problems, prompts, arms and the rule for a right answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxytune.demo import assets
from proxytune.errors import ProxyTuneError
from proxytune.evaluation import ARMS, DEFAULT_ARMS, facts
from proxytune.evaluation.answering import Job, TaskPlan, with_own_examples
from proxytune.evaluation.facts import Fact
from proxytune.evaluation.problems import FEW_SHOT, Problem, Split, is_correct, is_exact, make_problems

__all__ = ["FACTS", "TASKS", "WORD_PROBLEMS", "DemoTask", "plan_of", "plan_of_facts"]


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo.

    Attributes:
        name: the name for ``--task``. recipe: the recipe's name for commands.
        folder: the recipe's folder in the directory that :func:`proxytune.demo.materialize` makes.
        problems: (split, number or None for the whole set, seed) -> the problems. Each has a ``question`` and a
            ``completion``, whose last line counts.
        plan: makes the plan for the arms from problems.
        minute: the arms that are used if no number of problems is given. arms: all arms.
        is_correct: whether a text answers a problem.
        is_exact: the stricter rule, if there is one: right, and nothing else.
        titles: arm -> its title, if that in :data:`proxytune.evaluation.ARMS` is too general.
    """

    name: str
    recipe: str
    folder: str
    problems: Callable[[Split, int | None, int], Sequence[Any]]
    plan: Callable[[Sequence[Any]], TaskPlan]
    minute: Sequence[str]
    arms: Sequence[str]
    is_correct: Callable[[str, Any], bool]
    is_exact: Callable[[str, Any], bool] | None = None
    titles: Mapping[str, str] = field(default_factory=dict)

    def title(self, arm: str) -> str:
        return self.titles.get(arm) or ARMS[arm]

    def choose(self, split: Split, count: int | None, seed: int) -> Sequence[Any]:
        """The first ``count`` problems of a split, or the whole set.

        Raises:
            ProxyTuneError: if there are fewer.
        """
        if count is not None and count < 1:
            raise ProxyTuneError(f"the demo needs at least one problem, not {count}")
        found = self.problems(split, count, seed)
        if count is not None and len(found) < count:
            raise ProxyTuneError(
                f"the task {self.name} has {len(found)} problems, not {count}; give at most that, or all"
            )
        return found


def _plan(name: str, problems: Sequence[Any], shown: Mapping[str, str], fields: list[str], **options: Any) -> TaskPlan:
    """One of our tasks in the form of lm_eval; ``shown``: the text before the prompt, for each kind of context."""
    rows = [problem.row(index) for index, problem in enumerate(problems)]
    jobs = {
        kind: [Job(row["id"], 0, before + problem.prompt, row, options) for row, problem in zip(rows, problems)]
        for kind, before in shown.items()
    }
    return TaskPlan(name, jobs, metadata={"fields": fields, "output": "model_output"})


# ---- facts -------------------------------------------------------------------------------------------


def plan_of_facts(problems: Sequence[Fact]) -> TaskPlan:
    """The task demo_facts (see its YAML) of these problems."""
    examples = facts.shown()
    shown = {"raw": "", "few_shot": facts.turns(examples[:4]), "many_shot": facts.turns(examples[:16])}
    fields = ["question", "answer", "solution"]
    plan = _plan("demo_facts", problems, shown, fields, until=["\n"], max_gen_toks=12, do_sample=False)
    own = with_own_examples(plan.jobs["raw"], "own_examples")
    return replace(plan, jobs={**plan.jobs, "own_examples": own})


def _facts(split: Split, count: int | None, seed: int) -> Sequence[Fact]:
    found = list(facts.facts(split))
    if seed:
        random.Random(seed).shuffle(found)
    return tuple(found[:count])


FACTS = DemoTask(
    name="facts",
    recipe="demo",
    folder=assets.FACTS.recipe,
    problems=_facts,
    plan=plan_of_facts,
    minute=("base", "base_many_shot", "expert", "mean_logits", "proxy_tuned"),
    arms=(
        *("base", "anti_expert", "base_few_shot", "base_many_shot", "expert", "mean_logits", "weighted_mean"),
        *("proxy_tuned", "base_own_examples"),
    ),
    is_correct=lambda text, fact: facts.is_correct(text, fact.solution),
    titles={
        "base": "base (SmolLM2-135M-Instruct)",
        "base_few_shot": "control: base, 4 examples shown",
        "base_many_shot": "control: base, 16 examples shown",
        "base_own_examples": "oracle: base, 4 examples of the same kind",
    },
)


# ---- word problems -----------------------------------------------------------------------------------


def plan_of(problems: Sequence[Problem]) -> TaskPlan:
    """The task demo_math (see its YAML) of these problems."""
    examples = "".join(f"{problem.prompt}{problem.completion}\n\n" for problem in FEW_SHOT)
    options = {"until": ["Question:"], "max_gen_toks": 28, "do_sample": False}
    return _plan("demo_math", problems, {"raw": "", "few_shot": examples}, ["question", "answer"], **options)


WORD_PROBLEMS = DemoTask(
    name="word-problems",
    recipe="demo-word-problems",
    folder=assets.WORD_PROBLEMS.recipe,
    problems=lambda split, count, seed: make_problems(split, count or 200, seed),
    plan=plan_of,
    minute=DEFAULT_ARMS,
    arms=DEFAULT_ARMS,
    is_correct=is_correct,
    is_exact=is_exact,
    titles={"base": "base (SmolLM2-135M-Instruct)", "base_few_shot": "control: base, 4 examples shown"},
)

TASKS = {task.name: task for task in (FACTS, WORD_PROBLEMS)}
