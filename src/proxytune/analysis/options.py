"""The options of explanations and analyses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxytune.answers.options import ALPHA
from proxytune.errors import ProxyTuneError
from proxytune.options import Options, option

__all__ = ["AnalyzeOptions", "Branch", "DoctorOptions", "ExplainOptions", "LimitOptions"]


@dataclass(frozen=True)
class Branch:
    """Another token at one place of an answer.

    Attributes:
        number: the number of the token, from 1. text: the text of the other token; "" if its id is given. id: its id.
    """

    number: int
    text: str = ""
    id: int | None = None

    @staticmethod
    def parse(words: str) -> Branch:
        """Read ``N:TOKEN`` or ``N:#ID``.

        Raises:
            ProxyTuneError: if it is neither.
        """
        match = re.fullmatch(r"([0-9]+):(#[0-9]+|.+)", words, re.DOTALL)
        if match is None or int(match[1]) < 1:
            raise ProxyTuneError(
                f"--branch is N:TOKEN, the number of a token from 1 and a candidate's text, or N:#ID, not {words!r}"
            )
        if re.fullmatch("#[0-9]+", match[2]):
            return Branch(int(match[1]), id=int(match[2][1:]))
        return Branch(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.number}:{self.text or f'#{self.id}'}"


@dataclass(frozen=True)
class ExplainOptions(Options):
    """Options of an explanation."""

    moves: int = option(10, "How many of the tokens that steering moved furthest to list.", metavar="K", min=1)
    trace_top_k: int | None = option(
        None, "How many of each model's most probable tokens to record; 5 by default.", metavar="K", min=1
    )
    html: Path | None = option(
        None, "Write a page for the browser to this file, instead of printing text.", metavar="FILE"
    )
    answer: int | None = option(None, "Which answer of a FILE to show, counted from 1.", metavar="N", min=1)
    branch: tuple[Branch, ...] = option(
        (),
        "Put another token at place N of the answer (counted from 1) and continue from there. TOKEN is the text of a "
        "candidate, or #ID. A second --branch changes the answer of the first one.",
        metavar="N:TOKEN",
        many=True,
        parse=lambda texts: tuple(map(Branch.parse, texts)),
    )
    branch_alpha: float | Mapping[str, float] | None = option(
        None,
        **{
            **ALPHA,
            "flag": "--branch-alpha",
            "help": "Strength of steering after the branch; 0 continues without steering.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch_alpha is not None and not self.branch:
            raise ProxyTuneError("--branch-alpha needs --branch N:TOKEN")
        if self.html is not None and not self.html.parent.is_dir():
            raise ProxyTuneError(f"{self.html} cannot be written: there is no directory {self.html.parent}")
        if self.html is not None and self.html.is_dir():
            raise ProxyTuneError(f"{self.html} is a directory; --html names the file to be written")


@dataclass(frozen=True)
class AnalyzeOptions(Options):
    """Options of an analysis of traces."""

    classes: Path | None = option(
        None,
        "More classes of tokens, as YAML or JSON: NAME: {about: TEXT, pattern: REGEX}; NAME: null removes one.",
        metavar="FILE",
    )
    top: int = option(10, "How many of the most promoted and most demoted tokens to list.", metavar="K", min=1)
    plot: Path | None = option(
        None, "Draw the classes and positions into this directory, as PNG and SVG; needs matplotlib.", metavar="DIR"
    )
    seed: int = option(0, "Seed for the bootstrap.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot is not None and self.plot.exists() and not self.plot.is_dir():
            raise ProxyTuneError(f"{self.plot} is a file; --plot names a directory")


@dataclass(frozen=True)
class LimitOptions(Options):
    """Options of ``limit``: the gold answers, and samples of the base."""

    input: str = option(
        "",
        'Gold answers: JSON lines {"prompt": ..., "completion": ...}, or a JSON list of these; - is stdin. A list of '
        "completions holds several wordings, of which the best within reach counts.",
        flag="--input -i",
        metavar="FILE",
    )
    samples: int = option(
        0,
        "How many answers of the base alone to sample for each prompt; one that begins with the gold text passes.",
        metavar="K",
        min=0,
    )
    temperature: float = option(1.0, "Temperature of these samples.", metavar="T")
    seed: int = option(0, "Seed of these samples.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input:
            raise ProxyTuneError("give the gold answers with --input FILE")
        if not self.temperature > 0:
            raise ProxyTuneError(f"--temperature must be above 0 to sample, not {self.temperature:g}")


@dataclass(frozen=True)
class DoctorOptions(Options):
    """The sample that a recipe is examined on, for how long, and what must hold."""

    data: str = option(
        "",
        'A sample with gold answers: JSON lines {"prompt": ..., "completion": ...}, or a JSON list of these; - is '
        "stdin. A list of completions holds several wordings: each counts as right, and the probability of the first "
        "is measured.",
        flag="--data -d",
        metavar="FILE",
    )
    minutes: float = option(
        10.0,
        "Time limit for the examples. The result covers the examples measured by then, and the same command continues "
        "with the rest. 0 is no limit.",
        metavar="M",
        min=0,
    )
    shots: int = option(
        4,
        "Examples of the sample that the arm base_few_shot reads before each prompt; 0: no such arm.",
        metavar="N",
        min=0,
    )
    gates: tuple[str, ...] = option(
        (),
        "A condition on a number of the JSON result, such as differences.base.correct.low>=0; may be given several "
        "times. The exit status is 2 if one does not hold.",
        flag="--gate",
        metavar="METRIC>=X",
        many=True,
        parse=tuple,
    )
    seed: int = option(0, "Seed for the bootstrap.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ProxyTuneError("give a sample with gold answers with --data FILE")
        for text in self.gates:
            gate(text)


def gate(text: str) -> tuple[str, float]:
    """Read ``METRIC>=X``: the metric's name and the number.

    Raises:
        ProxyTuneError: where it is something else.
    """
    name, found, number = text.partition(">=")
    try:
        value = float(number)
    except ValueError:
        found = ""
    if not found or not name.strip():
        raise ProxyTuneError(f"--gate is METRIC>=X, such as differences.base.correct.low>=0, not {text!r}")
    return name.strip(), value
