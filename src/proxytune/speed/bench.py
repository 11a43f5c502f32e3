"""``proxytune bench``: what steering costs, measured in one run against the base alone and the plain loop.

The arms, all greedy (or all sampling), all with the same prompts and the same number of new tokens:

    base          transformers' own ``generate`` of the base alone
    base_lookup   the same with prompt-lookup drafts (batch 1: transformers has no more), so that text which repeats
                  itself does not count as a gain of ours
    plain_loop    the reference implementation's loop: three models, three forwards a token
    composite     the recipe without sharing and without speculation
    shared        the recipe with members of one set of weights in one forward, without speculation
    speculative   the recipe as it is loaded by default, ``speculate="auto"`` unless a number of drafts is asked for

A *case* is a batch size, a prompt length and an output length. Its arms take turns, round by round, in an order that
is drawn anew, after each has run once to warm up; every round has prompts of its own, the same for all arms. What is
told is the median of the rounds. Options of the members (dtype, packed weights, compiled) are on for every arm or for
none.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
)

from proxytune.answers.plain_loop import plain_loop
from proxytune.errors import ProxyTuneError
from proxytune.generate import SpeculationStats
from proxytune.lanes.transformers import TransformersLane
from proxytune.model import ProxyTunedForCausalLM
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.layout import group_by_weights
from proxytune.recipe.members import Loading
from proxytune.recipe.options import LoadingOptions
from proxytune.speed.options import MAIN, BenchOptions, Case, MemberOptions

__all__ = [
    "BenchResult",
    "Overhead",
    "Row",
    "Subject",
    "bench_recipe",
    "describe_machine",
    "load_subject",
    "problem_texts",
    "run_bench",
    "texts_of_file",
]

STEERED = ("plain_loop", "composite", "shared", "speculative")
ASKED: Mapping[str, Mapping[str, Any]] = {  # what `generate` is asked in each arm that it runs
    "base": {},
    "base_lookup": {"prompt_lookup_num_tokens": 10},  # transformers' own example
    "composite": {"speculate": False},
    "shared": {"speculate": False},
    "speculative": {},
}
WARM_UP = 8  # new tokens of a warm-up
NEAR_TIE = 1e-3  # float32 logits closer than this may be ordered either way by another kernel


# -- what comes out -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """One arm in one case: medians of its rounds.

    Attributes:
        options: the members' dtype and what else is on in them, such as ``float32+pack``.
        tokens_per_second: new tokens of all rows a second of the whole call, the prompt's forward included;
            ``tokens_per_second_low`` and ``_high`` are the slowest and the fastest round.
        ratio_to_base, ratio_to_plain_loop: in tokens a second, within the same options; more is better.
        acceptance: drafts accepted of those held against the mixture, over all rounds; None where there were none.
        speculation: of the arm ``speculative``: its :class:`SpeculationStats`, over all rounds.
        peak_memory_bytes: see ``memory`` of the machine.
        time_to_first_token_s: until the first new token can be chosen.
    """

    arm: str
    options: str
    batch: int
    prompt: int
    output: int
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    ratio_to_base: float | None
    ratio_to_plain_loop: float | None
    acceptance: float | None
    speculation: dict[str, int] | None
    peak_memory_bytes: int
    time_to_first_token_s: float
    repeats: int


@dataclass(frozen=True)
class Overhead:
    """What a decoding step of ``generate`` costs beyond the forwards in it.

    ``overhead`` is the median over rounds of (a step of ``generate``) / (the lanes' bare forwards on the same tokens
    and caches, without masks, mixing or choosing) - 1; the seconds are medians too.
    """

    arm: str
    options: str
    batch: int
    prompt: int
    output: int
    step_seconds: float
    forwards_seconds: float
    overhead: float
    repeats: int


@dataclass(frozen=True)
class Agreement:
    """One steered row of tokens held against the reference's (the plain loop's, where it is measured).

    ``differs_at`` is the first new token that differs, None where all are the same; ``gap`` the difference there of
    the mixed logits of the two tokens chosen, ``near_tie`` whether rounding may decide between them.
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
    """All that was measured, also where it was interrupted."""

    machine: dict[str, Any]
    settings: BenchOptions
    rows: list[Row] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def mismatches(self) -> list[Agreement]:
        """The steered rows that differ where no near tie explains it."""
        return [one for one in self.agreements if one.differs_at is not None and not one.near_tie]

    def outputs(self) -> dict[str, Any]:
        """The count of steered rows that were compared, and how they came out."""
        return {
            "compared": len(self.agreements),
            "identical": sum(one.differs_at is None for one in self.agreements),
            "near_ties": sum(one.near_tie for one in self.agreements),
            "mismatches": [asdict(one) for one in self.mismatches()],
        }

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "machine": self.machine,
            "settings": self.settings.to_json(),
            "rows": [asdict(row) for row in self.rows],
            "overhead": [asdict(row) for row in self.overheads],
            "outputs": self.outputs(),
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
        }


