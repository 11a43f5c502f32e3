"""``proxytune bench``: what steering costs, measured in one run against the base alone and the plain loop.

The arms (``proxytune bench --help`` describes them) are all greedy or all sample. They have the same prompts and the
same number of new tokens. ``base_lookup`` takes part so that text which repeats itself does not count as our gain.

A *case* is a batch size, a prompt length and an output length. Its arms warm up and then take turns, in a new random
order in each round. Every round has prompts of its own, the same for all arms. Options of the members (dtype, packed
weights, compiled) are on for every arm or for none.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MinNewTokensLengthLogitsProcessor

from proxytune.answers.plain_loop import plain_loop
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.problems import make_problems
from proxytune.generation_mixin import SpeculationStats
from proxytune.model import ProxyTunedForCausalLM
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.layout import group_by_weights
from proxytune.recipe.members import Loading
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase
from proxytune.speed.options import MAIN, BenchOptions, Case, MemberOptions

__all__ = [
    "BenchResult",
    "Subject",
    "bench_recipe",
    "describe_machine",
    "load_subject",
    "problem_texts",
    "run_bench",
    "texts_of_file",
]

STEERED = ("plain_loop", "composite", "shared", "speculative", "traced")
ASKED: Mapping[str, Mapping[str, Any]] = {  # options of `generate` in arms that do not use its defaults
    "base_lookup": {"prompt_lookup_num_tokens": 10},  # transformers' own example
    "composite": {"speculate": False},
    "shared": {"speculate": False},
    "traced": {"return_trace": True},
}
WARM_UP = 8  # new tokens of a warm-up
NEAR_TIE = 1e-3  # another kernel may order float32 logits that are closer than this differently


# -- what comes out -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Agreement:
    """One steered row of tokens, compared with the reference (the plain loop, if it is measured).

    ``differs_at`` is the first new token that differs, None if all are the same. ``gap`` is the difference between the
    mixed logits of the two tokens there, ``near_tie`` whether rounding may decide between them.
    """

    arm: str
    reference: str
    options: str
    case: Case
    differs_at: int | None = None
    gap: float = 0.0
    near_tie: bool = False


@dataclass
class BenchResult:
    """All measurements; after an interruption those made before it.

    Attributes:
        rows: one arm in one case each, medians of its rounds. ``options`` is the members' dtype and what else is on in
            them, such as ``float32+pack``. Tokens per second count all rows over the whole call, including the prompt's
            forward. ``low`` and ``high`` are the slowest and the fastest round. Ratios are in tokens per second, within
            the same options: more is better. ``ratio_to_untraced``, of the arm traced, is the median over rounds of its
            speed by that of the arm speculative in the same round. ``acceptance`` is the share of drafts that were
            accepted of those compared with the mixture, ``speculation`` all :class:`SpeculationStats`, both over all
            rounds. ``peak_memory_bytes`` is as the machine's ``memory`` says.
        overheads: the cost of a decoding step of ``generate`` beyond its forwards: the median over rounds of (a step of
            ``generate``) / (the lanes' bare forwards on the same tokens and caches, without masks, mixing or choosing)
            - 1, and the median seconds of both.
    """

    machine: dict[str, Any]
    settings: BenchOptions
    rows: list[dict[str, Any]] = field(default_factory=list)
    overheads: list[dict[str, Any]] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def mismatches(self) -> list[Agreement]:
        """The steered rows that differ without a near tie as the reason."""
        return [one for one in self.agreements if one.differs_at is not None and not one.near_tie]

    def outputs(self) -> dict[str, Any]:
        """The number of compared steered rows, by result."""
        return {
            "compared": len(self.agreements),
            "identical": sum(one.differs_at is None for one in self.agreements),
            "near_ties": sum(one.near_tie for one in self.agreements),
            "mismatches": [asdict(one) for one in self.mismatches()],
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings.to_json(),
            "rows": self.rows,
            "overhead": self.overheads,
            "outputs": self.outputs(),
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
        }


# -- prompts --------------------------------------------------------------------------------------------------
Texts = Iterator[tuple[str, str]]  # endless: a text before another one, and at the end of a prompt


def problem_texts(seed: int) -> Texts:
    """The demo's held-out problems: solved, and as the demo asks them."""
    problems = itertools.cycle(make_problems("test", 2000, seed))
    return ((f"{problem.prompt}{problem.completion}\n\n", problem.prompt) for problem in problems)


def texts_of_file(path: Path) -> Texts:
    """The paragraphs of a text file, again and again."""
    try:
        paragraphs = [part.strip() for part in path.read_text("utf-8").split("\n\n") if part.strip()]
    except UnicodeDecodeError as error:
        raise ProxyTuneError(f"{path} is not a text in UTF-8") from error
    if not paragraphs:
        raise ProxyTuneError(f"{path} has no text")
    return ((f"{paragraph}\n\n", paragraph) for paragraph in itertools.cycle(paragraphs))


def prompts(texts: Texts, tokenizer: Any, case: Case) -> Tensor:
    """One batch of prompts of exactly ``case.prompt`` tokens, (n_batch, n_prompt).

    Each consists of as many consecutive texts as needed, cut on the left, after the tokenizer's first token.
    """
    bos = tokenizer.bos_token_id
    lead = [bos] if bos is not None and case.prompt > 1 and tokenizer("").input_ids[:1] == [bos] else []
    n_text = case.prompt - len(lead)
    rows = []
    for _ in range(case.batch):
        before, ids = "", list[int]()
        while len(ids) < n_text:
            text, ending = next(texts)
            ids = tokenizer(before + ending, add_special_tokens=False).input_ids
            before += text
        rows.append(lead + ids[len(ids) - n_text :])
    return torch.tensor(rows)


# -- the models -----------------------------------------------------------------------------------------------
@dataclass
class Subject:
    """A recipe in memory, with one set of member options.

    Attributes:
        options: their name in rows.
        separate: the recipe with separate weights for every adapter, for the arms base, plain_loop and composite.
        default: the recipe as it is loaded by default, for shared and speculative. It is the same object if no members
            can share weights.
    """

    options: str
    separate: ProxyTunedForCausalLM
    default: ProxyTunedForCausalLM

    def __post_init__(self) -> None:
        eos = self.default.generation_config.eos_token_id
        for model in (self.separate.base, self.separate, self.default):  # no other settings of the checkpoint
            model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)

    @property
    def shares(self) -> bool:
        return self.separate is not self.default

    @property
    def compiled(self) -> bool:
        return self.default.cache_implementation == "static"

    def asked(self, arm: str) -> Mapping[str, Any]:
        """The arguments of ``generate`` in an arm. If compiled, the base alone gets a static cache too."""
        return {**ASKED.get(arm, {}), **({"cache_implementation": "static"} if arm == "base" and self.compiled else {})}

    def model(self, arm: str) -> Any:
        if arm in ("base", "base_lookup"):
            return self.separate.base
        return self.default if arm in ("shared", "speculative", "traced") else self.separate


