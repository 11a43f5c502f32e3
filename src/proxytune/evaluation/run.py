"""An evaluation and an alpha sweep: the plan, the predictions, their scores, and the results.

    DIR/manifest.json           what decides the predictions, and the versions that made them
    DIR/TASK/ARM.jsonl          one line per prediction, appended as it comes
    DIR/TASK/ARM.trace.jsonl    with ``trace``: one line per answer, why each of its tokens was chosen
    DIR/results.json, .md       scores, intervals, comparisons
    DIR/results.png, .svg       the bars; for a sweep DIR/TASK.png, .svg, the curve

Predictions in the files are not made again. So a killed run continues where it stopped, and arms or tasks can be added
to a finished one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from proxytune.answers.journal import write_whole
from proxytune.errors import ProxyTuneError, Unfinished
from proxytune.evaluation import ARMS, DEFAULT_ARMS, MEANS, TASK_DIR, shots_of
from proxytune.evaluation.answering import (
    Job,
    Log,
    Mix,
    TaskPlan,
    TraceLog,
    answer_jobs,
    encode_jobs,
    with_own_examples,
)
from proxytune.evaluation.arms import (
    AS_IT_IS,
    Arm,
    Arms,
    Reader,
    asks_base,
    expand_arms,
    impossible,
    tuned_prompt,
)
from proxytune.evaluation.engine import EngineArms, refuse_of_engine
from proxytune.evaluation.fit import check_fit, curves, fits, gold_ids, read_gold
from proxytune.evaluation.manifest import manifest_of, write_manifest
from proxytune.evaluation.options import EvaluationOptions
from proxytune.evaluation.results import (
    results_tables,
    sweep_results,
    sweep_tables,
    task_results,
)
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.gates import gate_of
from proxytune.recipe.members import Loading, load_tokenizer, refuse_of_api
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase
from proxytune.tables import Table, markdown

__all__ = ["evaluate", "load_plans", "sweep"]

Scoring = Callable[[str], Mapping[str, Any]]
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


# -- an evaluation --------------------------------------------------------------------------------------------
def evaluate(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    out: Path,
    *,
    loading: LoadingOptions = AS_IT_IS,
    settings: Mapping[str, Any] | None = None,
    scoring: Scoring = lambda task: {},
    progress: Progress = lambda said, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer the tasks with every arm, score and compare; return the contents of results.json.

    An arm or a task that is not possible (a prompt too long for a member, a judge that does not answer) is left out,
    with the reason under ``left_out``. All others are written.

    Args:
        settings: the command's own options, for the manifest: ``proxytune eval --config`` takes it.
        scoring: the scorers' arguments besides the predictions (a judge, the sandbox's limits …).
        progress: called with the current activity, and how many predictions of the run are done.
        note: called with messages for the user.

    Raises:
        ProxyTuneError: for an unknown task or arm, missing or malformed data, a run that was started with other
            settings, and if nothing is left to do.
    """
    started = time.monotonic()
    plans = load_plans(options)
    judging = {plan.name: scoring(plan.name) for plan in plans}  # find out before the answers that a judge is missing
    names = arms_of(config, options, plans, note)
    arms = _arms(config, options, loading, config.alphas_of(options.alpha))
    refuse_unknown(arms, plans, names, {"--trace": options.trace})
    if options.trace:
        refuse_untraceable(plans, names, out)
    write_manifest(out, manifest_of(config, options, loading, plans, {"arms": names}, settings))
    parts = [
        Part(name, plan, [out / plan.name / f"{name}.jsonl"])
        for name in names
        for plan in plans
        if shots_of(name) in plan.jobs
    ]
    left_out = answer_all(arms, parts, options, Tally(progress, parts), note)
    arms.close()
    tasks = {}
    for plan in plans:
        lines = {part.arm: part.lines()[0] for part in parts if part.plan is plan}
        with _left_out(left_out, plan.name):
            if whole := {name: of for name, of in lines.items() if of is not None}:
                how: dict[str, Any] = {"samples": plan.repeats, "options": judging[plan.name], "note": note}
                tasks[plan.name] = task_results(plan.name, whole, **how)
                if options.engine == "vllm":  # every arm costs as much as the mixture
                    tasks[plan.name]["steered_to_base"] = None
    results = _write_results(out, tasks, left_out, started, results_tables)
    if drawn := {name: task for name, task in tasks.items() if task["arms"]}:
        from proxytune.evaluation.plots import plot_arms

        plot_arms(drawn, out / "results")
    return results