# -- prompts --------------------------------------------------------------------------------------------------
Texts = Iterator[tuple[str, str]]  # endless: a text, as it stands before another one, and as the end of a prompt


def problem_texts(seed: int) -> Texts:
    """The demo's held-out problems: solved, and as the demo asks them."""
    from proxytune.evaluation.problems import make_problems

    problems = make_problems("test", 2000, seed)
    while True:
        for problem in problems:
            yield f"{problem.prompt}{problem.completion}\n\n", problem.prompt


def texts_of_file(path: Path) -> Texts:
    """The paragraphs of a text file, again and again.

    Raises:
        ProxyTuneError: for a file without text, or in another encoding than UTF-8.
    """
    try:
        paragraphs = [part.strip() for part in path.read_text("utf-8").split("\n\n") if part.strip()]
    except UnicodeDecodeError as error:
        raise ProxyTuneError(f"{path} is not a text in UTF-8") from error
    if not paragraphs:
        raise ProxyTuneError(f"{path} has no text")
    return ((f"{paragraph}\n\n", paragraph) for paragraph in itertools.cycle(paragraphs))


def prompts(texts: Texts, tokenizer: Any, case: Case) -> Tensor:
    """One batch of prompts of exactly ``case.prompt`` tokens, (n_batch, n_prompt).

    Each is as many consecutive texts as it takes, cut at the left, behind the token that the tokenizer begins with.
    """
    bos = tokenizer.bos_token_id
    lead = [bos] if bos is not None and case.prompt > 1 and tokenizer("").input_ids[:1] == [bos] else []
    n_text = case.prompt - len(lead)
    rows = []
    for _ in range(case.batch):
        before: str = ""
        ids: list[int] = []
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
        options: as rows name them.
        separate: the recipe with weights of its own for every adapter: the arms base, plain_loop and composite.
        default: the recipe as it is loaded by default: shared and speculative. The same object where no members
            could share.
    """

    options: str
    separate: ProxyTunedForCausalLM
    default: ProxyTunedForCausalLM

    def __post_init__(self) -> None:
        eos = self.default.generation_config.eos_token_id
        for model in (self.separate.base, self.separate, self.default):  # what else a checkpoint sets is no arm's
            model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)

    @property
    def shares(self) -> bool:
        return self.separate is not self.default

    @property
    def compiled(self) -> bool:
        return self.default.cache_implementation == "static"

    def asked(self, arm: str) -> Mapping[str, Any]:
        """What ``generate`` is asked in an arm. Compiled, the base alone gets a static cache too."""
        return {**ASKED[arm], **({"cache_implementation": "static"} if arm == "base" and self.compiled else {})}

    def model(self, arm: str) -> Any:
        """The model that an arm runs."""
        if arm in ("base", "base_lookup"):
            return self.separate.base
        return self.default if arm in ("shared", "speculative") else self.separate


def load_subject(config: ProxyTuneConfig, options: MemberOptions, loading: LoadingOptions) -> Subject:
    """Load a recipe as often as the arms need it, the base once.

    Args:
        config: the recipe.
        options: of all members.
        loading: its ``device_map`` and ``trust_remote_code``.
    """
    wanted = {
        "dtype": options.dtype or "auto",
        "pack": options.pack,
        "compile": options.compile,
        "device_map": loading.device_map,
        "member_trust_remote_code": loading.trust_remote_code,
    }
    separate = ProxyTunedForCausalLM.from_pretrained(str(config.name_or_path), config=config, share=False, **wanted)
    default = separate
    groups, _ = group_by_weights(config, list(config.members()), Loading())
    if len(groups) < len(separate.lanes):
        alone = any([name for name, _ in group] == ["base"] for group in groups)
        default = ProxyTunedForCausalLM._load(
            config, {"base": separate.base} if alone else {}, separate.tokenizer, {}, dict(wanted)
        )
    dtypes = dict.fromkeys(str(lane.model.dtype).removeprefix("torch.") for lane in _lanes(separate))
    named = "/".join(dtypes) + ("+pack" if options.pack else "") + ("+compile" if options.compile else "")
    return Subject(named, separate, default)


def _lanes(model: ProxyTunedForCausalLM) -> Sequence[TransformersLane]:
    return cast(Sequence[TransformersLane], model.lanes)


# -- one run of one arm ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One run: seconds of the whole call and until the first token, new tokens (n_batch, n_new), what it held."""

    seconds: float
    first: float
    tokens: Tensor
    memory: int
    stats: SpeculationStats | None = None  # in the speculative arm