def load_subject(config: ProxyTuneConfig, options: MemberOptions, loading: LoadingOptions) -> Subject:
    """Load a recipe as often as the arms need it, but the base only once. ``loading`` gives the devices, and whether
    remote code may run."""
    if isinstance(config.base_member, ApiBase):
        raise ProxyTuneError("bench measures models on this machine, and the base of this recipe is behind an API")
    loading = replace(loading, dtype=options.dtype or "auto", pack=options.pack)
    wanted = {**loading.of_model(), "compile": options.compile}
    separate = ProxyTunedForCausalLM.from_pretrained(str(config.name_or_path), config=config, share=False, **wanted)
    default = separate
    groups, _ = group_by_weights(config, list(config.members()), Loading())
    if len(groups) < len(separate.lanes):
        alone = any([name for name, _ in group] == ["base"] for group in groups)
        default = ProxyTunedForCausalLM._load(
            config, {"base": separate.base} if alone else {}, separate.tokenizer, {}, wanted
        )
    dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in _dtypes(separate))
    return Subject(str(replace(options, dtype="/".join(dtypes))), separate, default)


def _dtypes(model: Any) -> list[torch.dtype]:
    return [lane.model.dtype for lane in model.lanes]


# -- one run of one arm ---------------------------------------------------------------------------------------
@dataclass
class Sample:
    """One run.

    Attributes:
        seconds: the time of the whole call. first: the time until the first token can be chosen.
        tokens: the new tokens, (n_batch, n_new).
        memory: the peak number of bytes.
        stats: drafts of the speculative arm.
        forwards: seconds per step of the bare forwards on its tokens, if they were timed.
    """

    seconds: float
    first: float
    tokens: Tensor
    memory: int
    stats: SpeculationStats | None = None
    forwards: float | None = None

    @property
    def step(self) -> float:
        """Seconds of a step after the first token."""
        return (self.seconds - self.first) / max(self.tokens.shape[1] - 1, 1)