def _arms(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    loading: LoadingOptions,
    alphas: Sequence[float] | None = None,
) -> Arms:
    """What makes the arms of a run; nothing is loaded yet."""
    more: dict[str, Any] = {"tuned": options.tuned, "mean_weight": options.mean_weight, "vector": options.vector}
    if options.engine == "vllm":
        return EngineArms(config, (), loading, alphas=alphas, options=options.engine_options, **more)
    return Arms(config, (), loading, alphas=alphas, **more)


def refuse_unknown(arms: Arms, plans: Sequence[TaskPlan], names: Sequence[str], asked: Mapping[str, bool]) -> None:
    """Refuse what the engine or a base behind an API cannot answer, before anything is loaded.

    Args:
        names: the arms of the run. asked: options of the command that need all log-probabilities -> whether they were
            given.

    Raises:
        ProxyTuneError: names the task or the option, and what it needs.
    """
    config, loading = arms.config, arms.loading
    base = config.base_member
    refuse_of_api(base, loading)
    if isinstance(arms, EngineArms):
        refuse_of_engine(arms, names, asked)
    if not isinstance(base, ApiBase) or not any(map(asks_base, names)):
        return
    needs = dict(asked)
    if "proxy_tuned" in names:
        gate = gate_of(config.gate)
        needs |= {"the rule dynamic": config.combine == "dynamic"}
        needs |= {} if gate is None else {f"the gate {gate.kind}": not gate.scheduled}
    for plan in plans:
        needs[f"{plan.name}, which scores given continuations,"] = plan.likelihood
        needs[f"{plan.name}, which is sampled,"] = any(
            job.options.get("do_sample") for jobs in plan.jobs.values() for job in jobs
        )
    if loading.way == "push":
        needs |= {f"{plan.name}, which bans words,": bool(plan.metadata.get("banned")) for plan in plans}
        needs["plausibility"] = config.plausibility is not None and "proxy_tuned" in names
    wanted = next((what for what, needed in needs.items() if needed), None)
    if wanted is None:
        return
    if loading.way == "push":
        raise ProxyTuneError(f"{wanted} needs the base's probabilities, and with --way push its server chooses alone")
    n_vocab = len(load_tokenizer(config, "base", base, Loading.of(loading)))
    if base.top_logprobs < n_vocab:
        raise ProxyTuneError(
            f"{wanted} needs the base's probabilities of all {n_vocab} tokens, and its server is asked for "
            f"{base.top_logprobs} (top_logprobs in the recipe); leave it out"
        )


def refuse_untraceable(plans: Sequence[TaskPlan], arms: Sequence[str], out: Path) -> None:
    """Refuse tasks that write nothing, and predictions that were made without a trace.

    Raises:
        ProxyTuneError: names the task, or the example.
    """
    if scored := [plan.name for plan in plans if plan.likelihood]:
        raise ProxyTuneError(
            f"--trace records answers that are written, and {scored[0]} scores given continuations; leave "
            f"{scored[0]} or --trace out"
        )
    for file in (out / plan.name / f"{arm}.jsonl" for plan in plans for arm in arms):
        TraceLog(_traces_of(file), Log(file).read()).read().refuse_missing()


def _traces_of(file: Path) -> Path:
    return file.with_suffix(".trace.jsonl")


@dataclass
class Part:
    """One arm's part of a task.

    Attributes:
        files: its predictions, a file for each mix.
        asked: how many predictions they hold in the end. missing: how many they lacked when the run began.
    """

    arm: str
    plan: TaskPlan
    files: Sequence[Path]

    def __post_init__(self) -> None:
        keys = {job.key for job in self.jobs}
        self.asked = len(keys) * len(self.files)
        self.missing = self.asked - sum(len(keys & set(Log(file).read().made)) for file in self.files)

    @property
    def jobs(self) -> Sequence[Job]:
        return self.plan.jobs[shots_of(self.arm)]

    def lines(self) -> list[list[dict[str, Any]] | None]:
        """The predictions of each file, in the order of the examples; None if some are missing."""
        found: list[list[dict[str, Any]] | None] = []
        for made in (Log(file).read().made for file in self.files):
            found.append([made[job.key] for job in self.jobs] if all(job.key in made for job in self.jobs) else None)
        return found