class _FirstForwards:
    """Within it, notes when each of ``modules`` has run once: what is left to do for the first token is to choose it.

    A stopping criterion or a streamer would see the token itself, and keep ``generate`` from drafting for a batch.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.waiting = dict.fromkeys(modules)
        self.device = device
        self.at: float | None = None

    def __enter__(self) -> _FirstForwards:
        self.hooks = [module.register_forward_hook(self._ran) for module in self.waiting]
        return self

    def __exit__(self, *raised: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _ran(self, module: torch.nn.Module, *given: Any) -> None:
        self.waiting.pop(module, None)
        if not self.waiting and self.at is None:
            self.at = now(self.device)


def run_arm(subject: Subject, arm: str, ids: Tensor, n_new: int, asked: Mapping[str, Any] | None = None) -> Sample:
    """Continue ``ids``, shape = (n_batch, n_prompt), by ``n_new`` tokens; ``asked`` of ``generate`` besides what the
    arm asks."""
    asked = asked or {}
    model: Any = subject.model(arm)
    ids = ids.to(model.device)
    own: dict[str, Any] = _own_prompts(model, ids) if isinstance(model, ProxyTunedForCausalLM) else {}
    run = [model.member(name) for name in model.seats] if arm == "plain_loop" else [model]
    held = _held(subject, arm, ids.device)
    with _FirstForwards(run, ids.device) as first:
        begin = now(ids.device)
        if arm == "plain_loop":
            sequences, caches = _plain(model, ids, n_new, asked.get("temperature"))
        else:
            # A batch that is to return its cache could not be drafted for, so ours is caught where it is made.
            returned = not isinstance(model, ProxyTunedForCausalLM)
            with _caches_of(model) as caches:
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=n_new,
                    max_new_tokens=n_new,
                    return_dict_in_generate=returned,
                    **own,
                    **{"do_sample": False, **subject.asked(arm), **asked},
                )
            sequences, caches = (output.sequences, [output.past_key_values]) if returned else (output, caches)
        end = now(ids.device)
    assert first.at is not None
    return Sample(
        seconds=end - begin,
        first=first.at - begin,
        tokens=sequences[:, ids.shape[1] :].cpu(),
        memory=held(caches),
        stats=model.speculation_stats if arm == "speculative" else None,
    )


def _plain(model: ProxyTunedForCausalLM, ids: Tensor, n_new: int, temperature: float | None) -> Any:
    def side(name: str) -> Any:
        return model.member(name) if name in model.seats else None

    eos = model.generation_config.eos_token_id
    processors = LogitsProcessorList()
    if eos is not None:
        eos = eos if isinstance(eos, list) else [eos]
        processors.append(MinNewTokensLengthLogitsProcessor(ids.shape[1], n_new, eos, device=str(ids.device)))
    return plain_loop(
        model.base,
        [(side(f"{one.name}.expert"), side(f"{one.name}.anti_expert"), one.alpha) for one in model.experts],
        ids,
        n_new,
        plausibility=model.config.plausibility,
        logits_processor=processors,
        temperature=temperature,
    )


@contextmanager
def _caches_of(model: Any) -> Iterator[list[Any]]:
    """The caches that a composite makes within it; none of any other model."""
    made: list[Any] = []
    if not isinstance(model, ProxyTunedForCausalLM):
        yield made
        return
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
    """Members with prompts of their own read the same tokens as the base, so that lengths are what they are said."""
    if not any(model.own_prompts):
        return {}
    names = [name for name, member in model.config.members() if member.prompt.kind != "raw"]
    return {"member_input_ids": dict.fromkeys(names, ids)}


def _held(subject: Subject, arm: str, device: torch.device) -> Callable[[Sequence[Any]], int]:
    """A function that says, after the run and given its caches, the bytes that the arm held at most."""
    model = subject.model(arm)
    parts = [lane.model for lane in _lanes(model)] if arm == "plain_loop" else [model]  # no quick head for drafts there
    weights = _bytes(tensor for part in parts for module in part.modules() for tensor in _tensors(module))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device)
        return lambda caches: weights + torch.cuda.max_memory_allocated(device) - others
    return lambda caches: (
        weights + _bytes(tensor for cache in caches for layer in cache.layers for tensor in vars(layer).values())
    )


def _tensors(module: torch.nn.Module) -> Iterator[Any]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from vars(module).values()  # packed weights are neither


def _bytes(tensors: Iterator[Any]) -> int:
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(tensor, Tensor):  # oneDNN's own layout, which shows no storage
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- the forwards alone ---------------------------------------------------------------------------------------
@torch.no_grad()
def bare_forwards(lanes: Sequence[Any], n_seats: Sequence[int], ids: Tensor, tokens: Tensor) -> float:
    """Seconds a step of the lanes' forwards alone, on the tokens that a run gave, each with a cache of its own.

    Args:
        n_seats: how often each lane has every row.
        ids: the prompt, (n_batch, n_prompt). tokens: the new tokens, (n_batch, n_new), all but the last are read.
    """
    caches = [DynamicCache(config=lane.config) for lane in lanes]

    def step(columns: Tensor) -> None:
        for lane, seats, cache in zip(lanes, n_seats, caches):
            rows = columns.repeat(seats, 1) if seats > 1 else columns
            lane(input_ids=rows.to(lane.device), past_key_values=cache, use_cache=True, logits_to_keep=1)

    step(ids)
    columns = tokens[:, :-1].to(ids.device).split(1, dim=1)
    begin = now(ids.device)
    for column in columns:
        step(column)
    return (now(ids.device) - begin) / len(columns)


def overhead_of(subject: Subject, arm: str, ids: Tensor, sample: Sample) -> tuple[float, float]:
    """Seconds of a decoding step of the run, and of the bare forwards in it."""
    model: Any = subject.separate if arm == "base" else subject.model(arm)
    lanes = [model.lanes[model.seats["base"][0]]] if arm == "base" else list(model.lanes)
    seats = [1 if arm == "base" else len(lane.seats) for lane in lanes]
    step = (sample.seconds - sample.first) / (sample.tokens.shape[1] - 1)
    return step, bare_forwards(lanes, seats, ids.to(lanes[0].device), sample.tokens)


# -- are the outputs the same? --------------------------------------------------------------------------------
def compare_tokens(subject: Subject, case: Case, ids: Tensor, found: Mapping[str, Tensor]) -> list[Agreement]:
    """Hold each steered arm's tokens, (n_batch, n_new), against the first one's, row by row."""
    arms = [arm for arm in STEERED if arm in found]
    agreements = []
    for arm in arms[1:]:
        for row, (ours, theirs) in enumerate(zip(found[arm], found[arms[0]])):
            one = Agreement(arm, arms[0], subject.options, case)
            if len(differing := (ours != theirs).nonzero()):
                at = int(differing[0])
                prefix = torch.cat([ids[row], theirs[:at]])[None]
                gap, top = _gap(subject.separate, prefix, int(ours[at]), int(theirs[at]))
                coarsest = max(torch.finfo(lane.model.dtype).eps for lane in _lanes(subject.separate))
                tie = max(NEAR_TIE, 4 * coarsest * top if coarsest > 1e-6 else 0.0)
                one = replace(one, differs_at=at, gap=gap, near_tie=gap <= tie)
            agreements.append(one)
    return agreements


def _gap(model: ProxyTunedForCausalLM, prefix: Tensor, ours: int, theirs: int) -> tuple[float, float]:
    """How far apart the mixed logits of two tokens are after ``prefix``, (1, n_columns); and the greater magnitude."""
    prefix = prefix.to(model.device)
    own = _own_prompts(model, prefix)
    if own:
        own["prompt_length"] = prefix.shape[1]
    with torch.no_grad():
        logits = model(prefix, logits_to_keep=1, **own).logits[0, -1]
    pair = logits[[ours, theirs]].float()
    return float(abs(pair[0] - pair[1])), float(pair.abs().max())


# -- the whole ------------------------------------------------------------------------------------------------
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
    """Measure every case; an interruption (KeyboardInterrupt) ends it with what was measured so far.

    Args:
        subjects: the recipe with each set of member options.
        texts: where prompts come from. tokenizer: makes tokens of them; the base's by default.
        compare: whether the steered arms must write the same tokens (never asked of samples).
        progress: told what is being done, and the share of the whole that is done.

    Raises:
        PromptError, ProxyTuneError: before anything is measured, where a case does not fit the members' contexts.
    """
    tokenizer = tokenizer or subjects[0].separate.tokenizer
    if tokenizer is None:
        raise ProxyTuneError("neither the recipe nor its base has a tokenizer, so prompts cannot be made")
    cases = settings.cases()
    for case in cases:
        _refuse_too_long(subjects[0].separate, case)
    result = BenchResult(describe_machine(subjects[0].separate.device), settings)
    arms = [arm for arm in settings.arms if arm != "shared" or any(subject.shares for subject in subjects)]
    if len(arms) < len(settings.arms):
        result.notes.append("no members share weights, so there is no arm `shared`: it would be `composite`")
    if "base_lookup" in arms and max(settings.batches) > 1:
        result.notes.append("`base_lookup` is measured at batch 1: transformers drafts by prompt lookup for no more")
    if "base_lookup" in arms and any(subject.compiled for subject in subjects):
        result.notes.append("`base_lookup` is not measured compiled: transformers drafts over no static cache")
    rng = random.Random(settings.seed)
    begin = time.perf_counter()
    prefilled: dict[int, float] = {}  # prompt tokens of a batch -> seconds of a warm-up of all arms
    try:
        for index, case in enumerate(cases):
            spent = time.perf_counter() - begin
            share = _share(settings, spent, len(cases) - index)
            guess = _guess(prefilled, case)
            always = (case.lengths, case.batch) == MAIN
            if not always and share is not None and guess > share:
                result.notes.append(f"{case} is left out: the budget of {settings.budget:.0f} s is used up")
                continue
            prefilled[case.batch * case.prompt] = _measure_case(
                result, subjects, case, arms, texts, tokenizer, rng,
                share=None if always else share,
                with_overhead=index == 0 and case.output > 1,
                compare=compare and settings.temperature is None,
                progress=lambda said, part, index=index, case=case: progress(  # type: ignore[misc]
                    f"{case}: {said}", (index + part) / len(cases)
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        result.interrupted = True
        result.notes.append("interrupted: what was measured until then is shown")
    result.seconds = time.perf_counter() - begin
    return result


def _measure_case(
    result: BenchResult,
    subjects: Sequence[Subject],
    case: Case,
    arms: Sequence[str],
    texts: Texts,
    tokenizer: Any,
    rng: random.Random,
    *,
    share: float | None,
    with_overhead: bool,
    compare: bool,
    progress: Callable[[str, float], None],
) -> float:
    """Measure one case into ``result``, as many rounds as ``share`` seconds allow; the seconds of its warm-up."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
    begin = time.perf_counter()
    ids = prompts(texts, tokenizer, case)
    round_seconds: dict[str, float] = {}  # options -> of a round of their arms
    runs = []
    for subject in subjects:
        for arm in arms:
            if arm == "base_lookup" and (case.batch > 1 or subject.compiled):
                continue
            if arm == "shared" and not subject.shares:
                continue
            progress(f"warm-up, {arm}", 0.0)
            n_warm = min(case.output, WARM_UP)
            if subject.compiled:  # in as many tokens as it takes to see all shapes: some compile for minutes
                run_arm(subject, arm, ids, case.output, result.settings.asked(arm))
            warm = run_arm(subject, arm, ids, n_warm, result.settings.asked(arm))
            a_step = (warm.seconds - warm.first) / max(n_warm - 1, 1)
            whole = warm.first + a_step * (case.output - 1)
            round_seconds[subject.options] = round_seconds.get(subject.options, 0.0) + whole
            samples[subject.options, arm] = []
            runs.append((subject, arm))
    warmed = time.perf_counter() - begin
    runs, repeats = _cut(result, case, runs, round_seconds, None if share is None else share - warmed)
    try:
        for number in range(repeats):
            ids = prompts(texts, tokenizer, case)
            found: dict[str, dict[str, Tensor]] = {subject.options: {} for subject in subjects}
            for turn, (subject, arm) in enumerate(rng.sample(runs, len(runs))):
                progress(f"round {number + 1} of {repeats}, {arm}", (number + turn / len(runs)) / repeats)
                torch.manual_seed(1000 * result.settings.seed + number)
                sample = run_arm(subject, arm, ids, case.output, result.settings.asked(arm))
                samples[subject.options, arm].append(sample)
                found[subject.options][arm] = sample.tokens
                if with_overhead and not subject.compiled and arm in ("base", "composite", "shared"):
                    steps.setdefault((subject.options, arm), []).append(overhead_of(subject, arm, ids, sample))
            for subject in subjects if compare else ():
                result.agreements += compare_tokens(subject, case, ids, found[subject.options])
    finally:  # what an interruption leaves is told too
        result.rows += _rows(case, samples)
        result.overheads += [
            Overhead(
                arm,
                options,
                *(case.batch, case.prompt, case.output),
                statistics.median(step for step, _ in pairs),
                statistics.median(forwards for _, forwards in pairs),
                statistics.median(step / forwards for step, forwards in pairs) - 1,
                len(pairs),
            )
            for (options, arm) in samples
            if (pairs := steps.get((options, arm)))
        ]
    return warmed