@contextmanager
def _first_forwards(modules: Iterable[nn.Module], device: torch.device) -> Iterator[list[float]]:
    """Records the time when each of ``modules`` has run once. Then the first token can be chosen.

    A stopping criterion or a streamer could see the token itself, but would prevent drafts for a batch.
    """
    waiting, at = set(modules), list[float]()

    def ran(module: nn.Module, *given: Any) -> None:
        waiting.discard(module)
        if not waiting and not at:
            at.append(now(device))

    with ExitStack() as stack:
        for module in tuple(waiting):
            stack.callback(module.register_forward_hook(ran).remove)
        yield at


def run_arm(subject: Subject, arm: str, ids: Tensor, n_new: int, asked: Mapping[str, Any] | None = None) -> Sample:
    """Continue ``ids``, shape = (n_batch, n_prompt), by ``n_new`` tokens. ``asked`` are further arguments of
    ``generate``."""
    model: Any = subject.model(arm)
    plain, ids = arm == "plain_loop", ids.to(model.device)
    wanted = {"do_sample": False, **subject.asked(arm), **(asked or {}), "min_new_tokens": n_new}
    wanted |= {"max_new_tokens": n_new, "attention_mask": torch.ones_like(ids)}
    parts = [lane.model for lane in model.lanes] if plain else [model]  # no quick head for drafts in the plain loop
    memory, others = tensor_bytes(module for part in parts for module in part.modules()), 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
        others = torch.cuda.memory_allocated(ids.device)
    with _first_forwards([model.member(name) for name in model.seats] if plain else [model], ids.device) as first:
        begin = now(ids.device)
        if plain:
            sequences, caches = _plain(model, ids, n_new, wanted.get("temperature"))
        elif isinstance(model, ProxyTunedForCausalLM):
            # A batch that returns its cache cannot have drafts, so we catch the cache where it is made.
            with _caches_of(model) as caches:
                output = model.generate(ids, **_own_prompts(model, ids), **wanted)
            sequences = output.sequences if arm == "traced" else output
        else:
            output = model.generate(ids, return_dict_in_generate=True, **wanted)
            sequences, caches = output.sequences, [output.past_key_values]
        end = now(ids.device)
    if ids.is_cuda:
        memory += torch.cuda.max_memory_allocated(ids.device) - others
    else:
        memory += tensor_bytes(layer for cache in caches for layer in cache.layers)
    stats = model.speculation_stats if arm == "speculative" else None
    return Sample(end - begin, first[0] - begin, sequences[:, ids.shape[1] :].cpu(), memory, stats)


def _plain(model: ProxyTunedForCausalLM, ids: Tensor, n_new: int, temperature: float | None) -> Any:
    def side(name: str) -> Any:
        return model.member(name) if name in model.seats else None

    eos = model.generation_config.eos_token_id
    processors = LogitsProcessorList()
    if eos is not None:
        processors.append(MinNewTokensLengthLogitsProcessor(ids.shape[1], n_new, eos, device=str(ids.device)))
    return plain_loop(
        model.base,
        [(side(f"{one.name}.expert"), side(f"{one.name}.anti_expert"), one.alpha) for one in model.experts],
        ids,
        n_new,
        **vars(model.steering),
        plausibility=model.config.plausibility,
        logits_processor=processors,
        temperature=temperature,
    )


@contextmanager
def _caches_of(model: ProxyTunedForCausalLM) -> Iterator[list[Any]]:
    """Collect the caches that a composite makes inside it."""
    made: list[Any] = []
    make = model.new_cache

    def noted(capacity: int | None = None) -> Any:
        made.append(make(capacity))
        return made[-1]

    model.new_cache = noted  # type: ignore[method-assign]
    try:
        yield made
    finally:
        del model.new_cache


def _own_prompts(model: ProxyTunedForCausalLM, ids: Tensor) -> dict[str, Any]:
    """Let members with prompts of their own read the same tokens as the base, so that the lengths are right."""
    names = [name for name, member in model.config.members() if member.prompt.kind != "raw"]
    return {"member_input_ids": dict.fromkeys(names, ids)} if names else {}


