"""An evaluation and an alpha sweep: the plan, the predictions, their scores, and what they say together.

    DIR/manifest.json           what decides the predictions, and the versions that made them
    DIR/TASK/ARM.jsonl          one line a prediction, appended as it comes
    DIR/results.json, .md       scores, intervals, comparisons
    DIR/results.png, .svg       the bars; for a sweep DIR/TASK.png, .svg, the curve

What is in the prediction files is not made again, so a killed run goes on where it was, and arms or tasks can be
added to a finished one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from proxytune.answers.generation import Encoded, batches
from proxytune.errors import AlphaError, ProxyTuneError
from proxytune.evaluation import TASK_DIR
from proxytune.evaluation.arms import (
    Arm,
    ArmLM,
    Bench,
    Job,
    Log,
    TaskPlan,
    choices_line,
    encode_choices,
    encode_jobs,
    expand_arms,
    generate_batch,
    jobs_of,
    line_of,
    score_jobs,
    shots_of,
    tuned_prompt,
)
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.results import ARMS, NeedsJudge, results_table, sweep_point, sweep_table, task_results
from proxytune.recipe.alpha import resolve_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.prompts import left_pad

__all__ = [
    "alpha_range",
    "evaluate",
    "load_plans",
    "sweep",
]

DEFAULT_ARMS = ("base", "anti_expert", "expert", "proxy_tuned", "base_few_shot", "mean_logits")
AS_IT_IS = LoadingOptions()
Scoring = Callable[[str], Mapping[str, Any]]
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


# -- an evaluation --------------------------------------------------------------------------------------------
def evaluate(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    out: Path,
    *,
    loading: LoadingOptions = AS_IT_IS,
    scoring: Scoring = lambda task: {},
    progress: Progress = lambda said, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer the tasks with every arm, score and compare; what results.json holds.

    Args:
        scoring: what a task's scorer takes besides the predictions (a judge, the sandbox's limits …).
        progress: is told what is being done. note: is told what the user should know.

    Raises:
        ProxyTuneError: one sentence: an unknown task or arm, missing or malformed data, a run begun otherwise.
    """
    started = time.monotonic()
    plans = load_plans(options)
    names = arms_of(config, options, plans, note)
    write_manifest(out, manifest_of(config, options, loading, plans, {"arms": names}))
    left = [name for name in names if _unfinished(name, plans, out)]
    bench = Bench(config, left, alphas=_alphas(config, options), tuned=options.tuned, **vars(loading))
    for name in left:
        answer_tasks(bench, name, plans, options, out, progress)
    bench.close()
    tasks = {}
    for plan in plans:
        files = {name: out / plan.name / f"{name}.jsonl" for name in names if shots_of(name) in plan.requests}
        lines = {name: read_lines(plan, shots_of(name), path) for name, path in files.items()}
        tasks[plan.name] = task_results(plan.name, lines, samples=plan.repeats, options=scoring(plan.name), note=note)
    results = {"tasks": tasks, "seconds": round(time.monotonic() - started, 1)}
    _write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _write(out / "results.md", results_table(results))
    if drawn := {name: task for name, task in tasks.items() if task["arms"]}:
        from proxytune.evaluation.plots import plot_arms

        plot_arms(drawn, ARMS, out / "results")
    return results


def _unfinished(name: str, plans: Sequence[TaskPlan], out: Path) -> bool:
    """Whether an arm has some prediction still to make."""
    for plan in plans:
        if (requests := plan.requests.get(shots_of(name))) is not None:
            made = Log(out / plan.name / f"{name}.jsonl").read().made
            if any(job.key not in made for job in jobs_of(requests)):
                return True
    return False


def answer_tasks(
    bench: Bench, name: str, plans: Sequence[TaskPlan], options: EvaluationOptions, out: Path, progress: Progress
) -> None:
    """One arm's predictions for all tasks, those alone that are not there yet; the arm is loaded only for them."""
    with contextlib.ExitStack() as stack:
        arm: Arm | None = None
        for plan in plans:
            if (shots := shots_of(name)) not in plan.requests:
                continue
            log = stack.enter_context(Log(out / plan.name / f"{name}.jsonl"))
            requests = list(plan.requests[shots])
            jobs = jobs_of(requests)
            done = sum(job.key in log.made for job in jobs)
            if done == len(jobs):
                continue
            said = f"{plan.name}, {name}"
            progress(f"{said}: loading", done, len(jobs))
            if arm is None:
                arm = stack.enter_context(bench.arm(name))

            def advance(n: int, said: str = said, total: int = len(jobs)) -> None:
                nonlocal done
                done += n
                progress(said, done, total)

            harness = ArmLM(arm, plan, log, batch_size=options.batch_size, seed=options.seed, advance=advance)
            progress(said, done, len(jobs))
            (harness.loglikelihood if plan.likelihood else harness.generate_until)(requests)