class Tally:
    """The progress of a run: counts its predictions, and calls ``progress``."""

    def __init__(self, progress: Progress, parts: Sequence[Part]) -> None:
        self.progress, self.said, self.begun = progress, "", 0
        self.n_parts = sum(part.missing > 0 for part in parts)
        self.total = sum(part.asked for part in parts)
        self.done = self.total - sum(part.missing for part in parts)

    def leave_out(self, part: Part) -> None:
        self.total -= part.missing
        part.missing = 0
        self.n_parts -= 1

    def begin(self, said: str) -> None:
        self.begun += 1
        self.said = f"{said} ({self.begun} of {self.n_parts})"
        self.add(0)

    def add(self, n: int) -> None:
        """Count so many more predictions."""
        self.done += n
        self.progress(self.said, self.done, self.total)


def unreadable(arms: Arms, parts: Sequence[Part], tally: Tally, note: Callable[[str], None]) -> list[LeftOut]:
    """What an arm cannot answer. This is found out before any weights are loaded.

    Every open prompt is encoded and compared with the contexts.
    """
    left_out: list[LeftOut] = []
    readers: dict[str, Reader] = {}
    for part in (part for part in parts if part.missing):
        arm, task = part.arm, part.plan.name
        tally.progress(f"prompts of {task}, {arm}", tally.done, tally.total)
        n_before = len(left_out)
        with _left_out(left_out, task, arm):
            readers[arm] = readers.get(arm) or arms.reader(arm)
            arms.refuse(readers[arm], part.plan)
            encode_jobs(readers[arm], part.plan, part.jobs)
        if len(left_out) > n_before:
            tally.leave_out(part)
            note(f"{arm} will be left out of {task}: {left_out[-1]['reason']}")
    return left_out


def answer_all(
    arms: Arms,
    parts: Sequence[Part],
    options: EvaluationOptions,
    tally: Tally,
    note: Callable[[str], None],
    mixes: Sequence[Mix] | None = None,
) -> list[LeftOut]:
    """Make the missing predictions of a run, arm by arm. An arm is loaded only if there are any.

    Args:
        mixes: the alphas to answer with, a file of each part for each of them; by default the arm's own.

    Returns:
        What the arms cannot answer.
    """
    left_out = unreadable(arms, parts, tally, note)
    missing = [part for part in parts if part.missing]
    # The whole recipe is loaded only if an arm needs it.
    arms.names = list(dict.fromkeys(part.arm for part in missing))
    for name, own in groupby(missing, key=lambda part: part.arm):
        arm: Arm | None = None
        for part in own:
            tally.begin(f"{part.plan.name}, {name if mixes is None else f'{len(mixes)} alphas'}")
            with contextlib.ExitStack() as stack:
                logs = [stack.enter_context(Log(file)) for file in part.files]
                traced = None
                if options.trace:
                    traced = stack.enter_context(TraceLog(_traces_of(part.files[0]), logs[0])).append
                how: dict[str, Any] = {"batch_size": options.rows_per_batch, "seed": options.seed, "traced": traced}
                with _left_out(left_out, part.plan.name, name):
                    arm = arm or arms.make(name)
                    for batch in answer_jobs(arm, part.plan, part.jobs, [log.made for log in logs], mixes, **how):
                        for log, lines in zip(logs, batch):
                            log.append(lines)
                        tally.add(sum(map(len, batch)))
    return left_out


class LeftOut(TypedDict):
    """Something that a run could not do: an arm's part of a task or, if ``arm`` is None, a task's scores.

    ``resumes``: a judge did not answer, or a budget is spent; the same command continues from there.
    """

    task: str
    arm: str | None
    reason: str
    resumes: bool


@contextlib.contextmanager
def _left_out(told: list[LeftOut], task: str, arm: str | None = None) -> Iterator[None]:
    """Report an error inside it as left out, and continue the run."""
    try:
        yield
    except ProxyTuneError as error:
        told.append({"task": task, "arm": arm, "reason": str(error), "resumes": isinstance(error, Unfinished)})