def tensor_bytes(holders: Iterable[Any]) -> int:
    """The bytes of the tensors in modules or layers of caches; each storage counts once."""
    storages = {}
    for holder in holders:
        tensors = [*vars(holder).values()]  # packed weights are neither parameters nor buffers
        if isinstance(holder, nn.Module):
            tensors += [*holder.parameters(recurse=False), *holder.buffers(recurse=False)]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif isinstance(tensor, Tensor):  # oneDNN's own layout, which shows no storage
                storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def bare_forwards(subject: Subject, arm: str, ids: Tensor, tokens: Tensor) -> float:
    """Seconds per step of only the arm's forwards, each lane with a cache of its own, on the prompt ``ids``, (n_batch,
    n_prompt), and on the new ``tokens`` of a run, (n_batch, n_new), except the last one."""
    alone = arm == "base"
    model: Any = subject.separate if alone else subject.model(arm)
    lanes = [model.lanes[model.seats["base"][0]]] if alone else model.lanes
    read = [(lane, 1 if alone else len(lane.seats), DynamicCache(config=lane.config)) for lane in lanes]

    def step(columns: Tensor) -> None:
        for lane, seats, cache in read:
            rows = columns.repeat(seats, 1).to(lane.device)
            lane(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)

    ids = ids.to(model.device)
    step(ids)
    columns = tokens[:, :-1].to(ids.device).split(1, dim=1)
    begin = now(ids.device)
    for column in columns:
        step(column)
    return (now(ids.device) - begin) / len(columns)


# -- are the outputs the same? --------------------------------------------------------------------------------
def compare_tokens(subject: Subject, case: Case, ids: Tensor, found: Mapping[str, Tensor]) -> list[Agreement]:
    """Compare each steered arm's tokens, (n_batch, n_new), with those of the first arm, row by row."""
    arms = [arm for arm in STEERED if arm in found]
    agreements = []
    for arm in arms[1:]:
        for row, (ours, theirs) in enumerate(zip(found[arm], found[arms[0]])):
            one = Agreement(arm, arms[0], subject.options, case)
            if len(differing := (ours != theirs).nonzero()):
                at = int(differing[0])
                prefix = torch.cat([ids[row], theirs[:at]])[None]
                gap, top = _gap(subject.separate, prefix, int(ours[at]), int(theirs[at]))
                coarsest = max(torch.finfo(dtype).eps for dtype in _dtypes(subject.separate))
                tie = max(NEAR_TIE, 4 * coarsest * top if coarsest > 1e-6 else 0.0)
                one = replace(one, differs_at=at, gap=gap, near_tie=gap <= tie)
            agreements.append(one)
    return agreements


def _gap(model: ProxyTunedForCausalLM, prefix: Tensor, ours: int, theirs: int) -> tuple[float, float]:
    """The difference of the mixed logits of two tokens after ``prefix``, (1, n_columns), and the larger magnitude."""
    prefix = prefix.to(model.device)
    own = _own_prompts(model, prefix)
    if own:
        own["prompt_length"] = prefix.shape[1]
    with torch.no_grad():
        logits = model(prefix, logits_to_keep=1, **own).logits[0, -1]
    pair = logits[[ours, theirs]].float()
    return float(abs(pair[0] - pair[1])), float(pair.abs().max())


# -- the whole ------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """One arm of a subject in one case: the expected seconds per round, and the rounds."""

    case: Case
    arm: str
    subject: Subject
    round_seconds: float
    samples: list[Sample] = field(default_factory=list)

    @property
    def named(self) -> dict[str, Any]:
        return {"arm": self.arm, "options": self.subject.options, **asdict(self.case)}

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.case.batch * self.case.output / sample.seconds for sample in self.samples]


def bench_recipe(
    config: ProxyTuneConfig, options: BenchOptions, loading: LoadingOptions, *, progress: Callable[[str, float], None]
) -> BenchResult:
    """Load the recipe with each set of member options, and measure; see :func:`run_bench`."""
    texts = problem_texts(options.seed) if options.prompts is None else texts_of_file(options.prompts)
    subjects = []
    for members in options.members:
        progress(f"loading, {members.dtype or 'auto'}", 0.0)
        subjects.append(load_subject(config, members, loading))
    return run_bench(subjects, options, texts, progress=progress)


