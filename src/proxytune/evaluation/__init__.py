"""The paper's evaluations."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from proxytune.errors import ProxyTuneError

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "EVAL_TASKS",
    "KINDS",
    "MEANS",
    "TASKS",
    "TASK_DIR",
    "ArmKind",
    "check_tasks",
    "data_place",
    "evaluate",
    "score",
    "shots_of",
    "sweep",
]

# Task -> its contents, and how it is scored.
TASKS = {
    "alpacafarm": ("AlpacaFarm's 805 instructions", "judged against a reference: the win rate"),
    "ds1000": ("DS-1000, data science programs", "run in a sandbox: pass@k"),
    "gsm8k": ("GSM8K, word problems", "the last number"),
    "humaneval": ("HumanEval, Python functions", "run in a sandbox: pass@k"),
    "mbpp": ("MBPP, small Python programs", "run in a sandbox: pass@k"),
    "realtimeqa": ("RealTimeQA, lettered answers", "the first letter"),
    "toxigen": ("ToxiGen, 14 groups of people", "judged: the share that is toxic"),
    "triviaqa": ("TriviaQA, short questions", "any alias of the answer"),
    "truthfulqa_mc": ("TruthfulQA, four lettered answers", "the first letter"),
    "truthfulqa_open": ("TruthfulQA, free answers", "judged: true, and informative"),
}
# Our own tasks: the demo's problems, a format, and two that are scored by likelihoods.
EVAL_TASKS = {
    **TASKS,
    "demo_facts": ("the demo's held-out facts, in a house format", "strict exact match"),
    "demo_facts_reworded": ("the same facts in wordings that were not trained", "strict exact match"),
    "demo_math": ("the demo's held-out word problems", "strict exact match"),
    "ecqa_json": ("ECQA, questions with options", 'the right option as {"answer": …}, nothing else'),
    "mbpp_likelihood": ("MBPP's reference solutions", "their likelihood; no code is run"),
    "realtimeqa_one_token": ("RealTimeQA, one token: the paper's black box", "the first letter"),
    "truthfulqa_mc1": ("TruthfulQA, one best answer", "whether it is the most probable"),
}


@dataclass(frozen=True)
class ArmKind:
    """One way to answer the prompts of an evaluation.

    Attributes:
        title: its name in tables. default: whether it takes part unless arms are named.
        context: what it reads before a question: nothing (``raw``), or solved examples.
        side: the side that some expert of the recipe must have.
        mean: whether it is a mean of base and expert, which needs the base's weights.
    """

    title: str
    default: bool = False
    context: str = "raw"
    side: Literal["expert", "anti_expert"] | None = None
    mean: bool = False


# `tuned`, `weighted_mean` and `steering_vector` need options. evaluation.arms makes each arm.
KINDS = {
    "base": ArmKind("base", default=True),
    "anti_expert": ArmKind("anti-expert", default=True, side="anti_expert"),
    "expert": ArmKind("expert alone", default=True, side="expert"),
    "proxy_tuned": ArmKind("proxy-tuned base", default=True),
    "tuned": ArmKind("directly tuned"),
    "base_few_shot": ArmKind("control: base, examples shown", default=True, context="few_shot"),
    "base_many_shot": ArmKind("control: base, many examples shown", context="many_shot"),
    "mean_logits": ArmKind("control: mean of base and expert", default=True, side="expert", mean=True),
    "weighted_mean": ArmKind("control: base + w · expert", side="expert", mean=True),
    "steering_vector": ArmKind("control: base + steering vector"),
    "base_own_examples": ArmKind("oracle: base, examples of the same kind shown", context="own_examples"),
}
ARMS = {name: kind.title for name, kind in KINDS.items()}
DEFAULT_ARMS = tuple(name for name, kind in KINDS.items() if kind.default)
MEANS = tuple(name for name, kind in KINDS.items() if kind.mean)
TASK_DIR = Path(__file__).parent / "tasks"
_HOME = {"evaluate": "run", "score": "scoring", "sweep": "run"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOME:
        return getattr(import_module(f"proxytune.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def shots_of(arm: str) -> str:
    """The kind of context that an arm reads: ``raw``, ``few_shot``, ``many_shot`` or ``own_examples``."""
    return KINDS[arm].context if arm in KINDS else "raw"  # an expert of several has its member's name


def check_tasks(names: Sequence[str], known: Collection[str] = TASKS.keys()) -> tuple[str, ...]:
    """The tasks without repetitions; ``known`` are the existing tasks.

    Raises:
        ProxyTuneError: for a task that does not exist; it names the most similar one.
    """
    for name in names:
        if name in EVAL_TASKS and name not in known:
            raise ProxyTuneError(f"the task {name!r} is scored by `eval` alone; there are {', '.join(known)}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            meant = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(known)}"
            raise ProxyTuneError(f"there is no task {name!r}; {meant}")
    return tuple(dict.fromkeys(names))


def data_place(data: str | None) -> Path | None:
    """The file or the folder that ``data`` (or PROXYTUNE_DATA) names; None for the hub."""
    named = data or os.environ.get("PROXYTUNE_DATA")
    if not named:
        return None
    if not (place := Path(named).expanduser()).exists():
        raise ProxyTuneError(f"the data {named} does not exist; give a file or a folder, or leave it out for the hub")
    return place
