"""The paper's evaluations.

records.py   prediction lines, as this package and the public proxy-tuning repository write them
scoring.py   one scorer a task, pure functions of text
sandbox.py   runs generated code under limits
judges.py    models that judge answers
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from proxytune.errors import ProxyTuneError

__all__ = ["TASKS", "check_tasks", "score"]

TASKS = (
    "alpacafarm",
    "ds1000",
    "gsm8k",
    "humaneval",
    "mbpp",
    "realtimeqa",
    "toxigen",
    "triviaqa",
    "truthfulqa_mc",
    "truthfulqa_open",
)
_HOME = {"score": "scoring"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _HOME:
        return getattr(import_module(f"proxytune.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks, each once.

    Raises:
        ProxyTuneError: for one that does not exist, naming the nearest.
    """
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            meant = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(TASKS)}"
            raise ProxyTuneError(f"there is no task {name!r}; {meant}")
    return tuple(dict.fromkeys(names))