def run_bench(
    subjects: Sequence[Subject],
    settings: BenchOptions,
    texts: Texts,
    *,
    tokenizer: Any = None,
    compare: bool = True,
    progress: Callable[[str, float], None] = lambda said, share: None,
) -> BenchResult:
    """Measure every case. An interruption (KeyboardInterrupt) ends it and keeps what was measured so far.

    Args:
        subjects: the recipe with each set of member options.
        texts: the source of prompts. tokenizer: encodes them; by default the base's.
        compare: whether to check that the steered arms write the same tokens (never done for samples).
        progress: called with the current activity, and the share of all work that is done.
    """
    model = subjects[0].separate
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer, so prompts cannot be made")
    cases, limit = settings.cases(), model.context_of(model.shortest)
    for case in cases:
        if limit is not None and (needed := case.prompt + case.output) > limit:
            raise ProxyTuneError(
                f"{case.lengths} needs {needed} tokens, but member {model.shortest!r} can read only {limit}"
            )
    result = BenchResult(describe_machine(model.device), settings)
    if "shared" in settings.arms and not any(subject.shares for subject in subjects):
        result.notes.append("no members share weights, so there is no arm `shared`: it would be `composite`")
    if "base_lookup" in settings.arms and max(settings.batches) > 1:
        result.notes.append("`base_lookup` is measured at batch 1 only: transformers does prompt lookup for one row")
    if "base_lookup" in settings.arms and any(subject.compiled for subject in subjects):
        result.notes.append("`base_lookup` is not measured compiled: transformers cannot draft with a static cache")
    rng = random.Random(settings.seed)
    begin = time.perf_counter()
    largest, warmed = 1, 0.0  # the largest number of prompt tokens in a batch so far, and the seconds of its warm-up
    progress(f"{cases[0]}: prompts", 0.0)
    share = _Share(settings.budget, len(cases), begin)
    try:
        for index, case in enumerate(cases):
            seconds = None
            if settings.budget is not None and (case.lengths, case.batch) != MAIN:
                # The cheap cases come first, and leave the time that they do not need to the expensive ones.
                seconds = max(settings.budget - (time.perf_counter() - begin), 0.0) / (len(cases) - index)
                if warmed * max(case.batch * case.prompt / largest, 1.0) > seconds:
                    result.notes.append(f"{case} is left out: the budget of {settings.budget:.0f} s is used up")
                    continue
            took = _measure_case(
                result, subjects, case, partial(prompts, texts, tokenizer, case), rng,
                seconds=seconds,
                with_overhead=index == 0 and case.output > 1,
                compare=compare and settings.temperature is None,
                progress=lambda said, part, index=index, case=case: progress(  # type: ignore[misc]
                    f"{case}: {said}", share.done(index, part, main=(case.lengths, case.batch) == MAIN)
                ),
            )  # fmt: skip
            if case.batch * case.prompt >= largest:
                largest, warmed = case.batch * case.prompt, took
    except KeyboardInterrupt:
        result.interrupted = True
        result.notes.append("interrupted: what was measured until then is shown")
    result.seconds = time.perf_counter() - begin
    return result


@dataclass
class _Share:
    """The finished share of a bench: of its cases, or of its time limit, whichever is larger.

    Attributes:
        budget: seconds for all cases; None is no limit. n_cases: the number of cases.
        begin: the start of the first case, by the clock. warmed: the last time that a case was warming up.
    """

    budget: float | None
    n_cases: int
    begin: float
    warmed: float = 0.0

    def done(self, index: int, part: float, *, main: bool) -> float:
        """Report that ``part`` of the case ``index`` is done."""
        now, share = time.perf_counter(), (index + part) / self.n_cases
        if part == 0:
            self.warmed = now
        if self.budget is None:
            return share
        end = self.begin + self.budget
        if main and part:  # the main case ignores the budget
            end = max(end, self.warmed + (now - self.warmed) / part)
        return max(share, min((now - self.begin) / (end - self.begin), 1.0))


