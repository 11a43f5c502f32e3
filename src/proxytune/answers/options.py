"""The options of answers: prompts, strength, length, sampling, and where answers go."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from proxytune.errors import ProxyTuneError
from proxytune.options import Options, option
from proxytune.recipe.alpha import alpha_of_text
from proxytune.recipe.gates import FORMS, gate_text
from proxytune.recipe.parts import refuse_negative
from proxytune.recipe.rules import RULES, Rule, rule_of

__all__ = ["ALPHA", "COMBINE", "GATE", "AnswerOptions", "ChatOptions", "ChatSampling", "JobOptions", "Sampling"]

# The headings of the options in the help.
_sampling, _jobs, _traces = (partial(option, panel=panel) for panel in ("Sampling", "Jobs", "Traces"))

ALPHA: dict[str, Any] = {
    "help": "Strength of steering, instead of the recipe's: a number for all experts, or NAME=NUMBER for one. "
    "Repeatable.",
    "flag": "--alpha -a",
    "metavar": "NUMBER|NAME=NUMBER",
    "many": True,
    "parse": alpha_of_text,
}
COMBINE: dict[str, Any] = {
    "help": "Rule by which several experts are joined, instead of the recipe's.",
    "metavar": "|".join(RULES),
    "parse": rule_of,
}
GATE: dict[str, Any] = {
    "help": "Where to steer, instead of the recipe's gate: by the base's probabilities (unsure, entropy, kl, bet) or "
    "by the place in the answer (warmup, decay, cycle, between); none steers everywhere.",
    "metavar": FORMS,
    "parse": gate_text,
}
MOST: dict[str, Any] = {
    "help": "Maximum number of new tokens per answer.",
    "flag": "--max-new-tokens -n",
    "metavar": "N",
    "min": 1,
}


@dataclass(frozen=True)
class AnswerOptions(Options):
    """Options of an answer, besides the prompt."""

    alpha: float | Mapping[str, float] | None = option(None, **ALPHA)
    combine: Rule | None = option(None, **COMBINE)
    gate: str | None = option(None, **GATE)
    max_new_tokens: int = option(256, **MOST)
    chat: bool = option(False, "Put each prompt into the recipe's chat template, as the user's turn.")
    system: str | None = option(
        None,
        "System prompt for the chat templates. A member with a system prompt of its own keeps that.",
        metavar="TEXT",
    )
    negative_prompt: str | None = option(
        None,
        "Negative prompt in place of the recipe's, for recipes made with --negative-prompt or --guidance.",
        metavar="TEXT",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system is not None and not self.chat:
            raise ProxyTuneError("a system prompt needs chat (--chat): a raw prompt has no place for it")
        if self.negative_prompt is not None:
            refuse_negative(self.negative_prompt)

    @property
    def shown(self) -> dict[str, Any]:
        """The arguments of :func:`proxytune.answers.generation.encode` besides the prompt."""
        return {"chat": self.chat, "system": self.system, "negative_prompt": self.negative_prompt}


@dataclass(frozen=True)
class ChatOptions(AnswerOptions):
    """Options of a conversation, which always uses the chat template."""

    max_new_tokens: int = option(512, **MOST)
    chat: bool = True
    trace: Path | None = option(
        None,
        "Append a trace of each answer to this file, as JSON lines: why each token was chosen.",
        metavar="FILE",
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy unless one of the first four is given.

    Options that are not given are off (temperature 1, no top-p, top-k or min-p), whatever the recipe's
    generation_config says.
    """

    temperature: float | None = _sampling(None, "Sample at this temperature; 0 is greedy.", metavar="T")
    top_p: float | None = _sampling(
        None, "Sample from the most probable tokens whose probabilities sum to P.", metavar="P"
    )
    top_k: int | None = _sampling(None, "Sample from the K most probable tokens.", metavar="K")
    min_p: float | None = _sampling(
        None, "Sample from tokens that are at least P times as probable as the most probable one.", metavar="P"
    )
    seed: int = _sampling(
        0, "Seed for sampling. Each prompt draws its own random numbers, by its place in the job.", metavar="N"
    )

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ProxyTuneError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ProxyTuneError(f"top-p must lie in (0, 1], not {self.top_p!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ProxyTuneError(f"top-k must be at least 1, not {self.top_k!r}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ProxyTuneError(f"min-p must lie in [0, 1], not {self.min_p!r}")
        others = {"top-p": self.top_p, "top-k": self.top_k, "min-p": self.min_p}
        if self.temperature == 0 and (idle := [name for name, value in others.items() if value is not None]):
            raise ProxyTuneError(f"temperature 0 is greedy, so {idle[0]} has no effect; leave one of the two out")

    @property
    def greedy(self) -> bool:
        """Whether decoding takes the most probable token, as it also does at temperature 0."""
        return self.temperature == 0 or (self.temperature, self.top_p, self.top_k, self.min_p) == (None,) * 4

    @classmethod
    def of_call(cls, *, seed: int | None, **chosen: Any) -> Sampling:
        """The sampling that a Python call asks for; ``seed`` is None where the call gives none.

        Raises:
            ProxyTuneError: for a seed without sampling, and for values that are not allowed.
        """
        sampling = cls(**chosen) if seed is None else cls(**chosen, seed=seed)
        if seed is not None and sampling.greedy:
            raise ProxyTuneError("seed is for sampling; give temperature, top_p, top_k or min_p, or leave seed out")
        return sampling


def _another_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


@dataclass(frozen=True)
class ChatSampling(Sampling):
    """How the next token is chosen in a conversation: as in :class:`Sampling`, with a random seed by default."""

    seed: int = _sampling(_another_seed, "Seed for sampling; by default a different one each time.", metavar="N")


@dataclass(frozen=True)
class JobOptions(Options):
    """Where prompts come from and answers go."""

    input: str | None = _jobs(
        None,
        'Read prompts from this file: JSON lines {"prompt": ..., "alpha": ..., "negative_prompt": ...}, or a JSON list '
        "of them; - is stdin. Other fields are copied to the answers.",
        flag="--input -i",
        metavar="FILE",
    )
    output: Path | None = _jobs(
        None,
        "Write the answers to this file, as JSON lines. Answers of an interrupted run are kept, and only the rest is "
        "done.",
        flag="--output -o",
        metavar="FILE",
    )
    batch_size: int = _jobs(8, "Prompts per batch.", flag="--batch-size -b", metavar="N", min=1)
    json: bool = _jobs(False, "Print one JSON object per prompt, in order.")
    trace: Path | None = _traces(
        None,
        "Write traces to this file, as JSON lines with one object per answer: why each token was chosen.",
        metavar="FILE",
    )
    trace_top_k: int | None = _traces(
        None, "How many of each model's most probable tokens a trace lists; 5 by default.", metavar="K", min=1
    )
    explain: bool = _traces(False, "Show what steering did to the tokens below each answer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trace is None and not self.explain and self.trace_top_k is not None:
            raise ProxyTuneError("--trace-top-k needs --trace FILE or --explain")
        if self.explain and (self.json or self.input is not None or self.output is not None):
            raise ProxyTuneError(
                "--explain is for answers that are printed as text; --trace FILE records those of jobs"
            )
        files = {"--input": self.input, "--output": self.output, "--trace": self.trace}
        places = [(flag, Path(place)) for flag, place in files.items() if place not in (None, "-")]
        for (flag, one), (other, two) in combinations(places, 2):
            if one.resolve() == two.resolve() or (one.exists() and two.exists() and one.samefile(two)):
                raise ProxyTuneError(f"{flag} and {other} are the same file")