# -- a sweep --------------------------------------------------------------------------------------------------
def sweep(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    values: Sequence[float],
    out: Path,
    *,
    expert: str | None = None,
    loading: LoadingOptions = AS_IT_IS,
    scoring: Scoring = lambda task: {},
    progress: Progress = lambda said, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The recipe at each alpha: what results.json holds.

    Each prompt is read once by every member, whatever the number of alphas: its cache is repeated for them, or, where
    continuations are scored, its logits are mixed anew. Members with prompts of their own read them once an alpha.

    Args:
        values: the alphas. expert: whose they are; the other experts keep theirs. None for all.
    """
    started = time.monotonic()
    plans = load_plans(options)
    names = [each.name for each in config.expert_list]
    if expert is not None and expert not in names:
        raise AlphaError(f"no expert is called {expert!r}; the recipe has {', '.join(names)}")
    alphas = [
        tuple(value if expert in (None, name) else own for name, own in zip(names, config.alphas)) for value in values
    ]
    write_manifest(out, manifest_of(config, options, loading, plans, {"sweep": expert or "all experts"}))
    bench = Bench(config, ["proxy_tuned"], **vars(loading))
    with bench.arm("proxy_tuned") if _left(plans, values, out) else contextlib.nullcontext() as arm:
        if arm is not None:
            for plan in plans:
                with contextlib.ExitStack() as stack:
                    logs = [stack.enter_context(Log(_alpha_file(out, plan, value))) for value in values]
                    _sweep_task(arm, plan, alphas, logs, options, progress)
    bench.close()
    tasks = {plan.name: _sweep_results(plan, values, out, scoring, note) for plan in plans}
    results = {"tasks": tasks, "seconds": round(time.monotonic() - started, 1)}
    _write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _write(out / "results.md", sweep_table(results))
    for name, task in tasks.items():
        if task["points"]:
            from proxytune.evaluation.plots import plot_sweep

            plot_sweep(name, task, out / name)
    return results


def _alpha_file(out: Path, plan: TaskPlan, value: float) -> Path:
    return out / plan.name / f"alpha={value:g}.jsonl"


def _left(plans: Sequence[TaskPlan], values: Sequence[float], out: Path) -> bool:
    """Whether some prediction is still to be made."""
    for plan in plans:
        keys = {job.key for job in jobs_of(plan.requests["raw"])}
        for value in values:
            if keys - set(Log(_alpha_file(out, plan, value)).read().made):
                return True
    return False


def _sweep_task(
    arm: Arm,
    plan: TaskPlan,
    alphas: Sequence[tuple[float, ...]],
    logs: Sequence[Log],
    options: EvaluationOptions,
    progress: Progress,
) -> None:
    """All alphas of one task, a batch of prompts at a time; what the logs hold is not made again."""
    jobs = jobs_of(plan.requests["raw"])
    total = len(jobs) * len(logs)
    done = sum(job.key in log.made for job in jobs for log in logs)
    if done == total:
        return
    said = f"{plan.name}, {len(alphas)} alphas"
    progress(said, done, total)
    # Continuations are mixed anew without more rows; generating, each alpha is a row of its own.
    n_prompts = options.batch_size if plan.likelihood else max(1, options.batch_size // len(alphas))
    output = str(plan.metadata.get("output", "output"))
    encoded: list[tuple[Job, Any]] = (encode_choices if plan.likelihood else encode_jobs)(arm, plan, jobs)
    for batch in batches(encoded, n_prompts):
        left = [[at for at, log in enumerate(logs) if job.key not in log.made] for job, _ in batch]
        pairs = [(row, at) for row, wanted in enumerate(left) for at in wanted]
        if not pairs:
            continue
        started = time.monotonic()
        if plan.likelihood:
            scores = score_jobs(arm, batch, alphas)
            made = [choices_line(plan, batch[row][0], 0.0, batch[row][1], scores[at][row]) for row, at in pairs]
        else:
            rows = [row for row, _ in pairs]
            texts = generate_batch(
                replace(arm, speculate=False),
                plan,
                [batch[row] for row in rows],
                [alphas[at] for _, at in pairs],
                seed=options.seed,
                past_key_values=_prefilled(arm, [encoded for _, encoded in batch], rows),
            )
            made = [line_of(plan, batch[row][0], 0.0, {output: text}) for row, text in zip(rows, texts)]
        seconds = round((time.monotonic() - started) / len(pairs), 4)
        for at, log in enumerate(logs):
            if lines := [{**line, "seconds": seconds} for line, (_, of) in zip(made, pairs) if of == at]:
                log.append(lines)
        done += len(pairs)
        progress(said, done, total)


@torch.inference_mode()
def _prefilled(arm: Arm, prompts: Sequence[Encoded], rows: Sequence[int]) -> Any:
    """A cache that has read all columns of the prompts but the last, its rows repeated as ``rows`` says.

    None where members have prompts of their own, which are read whole in a first forward, and where a prompt has a
    single token. The rows must be as wide as the batch that is generated from, so no prompt may be missing in them.
    """
    if prompts[0].own or any(len(prompt.ids) == 1 for prompt in prompts):
        return None
    if max(len(prompts[row].ids) for row in rows) < max(len(prompt.ids) for prompt in prompts):
        used = sorted(set(rows))
        return _prefilled(arm, [prompts[row] for row in used], [used.index(row) for row in rows])
    ids, mask = left_pad([prompt.ids for prompt in prompts])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    device = arm.model.device
    output = arm.model(
        input_ids=ids[:, :-1].to(device),
        attention_mask=mask[:, :-1].to(device),
        position_ids=positions[:, :-1].to(device),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.reorder_cache(torch.tensor(list(rows), device=device))
    return cache


def _sweep_results(
    plan: TaskPlan, values: Sequence[float], out: Path, scoring: Scoring, note: Callable[[str], None]
) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    headline = None
    try:
        judging = scoring(plan.name)
        for value in values:
            lines = read_lines(plan, "raw", _alpha_file(out, plan, value))
            headline, point = sweep_point(plan.name, value, lines, **judging)
            points.append(point)
    except NeedsJudge as error:
        note(str(error))
    examples = len({job.id for job in jobs_of(plan.requests["raw"])})
    return {"headline": headline, "examples": examples, "samples": plan.repeats, "points": points}


def alpha_range(text: str) -> tuple[str | None, list[float]]:
    """Read ``[NAME=]START:STOP:STEP`` (both ends belong to it) or ``[NAME=]A,B,…``: the expert's name, the alphas.

    Raises:
        AlphaError: where it is neither, or has no alphas or more than two hundred.
    """
    name, equals, numbers = text.rpartition("=")
    wrong = AlphaError(f"--alpha is START:STOP:STEP, such as 0:2:0.25, or numbers, such as 0,0.5,1, not {text!r}")
    try:
        if ":" in numbers:
            start, stop, step = (float(part) for part in numbers.split(":"))
            count = (stop - start) / step
            if not 0 <= count < 200:
                raise wrong
            values = [round(start + step * at, 10) for at in range(int(count + 1e-6) + 1)]
        else:
            values = [float(part) for part in numbers.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    if not all(abs(value) < 1e6 for value in values):
        raise wrong
    return (name.strip() if equals else None), sorted(dict.fromkeys(values))


# -- the plan -------------------------------------------------------------------------------------------------
def load_plans(options: EvaluationOptions) -> list[TaskPlan]:
    """The tasks with their requests, the data read."""
    if options.data is not None and Path(options.data).is_file() and len(options.tasks) > 1:
        raise ProxyTuneError("--data is one file, but there are several tasks; give a folder")
    with _quiet():
        metadata: dict[str, Any] = {"seed": options.seed}
        if options.data is not None:
            metadata["data"] = str(options.data)
        manager = TaskManager(include_path=str(TASK_DIR), include_defaults=False, metadata=metadata)
        plans = []
        for name in options.tasks:
            task = manager.load([name])["tasks"][name]
            task.set_fewshot_seed(options.seed)
            repeats = task.config.repeats
            if options.samples is not None and repeats > 1:
                repeats = options.samples
            documents = task.eval_docs
            chosen: Sequence[int] = range(len(documents))
            if options.limit is not None and options.limit < len(documents):
                chosen = sorted(random.Random(options.seed).sample(range(len(documents)), options.limit))
            requests = {"raw": _requests(task, documents, chosen, 0, repeats)}
            shots = (task.config.metadata or {}).get("few_shot", 0)
            if shots and len(task.fewshot_docs() or ()) >= shots:
                requests["few_shot"] = _requests(task, documents, chosen, shots, repeats)
            plans.append(TaskPlan(name, task, requests, repeats))
    return plans


def _requests(task: Any, documents: Any, chosen: Sequence[int], shots: int, repeats: int) -> list[Instance]:
    found: list[Instance] = []
    for index in chosen:
        document = documents[index]
        context = task.fewshot_context(document, num_fewshot=shots)
        made = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, index, repeats))
        found += made if isinstance(made, list) else [made] * repeats
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's advice on options that we set ourselves, and without bars of datasets' own."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def arms_of(
    config: ProxyTuneConfig, options: EvaluationOptions, plans: Sequence[TaskPlan], note: Callable[[str], None]
) -> list[str]:
    """The arms of a run, in order."""
    shown = [plan.name for plan in plans if "few_shot" in plan.requests]
    lacking = [plan.name for plan in plans if "few_shot" not in plan.requests]
    if options.arms is None:
        members = [name for name, _ in config.members()]
        wanted = [arm for arm in DEFAULT_ARMS if arm != "base_few_shot" or shown]
        for side, arms in ((".expert", ("expert", "mean_logits")), (".anti_expert", ("anti_expert",))):
            if not any(name.endswith(side) for name in members):
                wanted = [arm for arm in wanted if arm not in arms]
    else:
        wanted = list(options.arms)
        if "tuned" in wanted and options.tuned is None:
            raise ProxyTuneError("the arm tuned needs a model: --tuned MODEL")
        if "base_few_shot" in wanted and not shown:
            raise ProxyTuneError(
                f"there are no solved examples to show for {', '.join(lacking)}; leave the arm base_few_shot out"
            )
    if options.tuned is not None and "tuned" not in wanted:
        wanted.append("tuned")
    if "tuned" in wanted:
        tuned_prompt(config)  # now, not after the other arms, is when to say that it is not known
    if "base_few_shot" in wanted and lacking:
        note(f"no solved examples to show for {', '.join(lacking)}: no base_few_shot there")
    found = expand_arms(wanted, config)
    order = [arm for arm in found if arm != "tuned"]  # last: everything else is let go before it is loaded
    return order + [arm for arm in found if arm == "tuned"]


def _alphas(config: ProxyTuneConfig, options: EvaluationOptions) -> tuple[float, ...]:
    return resolve_alpha(options.alpha, [each.name for each in config.expert_list], config.alphas)


# -- the manifest ---------------------------------------------------------------------------------------------
def manifest_of(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    loading: LoadingOptions,
    plans: Sequence[TaskPlan],
    what: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run is: ``decides`` and ``tasks`` decide its predictions, the rest is for the record."""
    experts = [{key: value for key, value in expert.items() if key != "alpha"} for expert in config.experts]
    alphas = _alphas(config, options)
    kind = "sweep" if "sweep" in what else "eval"
    return {
        "decides": {
            "command": kind,
            "base": config.base,
            "experts": experts,
            "plausibility": config.plausibility,
            "alpha": what["sweep"] if kind == "sweep" else dict(zip([e.name for e in config.expert_list], alphas)),
            "tuned": options.tuned,
            "seed": options.seed,
            "dtype": loading.dtype,
            "pack": loading.pack,
        },
        "tasks": {
            plan.name: {
                "limit": options.limit,
                "examples": len({job.id for job in jobs_of(plan.requests["raw"])}),
                "samples": plan.repeats,
                "version": plan.metadata.get("version"),
                "data_sha256": _data_hash(plan),
            }
            for plan in plans
        },
        **({"arms": list(what["arms"])} if "arms" in what else {}),
        "recipe": str(config.name_or_path),
        "data": options.data or os.environ.get("PROXYTUNE_DATA") or "hub",
        "batch_size": options.batch_size,
        "speculate": loading.speculate,
        "versions": _versions(),
    }


def _data_hash(plan: TaskPlan) -> str:
    """Of the examples that are asked, in order."""
    digest = hashlib.sha256()
    for instance in plan.requests["raw"]:
        digest.update(json.dumps([instance.doc, instance.arguments], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    packages = ("proxytune", "torch", "transformers", "lm_eval", "datasets", "peft", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Begin a run in ``out``, or carry on the one that is there.

    Raises:
        ProxyTuneError: if that one was begun with something else that decides its predictions, naming it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
            decided, tasks = dict(before["decides"]), dict(before["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProxyTuneError(f"{path} is not a manifest of this command; choose another --out") from error
        if decided.get("tuned") is None or manifest["decides"]["tuned"] is None:  # an arm more or less changes no other
            manifest["decides"]["tuned"] = decided["tuned"] = decided.get("tuned") or manifest["decides"]["tuned"]
        _refuse_others(out, "", decided, manifest["decides"])
        for name in set(tasks) & set(manifest["tasks"]):
            _refuse_others(out, f"{name}: ", tasks[name], manifest["tasks"][name])
        manifest = {**manifest, "tasks": {**tasks, **manifest["tasks"]}}
        if "arms" in manifest:
            manifest["arms"] = list(dict.fromkeys([*before.get("arms", []), *manifest["arms"]]))
    _write(path, json.dumps(manifest, indent=2) + "\n")


def _refuse_others(out: Path, said: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [
        f"{said}{key.replace('_', ' ')} {_short(before.get(key))}, now {_short(now.get(key))}"
        for key in now
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise ProxyTuneError(f"{out} was begun with {'; '.join(differing)}; repeat that, or choose another --out")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _write(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_lines(plan: TaskPlan, shots: str, path: Path) -> list[dict[str, Any]]:
    """The predictions of a run, in the order of its examples."""
    made = Log(path).read().made
    return [made[job.key] for job in jobs_of(plan.requests[shots])]