def _measure_case(
    result: BenchResult,
    subjects: Sequence[Subject],
    case: Case,
    draw: Callable[[], Tensor],
    rng: random.Random,
    *,
    seconds: float | None,
    with_overhead: bool,
    compare: bool,
    progress: Callable[[str, float], None],
) -> float:
    """Measure one case into ``result``, with as many rounds as ``seconds`` allow; return the seconds of its warm-up."""
    settings, begin, ids = result.settings, time.perf_counter(), draw()
    runs = []
    for subject, arm in itertools.product(subjects, settings.arms):
        if arm == "shared" and not subject.shares:
            continue
        if arm == "base_lookup" and (case.batch > 1 or subject.compiled):
            continue
        progress(f"warm-up, {arm}", 0.0)
        if subject.compiled:  # enough tokens to meet all shapes: some compile for minutes
            run_arm(subject, arm, ids, case.output, settings.asked(arm))
        warm = run_arm(subject, arm, ids, min(case.output, WARM_UP), settings.asked(arm))
        runs.append(Run(case, arm, subject, warm.first + warm.step * (case.output - 1)))
    warmed = time.perf_counter() - begin
    runs, repeats = _cut(result, case, runs, None if seconds is None else seconds - warmed)
    try:
        for number in range(repeats):
            ids = draw()
            for turn, run in enumerate(rng.sample(runs, len(runs))):
                progress(f"round {number + 1} of {repeats}, {run.arm}", (number + turn / len(runs)) / repeats)
                torch.manual_seed(1000 * settings.seed + number)
                sample = run_arm(run.subject, run.arm, ids, case.output, settings.asked(run.arm))
                run.samples.append(sample)
                if with_overhead and not run.subject.compiled and run.arm in ("base", "composite", "shared"):
                    sample.forwards = bare_forwards(run.subject, run.arm, ids, sample.tokens)
            for subject in subjects if compare else ():
                found = {run.arm: run.samples[-1].tokens for run in runs if run.subject is subject}
                result.agreements += compare_tokens(subject, case, ids, found)
    finally:  # results before an interruption are reported too
        runs = [run for run in runs if run.samples]
        result.rows += _rows(runs)
        result.overheads += _overheads(runs)
    return warmed


def _cut(result: BenchResult, case: Case, runs: list[Run], seconds: float | None) -> tuple[list[Run], int]:
    """The part of a case that fits ``seconds``: all rounds, or only those of the last set of options, or fewer of
    these."""
    costs: dict[str, float] = defaultdict(float)  # options -> seconds of a round of their arms
    for run in runs:
        costs[run.subject.options] += run.round_seconds
    repeats = result.settings.repeats
    if seconds is None or repeats * sum(costs.values()) <= seconds:
        return runs, repeats
    *dropped, last = costs
    fitting = min(int(max(seconds, 0) / costs[last]), repeats)
    said = "is left out" if fitting == 0 else f"has {fitting} of {repeats} rounds"
    if dropped and fitting:
        said += f", of {last} alone"
    each = ", ".join(f"{name} {cost:.0f} s" for name, cost in costs.items())
    result.notes.append(f"{case} {said}: the budget is short (a round takes {each})")
    return [run for run in runs if run.subject.options == last], fitting


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    medians = {(run.arm, run.subject.options): statistics.median(run.speeds) for run in runs}
    untraced = {run.subject.options: run.speeds for run in runs if run.arm == "speculative"}
    rows = []
    for run in runs:
        median, base, plain = (medians.get((arm, run.subject.options)) for arm in (run.arm, "base", "plain_loop"))
        assert median is not None
        pairs = zip(run.speeds, untraced.get(run.subject.options, ()) if run.arm == "traced" else ())
        ratios = [speed / before for speed, before in pairs]
        stats = [asdict(sample.stats) for sample in run.samples if sample.stats is not None]
        total = SpeculationStats(**{name: sum(one[name] for one in stats) for name in stats[0]}) if stats else None
        rows.append(
            {
                **run.named,
                "tokens_per_second": median,
                "tokens_per_second_low": min(run.speeds),
                "tokens_per_second_high": max(run.speeds),
                "ratio_to_base": None if base is None else median / base,
                "ratio_to_plain_loop": None if plain is None else median / plain,
                "ratio_to_untraced": statistics.median(ratios) if ratios else None,
                "acceptance": None if total is None else total.acceptance,
                "speculation": None if total is None else asdict(total),
                "peak_memory_bytes": max(sample.memory for sample in run.samples),
                "time_to_first_token_s": statistics.median(sample.first for sample in run.samples),
                "repeats": len(run.samples),
            }
        )
    return rows


def _overheads(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        steps = [(sample.step, sample.forwards) for sample in run.samples if sample.forwards is not None]
        if steps:
            figures = {
                "step_seconds": statistics.median(step for step, _ in steps),
                "forwards_seconds": statistics.median(forwards for _, forwards in steps),
                "overhead": statistics.median(step / forwards for step, forwards in steps) - 1,
            }
            found.append({**run.named, **figures, "repeats": len(steps)})
    return found


def describe_machine(device: torch.device) -> dict[str, Any]:
    """A description of the machine, and what the column memory means."""
    found = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "device": device.type,
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memory": "weights and caches of the arm, counted from its tensors (without activations)",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["memory"] = "weights of the arm and the most that its run allocated on the GPU beyond them"
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
