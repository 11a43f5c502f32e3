"""Short math word problems: the task of the demo, its three splits, and its strict scorer.

A template is an operation, a story and a question. Train, dev and test have templates of their own (``problems.json``):
no template, and no question once names, numbers and things are masked, occurs in two splits, and neither do the things
counted. The expert is trained on train, all choices are made on dev, and test is for the tables.

    Question: Nora has 5 plums. Eli gives Nora 7 more plums. How many plums does Nora have now?
    Answer: 5 + 7 = 12
    #### 12
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["FEW_SHOT", "TEMPLATES", "Problem", "Split", "Template", "is_correct", "is_exact", "make_problems"]

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Template:
    """One kind of problem; slots: ``{a}``, ``{b}`` numbers, ``{n}``, ``{m}`` names, ``{o}`` things."""

    operation: str
    story: str
    question: str


@dataclass(frozen=True)
class Problem:
    """A problem with its one right equation and answer."""

    question: str
    equation: str
    answer: int
    template: int  # index into TEMPLATES[split]

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        return f" {self.equation} = {self.answer}\n#### {self.answer}"

    def row(self, index: int) -> dict[str, str]:
        """The problem as an example of the task demo_math."""
        solution = self.completion.removeprefix(" ")
        return {"id": str(index), "question": self.question, "answer": str(self.answer), "solution": solution}


def is_correct(text: str, problem: Problem) -> bool:
    """Strict exact match: the first line that starts with ``####`` is ``#### n`` with the right n."""
    line = re.search(r"^####.*$", text, flags=re.MULTILINE)
    return line is not None and line.group().rstrip() == f"#### {problem.answer}"


def is_exact(text: str, problem: Problem) -> bool:
    """The stricter rule: the right answer in its two lines, ended by the model itself, and nothing after them."""
    return re.fullmatch(rf" ?[^\n]+ = {problem.answer}\n#### {problem.answer}\n?", text) is not None


def make_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """``count`` different problems of a split, the templates in turn, so that every one has its share."""
    rng = random.Random(f"{split} {seed}")
    templates = TEMPLATES[split]
    order: list[int] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        if not order:
            order = rng.sample(range(len(templates)), len(templates))
        index = order.pop()
        template = templates[index]
        a, b, answer = _numbers(template.operation, rng)
        n, m = rng.sample(_SPLITS[split]["names"], 2)
        question = f"{template.story} {template.question}".format(
            a=a, b=b, n=n, m=m, o=rng.choice(_SPLITS[split]["things"])
        )
        problem = Problem(question, f"{a} {template.operation} {b}", answer, index)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def _numbers(operation: str, rng: random.Random) -> tuple[int, int, int]:
    """Two operands, in the order of the equation, and the result; small enough for a small model."""
    if operation == "+":
        a, b = rng.randint(3, 40), rng.randint(3, 40)
        return a, b, a + b
    if operation == "-":
        b, answer = rng.randint(3, 30), rng.randint(2, 30)
        return b + answer, b, answer
    a, b = rng.randint(3, 12), rng.randint(2, 9)
    if operation == "*":
        return a, b, a * b
    return a * b, b, a


# Split -> its names, its things, and its templates as ``operation | story | question``.
_SPLITS: dict[Split, dict[str, list[str]]] = json.loads(Path(__file__).with_name("problems.json").read_text("utf-8"))
TEMPLATES = {split: tuple(Template(*line.split(" | ")) for line in of["templates"]) for split, of in _SPLITS.items()}

# The four examples of the few-shot control: one of each operation, from the training templates.
FEW_SHOT: tuple[Problem, ...] = tuple(
    next(problem for problem in make_problems("train", 200, seed=1234) if f" {operation} " in problem.equation)
    for operation in "+-*/"
)