# -- a sweep --------------------------------------------------------------------------------------------------
def sweep(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    values: Sequence[float],
    out: Path,
    *,
    expert: str | None = None,
    fit: bool = False,
    loading: LoadingOptions = AS_IT_IS,
    settings: Mapping[str, Any] | None = None,
    scoring: Scoring = lambda task: {},
    progress: Progress = lambda said, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate the recipe at each alpha; return the contents of results.json.

    Every member reads each prompt once, whatever the number of alphas. Its cache is repeated for them or, for scored
    continuations, its logits are mixed again. Members with prompts of their own read them once per alpha. vLLM gets one
    request per alpha.

    Args:
        values: the alphas. expert: the expert that they are for; the other experts keep theirs. None for all.
        fit: also find the alpha under which each task's gold answers are most probable, see :func:`fit_task`.
    """
    if options.trace:
        raise ProxyTuneError("a sweep writes no traces; leave trace out, or evaluate the recipe at one alpha")
    started = time.monotonic()
    plans = load_plans(options)
    judging = {plan.name: scoring(plan.name) for plan in plans}  # find out before the answers that a judge is missing
    if fit and (lacking := [plan.name for plan in plans if not plan.metadata.get("gold")]):
        raise ProxyTuneError(f"{lacking[0]} has no gold answers to fit alpha to; leave {lacking[0]} or --fit out")
    alphas = [config.alphas_of(value if expert is None else {expert: value}) for value in values]
    if loading.way == "verify":
        raise ProxyTuneError("a sweep never drafts, so --way verify would change nothing; leave it out")
    loading = replace(loading, speculate=False)
    arms = _arms(config, options, loading)
    refuse_unknown(arms, plans, ["proxy_tuned"], {"--fit": fit})
    what = {"sweep": expert or "all experts"}
    write_manifest(out, manifest_of(config, options, loading, plans, what, settings))
    parts = [
        Part("proxy_tuned", plan, [out / plan.name / f"alpha={value:g}.jsonl" for value in values]) for plan in plans
    ]
    tally = Tally(progress, parts)
    left_out = answer_all(arms, parts, options, tally, note, alphas)
    fitted = {}
    for plan in plans if fit else ():
        progress(f"gold answers of {plan.name}", tally.done, tally.total)
        with _left_out(left_out, plan.name, "proxy_tuned"):
            fitted[plan.name] = fit_task(arms.make("proxy_tuned"), plan, options.seed)
    arms.close()

    tasks = {}
    for part in parts:
        name = part.plan.name
        with _left_out(left_out, name):
            if whole := {value: of for value, of in zip(values, part.lines()) if of is not None}:
                how: dict[str, Any] = {"samples": part.plan.repeats, "options": judging[name], "note": note}
                tasks[name] = sweep_results(name, whole, **how)
                if name in fitted:
                    tasks[name]["fit"] = fitted[name]["by_expert"].get(expert, fitted[name])
    results = _write_results(out, tasks, left_out, started, sweep_tables)
    for name, task in tasks.items():
        if task["points"]:
            from proxytune.evaluation.plots import plot_sweep

            plot_sweep(name, task, out / name)
    return results


def fit_task(arm: Arm, plan: TaskPlan, seed: int) -> dict[str, Any]:
    """Find the alpha under which a task's gold answers are most probable, from one pass over them.

    Returns:
        what :func:`proxytune.evaluation.fit.fits` gives, with the number of ``answers`` and of their ``tokens``.

    Raises:
        ProxyTuneError: for a gold answer that the members cannot read.
    """
    names = arm.model.expert_names
    check_fit(arm.model.steering)
    found, n_tokens = [], 0
    for job in plan.jobs["raw"]:
        if job.sample:
            continue
        encoded = arm.reader.encode(plan, job.context.rstrip())
        ids = gold_ids(arm.tokenizer, encoded, _gold_answer(plan.task, job.doc))
        members = arm.model.paired(read_gold(arm.model, encoded, ids))
        gold = torch.tensor(ids, device=members[0].device)
        found.append(curves(members, gold, names, arm.alphas, **arm.model.mixing()))
        n_tokens += len(ids)
    return {**fits(found, n_tokens, seed), "answers": len(found), "tokens": n_tokens}


def _gold_answer(task: Any, doc: Any) -> str:
    """An example's gold answer, with the white space that goes before it."""
    target = task.doc_to_target(doc)
    if isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    space: str = task.config.target_delimiter
    return f"{space}{target}"


def _write_results(
    out: Path,
    tasks: dict[str, Any],
    left_out: list[LeftOut],
    started: float,
    tables: Callable[[Mapping[str, Any]], list[Table]],
) -> dict[str, Any]:
    if left_out and not tasks:
        raise Unfinished(left_out[0]["reason"]) if left_out[0]["resumes"] else ProxyTuneError(left_out[0]["reason"])
    results = {"tasks": tasks, "left_out": left_out, "seconds": round(time.monotonic() - started, 1)}
    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_whole(out / "results.md", markdown(tables(results)))
    return results


# -- the plan -------------------------------------------------------------------------------------------------
def load_plans(options: EvaluationOptions) -> list[TaskPlan]:
    """Read the data; return the tasks with their requests."""
    about = {"seed": options.seed, **({} if options.data is None else {"data": str(options.data)})}
    with _quiet():
        manager = TaskManager(include_path=str(TASK_DIR), include_defaults=False, metadata=about)
        plans = []
        for name in options.tasks:
            task = manager.load([name])["tasks"][name]
            task.set_fewshot_seed(options.seed)
            repeats = task.config.repeats
            if options.samples is not None and repeats > 1:
                repeats = options.samples
            chosen: Sequence[int] = range(len(task.eval_docs))
            if options.limit is not None and options.limit < len(chosen):
                chosen = sorted(random.Random(options.seed).sample(chosen, options.limit))
            metadata = task.config.metadata or {}
            requests = {"raw": _requests(task, chosen, 0, repeats)}
            for context in ("few_shot", "many_shot"):
                shots = metadata.get(context, 0)
                if shots and len(task.fewshot_docs() or ()) >= shots:
                    requests[context] = _requests(task, chosen, shots, repeats)
            jobs = {context: jobs_of(of) for context, of in requests.items()}
            if field := metadata.get("own_examples"):
                jobs["own_examples"] = with_own_examples(jobs["raw"], field)
            likelihood = str(task.OUTPUT_TYPE) in ("multiple_choice", "loglikelihood")
            plans.append(TaskPlan(name, jobs, repeats, metadata, likelihood, task, _data_hash(requests["raw"])))
    return plans


def jobs_of(requests: Sequence[Instance]) -> list[Job]:
    """lm_eval's requests as jobs: equal requests are samples, continuations of one context are one job."""
    jobs: list[Job] = []
    seen: dict[str, int] = {}
    for request in requests:
        name, (context, asked) = str(request.doc["id"]), request.arguments
        scored = request.request_type == "loglikelihood"
        if scored and jobs and jobs[-1].id == name and jobs[-1].context == context:
            jobs[-1] = replace(jobs[-1], continuations=(*jobs[-1].continuations, asked))
            continue
        sample = seen[name] = seen.get(name, -1) + 1
        said: dict[str, Any] = {"continuations": (asked,)} if scored else {"options": asked}
        jobs.append(Job(name, sample, context, request.doc, **said))
    return jobs


def _requests(task: Any, chosen: Sequence[int], shots: int, repeats: int) -> list[Instance]:
    found: list[Instance] = []
    for index in chosen:
        document = task.eval_docs[index]
        context = task.fewshot_context(document, num_fewshot=shots)
        made = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, index, repeats))
        found += made if isinstance(made, list) else [made] * repeats
    return found


