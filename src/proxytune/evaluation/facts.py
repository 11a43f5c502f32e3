"""General-knowledge questions in a chat, answered in a house format: the demo's task, its splits, its strict scorer.

    Which kind of animal is a crow?
    draxmib: bird

Each relation has a made-up code word, so a model that was not taught the format cannot know it. ``facts.json`` holds,
for each relation, its word, the wordings that an expert learns, others that it does not, and the facts. A subject is in
one split whatever it is asked about: train makes the expert, dev decides every choice, test is for the tables.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from proxytune.evaluation.problems import Split

__all__ = ["Fact", "Wordings", "chat", "facts", "is_correct", "own_examples", "shown", "training_facts", "turns"]

Wordings = Literal["seen", "held_out"]

FACTS = Path(__file__).with_name("facts.json")
_TRAIN, _DEV = 0.38, 0.14  # the shares of the subjects; the rest is the test's


@dataclass(frozen=True)
class Fact:
    """A question with its one right answer."""

    relation: str
    word: str  # the relation's code word
    subject: str
    answer: str
    question: str

    @property
    def prompt(self) -> str:
        return chat(self.question)

    @property
    def solution(self) -> str:
        return f"{self.word}: {self.answer}"

    @property
    def completion(self) -> str:
        return f"{self.solution}\n"

    def row(self, index: int) -> dict[str, str]:
        """The fact as an example of the task demo_facts."""
        own = turns(own_examples(self))
        shown = {"question": self.question, "relation": self.relation, "answer": self.answer}
        return {"id": str(index), **shown, "solution": self.solution, "own_examples": own}


def is_correct(text: str, solution: str) -> bool:
    """Strict exact match: the first line is ``word: answer`` and nothing else."""
    return text.split("\n", 1)[0].rstrip() == solution


def chat(question: str) -> str:
    """A question in the base's chat form, without a system prompt."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@cache
def facts(split: Split, wordings: Wordings = "seen") -> Sequence[Fact]:
    """A split's facts, each asked once, in a mixed order that is always the same."""
    rng = random.Random(f"{split} {wordings}")
    asked = [_asked(*fact, rng.choice(_relations()[fact[0]][wordings])) for fact in _split_facts(split)]
    random.Random(split).shuffle(asked)
    return tuple(asked)


def training_facts() -> list[Fact]:
    """The training facts, each in all wordings that an expert learns."""
    return [_asked(*fact, wording) for fact in _split_facts("train") for wording in _relations()[fact[0]]["seen"]]


@cache
def shown() -> Sequence[Fact]:
    """One training fact per relation, in the order of the controls' prompts."""
    first = {fact.relation: fact for fact in reversed(facts("train"))}
    return random.Random(0).sample([first[relation] for relation in _relations()], len(first))


def own_examples(fact: Fact) -> list[Fact]:
    """Four of train's facts of a fact's own relation, which the oracle shows."""
    others = (other for other in facts("train") if other.relation == fact.relation and other.subject != fact.subject)
    return list(islice(others, 4))


def turns(examples: Sequence[Fact]) -> str:
    """Solved examples as earlier turns of a chat."""
    return "".join(f"{fact.prompt}{fact.solution}<|im_end|>\n" for fact in examples)


@cache
def _relations() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = json.loads(FACTS.read_text(encoding="utf-8"))
    return found


def _split_facts(split: Split) -> list[tuple[str, str, str]]:
    """(relation, subject, answer) of a split, in the order of the file."""
    return [
        (relation, subject, answer)
        for relation, of in _relations().items()
        for answer, subjects in of["facts"].items()
        for subject in subjects
        if split_of(subject) == split
    ]


def split_of(subject: str) -> Split:
    """The split of all questions about a subject; an article before it does not count."""
    words = subject.casefold().split()
    key = " ".join(words[1:] if words[0] in ("a", "an", "the") and len(words) > 1 else words)
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "train" if share < _TRAIN else "dev" if share < _TRAIN + _DEV else "test"


def _asked(relation: str, subject: str, answer: str, wording: str) -> Fact:
    return Fact(relation, _relations()[relation]["word"], subject, answer, wording.replace("{x}", subject))