def _cut(
    result: BenchResult,
    case: Case,
    runs: list[tuple[Subject, str]],
    round_seconds: Mapping[str, float],
    seconds: float | None,
) -> tuple[list[tuple[Subject, str]], int]:
    """What of a case fits ``seconds``: all rounds, or those of the last set of options alone, or fewer of these."""
    repeats = result.settings.repeats
    if seconds is None or repeats * sum(round_seconds.values()) <= seconds:
        return runs, repeats
    *dropped, last = round_seconds
    fitting = min(int(max(seconds, 0) / round_seconds[last]), repeats)
    said = "is left out" if fitting == 0 else f"has {fitting} of {repeats} rounds"
    if dropped and fitting:
        said += f", of {last} alone"
    costs = ", ".join(f"{name} {cost:.0f} s" for name, cost in round_seconds.items())
    result.notes.append(f"{case} {said}: the budget is short (a round takes {costs})")
    return [(subject, arm) for subject, arm in runs if subject.options == last], fitting


def _rows(case: Case, samples: Mapping[tuple[str, str], Sequence[Sample]]) -> list[Row]:
    speeds = {
        key: [case.batch * case.output / sample.seconds for sample in taken] for key, taken in samples.items() if taken
    }
    medians = {key: statistics.median(speed) for key, speed in speeds.items()}

    def ratio(options: str, arm: str, other: str) -> float | None:
        return medians[options, arm] / medians[options, other] if (options, other) in medians else None

    rows = []
    for (options, arm), speed in speeds.items():
        taken = samples[options, arm]
        stats = [asdict(sample.stats) for sample in taken if sample.stats is not None]
        total = SpeculationStats(**{name: sum(one[name] for one in stats) for name in stats[0]}) if stats else None
        rows.append(
            Row(
                arm=arm,
                options=options,
                batch=case.batch,
                prompt=case.prompt,
                output=case.output,
                tokens_per_second=medians[options, arm],
                tokens_per_second_low=min(speed),
                tokens_per_second_high=max(speed),
                ratio_to_base=ratio(options, arm, "base"),
                ratio_to_plain_loop=ratio(options, arm, "plain_loop"),
                acceptance=None if total is None else total.acceptance,
                speculation=None if total is None else asdict(total),
                peak_memory_bytes=max(sample.memory for sample in taken),
                time_to_first_token_s=statistics.median(sample.first for sample in taken),
                repeats=len(taken),
            )
        )
    return rows


def _share(settings: BenchOptions, spent: float, n_left: int) -> float | None:
    """Seconds that the next of ``n_left`` cases may take: the cheap come first and leave theirs to the dear."""
    return None if settings.budget is None else max(settings.budget - spent, 0.0) / n_left


def _guess(prefilled: Mapping[int, float], case: Case) -> float:
    """What the warm-up alone will take, from the largest case so far; grows with the prompts' tokens."""
    if not prefilled:
        return 0.0
    largest = max(prefilled)
    return prefilled[largest] * max(case.batch * case.prompt / largest, 1.0)


def _refuse_too_long(model: ProxyTunedForCausalLM, case: Case) -> None:
    limit = model.context_of(model.shortest)
    if limit is not None and case.prompt + case.output > limit:
        needed = case.prompt + case.output
        raise ProxyTuneError(
            f"{case.lengths} needs {needed} tokens, but member {model.shortest!r} can read only {limit}"
        )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, and what is meant by memory."""
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