def _data_hash(requests: Sequence[Instance]) -> str:
    """A hash of the examples of the run, in order."""
    digest = hashlib.sha256()
    for instance in requests:
        digest.update(json.dumps([instance.doc, instance.arguments], sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm_eval's advice on options that we set ourselves, and the bars of datasets."""
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
    lacking = {arm: [plan.name for plan in plans if shots_of(arm) not in plan.jobs] for arm in ARMS}
    possible = [arm for arm in ARMS if len(lacking[arm]) < len(plans)]
    if options.arms is None:
        wanted = [arm for arm in possible if arm in DEFAULT_ARMS or shots_of(arm) != "raw"]
        if isinstance(config.base_member, ApiBase):
            for arm in (arm for arm in wanted if arm in MEANS):
                note(f"no {arm}: {impossible(arm, config)}")
        wanted = [arm for arm in wanted if impossible(arm, config) is None]
    else:
        wanted = list(options.arms)
        if none := [arm for arm in wanted if arm in ARMS and arm not in possible]:
            raise ProxyTuneError(
                f"there are no solved examples to show for {', '.join(lacking[none[0]])}; leave the arm {none[0]} out"
            )
    given = {
        "tuned": options.tuned,
        "weighted_mean": options.mean_weight,
        "steering_vector": options.steering_vector,
    }
    wanted += [arm for arm, value in given.items() if value is not None and arm not in wanted]
    if "tuned" in wanted:
        tuned_prompt(config)  # find out now, not after the other arms, that it is unknown
    for arm in wanted:
        if some := lacking.get(arm):
            note(f"no solved examples to show for {', '.join(some)}: no {arm} there")
    # The tuned model is last: everything else is released before it is loaded.
    return sorted(expand_arms(wanted, config), key=lambda arm: arm == "tuned")
