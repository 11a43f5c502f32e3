"""``proxytune plan``: what steering will cost beside the base alone, before anything is loaded.

The arithmetic is that of decoding.cost, which also chooses the drafts while decoding. It is fed with one of two:

- the members' shapes and dtypes, counted without storage: a step costs the bytes that it moves, and each further row
  a stated share of them. That is what large models come to; launching kernels is not in it, so small ones are slower.
- a probe of about ten seconds, where the models are at hand (:func:`probe`): each lane's forward is timed at several
  numbers of rows, and what ``generate`` adds to the forwards is what is left of a few tokens that it makes.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from proxytune.decoding.cost import QUICK_HEAD, QUICK_ROWS, ROW_SHARE, UNPACKED_CPU, Cost, Costs, cost_of_weights
from proxytune.decoding.drafting import Drafting, choose_drafting, costs_by_role
from proxytune.errors import ProxyTuneError
from proxytune.recipe.check import MemberReport, count_recipe
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.layout import group_by_weights
from proxytune.recipe.members import Loading
from proxytune.recipe.options import LoadingOptions
from proxytune.speed.bench import Subject, load_subject, now, run_arm
from proxytune.speed.options import MemberOptions, PlanOptions

__all__ = [
    "Compared",
    "LaneShape",
    "Plan",
    "Prediction",
    "RecipeCosts",
    "compare_with_bench",
    "plan_probed",
    "plan_recipe",
    "predict",
    "probe",
    "read_bench",
]

PROBE_SECONDS = 10.0
MEASURED_OUTPUT = 32  # new tokens that a row of a bench needs at least, to be held against a prediction
COLUMNS = (1, 2, 4, 8)  # tokens of a row in the forwards that are timed
CACHED = 64  # tokens that they find in the cache
PROBE_TOKENS, PROBE_DRAFTS = 20, 3  # of the calls of `generate` that are timed


# -- what comes out -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LaneShape:
    """One set of weights, as far as speed and memory go.

    Attributes:
        members: who is computed with it, in ``n_seats`` blocks of rows.
        weight_bytes: of its members, with the quick head that packing gives to a float32 lane which drafts.
        read_bytes: of weights that a forward reads, adapters included.
        quick_head_bytes: of that quick head, 0 where there is none; see :class:`proxytune.lanes.kernels.QuickHead`.
        kv_bytes_per_token: of cache for all seats, None if unknown.
    """

    members: tuple[str, ...]
    dtype: str
    n_seats: int
    n_layers: int
    weight_bytes: int
    read_bytes: int
    kv_bytes_per_token: int | None
    quick_head_bytes: int = 0


@dataclass(frozen=True)
class Prediction:
    """One batch size at one acceptance. Costs are of one more token of every row; the base alone costs 1.

    Attributes:
        naive: one forward for every member. shared: one for every set of weights. speculative: with ``n_drafts``
            drafts a cycle, the number that makes it cheapest; 0, and the cost of ``shared``, where drafting cannot pay.
        ratio_to_base, ratio_to_naive: of speculative decoding, in tokens a second; more is better.
        base_seconds: of one token by the base alone; None where nothing was measured.
    """

    batch: int
    acceptance: float
    naive: float
    shared: float
    speculative: float
    n_drafts: int
    ratio_to_base: float
    ratio_to_naive: float
    base_seconds: float | None


@dataclass(frozen=True)
class RecipeCosts:
    """What a step costs at one batch size, in one unit.

    Attributes:
        base_alone: transformers' own ``generate`` of the base. naive: a forward of every member.
        steered: the recipe as it is loaded by default, with what ``generate`` adds to a plain step.
        cycle_overhead: in place of ``steered.overhead``, what a cycle of drafting and verifying adds.
    """

    base_alone: float
    naive: float
    steered: Costs
    cycle_overhead: float = 0.0

    def speculative(self, acceptance: float, n_batch: int) -> tuple[float, int]:
        """The cost of a token with the best number of drafts, and that number."""
        drafting = replace(self.steered, overhead=self.cycle_overhead)
        plain = self.steered.cycle(0, acceptance, n_batch)
        n_drafts = drafting.best_drafts(acceptance, n_batch)
        cost = drafting.per_token(n_drafts, acceptance, n_batch)
        return (cost, n_drafts) if n_drafts and cost < plain else (plain, 0)

    def of_cycles(self, stats: Mapping[str, int], n_batch: int) -> float:
        """The cost of the cycles that were counted (``SpeculationStats``), each kind at
        its mean number of drafts."""
        drafting = replace(self.steered, overhead=self.cycle_overhead)
        copying = stats["lookup_cycles"]
        others = stats["cycles"] - copying
        cost = 0.0
        if copying:
            cost += copying * drafting.lookup_cycle(stats["looked_up"] / copying / n_batch, n_batch)
        if others:
            n_drafts = stats["drafted"] / others / n_batch
            acceptance = stats["accepted"] / stats["drafted"] if stats["drafted"] else 0.0
            cost += others * (drafting if n_drafts else self.steered).cycle(n_drafts, acceptance, n_batch)
        return cost


@dataclass(frozen=True)
class Plan:
    """What was predicted, and from what.

    Attributes:
        basis: what the predictions rest on, in words.
        weight_bytes, kv_bytes_per_token: ``base`` alone, ``naive`` (every member apart), ``shared``.
    """

    basis: str
    lanes: list[LaneShape]
    weight_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int | None]
    predictions: list[Prediction]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def make_plan(config: ProxyTuneConfig, options: PlanOptions, loading: LoadingOptions) -> tuple[Plan, list[Compared]]:
    """Predict, from shapes or with a probe; and, if asked, the predictions held against a bench.

    Raises:
        ProxyTuneError: for options that contradict each other, and where the bench has nothing to compare.
    """
    if not options.probe:
        if loading.device_map is not None:
            raise ProxyTuneError("--against and --device-map need --probe: without it nothing is loaded")
        found = plan_recipe(
            config,
            options.members,
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batches=options.batches,
            acceptances=options.acceptances,
            trust_remote_code=loading.trust_remote_code,
        )
        return found, []
    bench = None if options.against is None else read_bench(options.against)
    subject = load_subject(config, options.members, loading)
    costs = probe(subject, options.batches)
    own = Loading(options.members.dtype, pack=options.members.pack, trust_remote_code=loading.trust_remote_code)
    found = plan_probed(config, subject, costs, options.acceptances, own)
    compared = [] if bench is None else compare_with_bench(costs, subject.options, subject.shares, bench)
    if bench is not None and not compared:
        raise ProxyTuneError(f"{options.against} has no row with the options {subject.options} and these batch sizes")
    return found, compared


# -- from shapes ----------------------------------------------------------------------------------------------
def plan_recipe(
    config: ProxyTuneConfig,
    options: MemberOptions | None = None,
    *,
    device: str = "cuda",
    batches: Sequence[int] = (1,),
    acceptances: Sequence[float] = (0.7,),
    trust_remote_code: bool = False,
) -> Plan:
    """Predict from the members' configs alone; neither weights nor tokenizers need to exist.

    Args:
        options: the members' dtype where the recipe leaves it open, and whether weights will be packed.
        device: ``cpu`` or ``cuda``: what one more row costs, as a share of reading the weights.
        batches, acceptances: every pair of them is predicted.

    Raises:
        MemberError, RecipeError: for a member whose config cannot be read.
    """
    options = options or MemberOptions()
    loading = Loading(dtype=options.dtype, pack=options.pack, trust_remote_code=trust_remote_code)
    members, notes = count_recipe(config, loading)
    lanes, base, drafting = _lanes(config, members, loading)
    apart, _ = count_recipe(config, replace(loading, share=False))

    def cost(n_bytes: float, dtype: str) -> Cost:
        return cost_of_weights(n_bytes, 0, device, packed=options.pack or dtype != "float32")

    saved = [lane.quick_head_bytes * (1 / QUICK_HEAD - 1) for lane in lanes]
    lane_costs = [cost(lane.read_bytes - less, lane.dtype) for lane, less in zip(lanes, saved)]
    heads = [cost(lane.quick_head_bytes / QUICK_HEAD, lane.dtype) for lane in lanes if lane.quick_head_bytes]
    steered = costs_by_role(base, drafting, lane_costs, [lane.n_seats for lane in lanes], *heads)
    naive = [cost(one.read_bytes, one.dtype) for one in members]
    costs = {
        n_batch: RecipeCosts(naive[0].of(n_batch), sum(each.of(n_batch) for each in naive), steered)
        for n_batch in batches
    }
    basis = (
        f"the bytes of weights that a step moves, and {100 * ROW_SHARE[device]:g} % of them for each row ({device}); "
        "launching kernels is not counted, so members of less than a few GB are slower than this (--probe measures)"
    )
    if device == "cpu" and not options.pack and any(lane.dtype == "float32" for lane in lanes):
        basis += (
            f"; float32 weights that are not packed take {UNPACKED_CPU:g} times as long for several rows as for one"
        )
    return _plan(basis, lanes, members, apart, predict(costs, acceptances, timed=False), notes)


def _lanes(
    config: ProxyTuneConfig, members: Sequence[MemberReport], loading: Loading
) -> tuple[list[LaneShape], int, Drafting | None]:
    """The sets of weights that loading would make, which of them holds the base, and who drafts."""
    reports = {one.name: one for one in members}
    groups, _ = group_by_weights(config, list(config.members()), loading)
    lanes: list[LaneShape] = []
    seats: dict[str, tuple[int, int]] = {}
    for at, group in enumerate(groups):
        blocks = list(dict.fromkeys((member.adapter, member.prompt) for _, member in group))
        seats |= {name: (at, blocks.index((member.adapter, member.prompt))) for name, member in group}
        own = [reports[name] for name, _ in group]
        grown = [one.kv_bytes_per_token for one in own]
        lanes.append(
            LaneShape(
                members=tuple(one.name for one in own),
                dtype=own[0].dtype,
                n_seats=len(blocks),
                n_layers=own[0].layers,
                weight_bytes=sum(one.weight_bytes for one in own),
                read_bytes=own[0].read_bytes + sum(one.adapter_bytes for one in own),
                kv_bytes_per_token=_sum(grown),
            )
        )
    drafting = choose_drafting([lane.read_bytes for lane in lanes], seats, [one.name for one in config.expert_list])
    if loading.pack and drafting is not None:
        lane = lanes[drafting.lane]
        if lane.dtype == "float32":
            quick = int(QUICK_HEAD * reports[lane.members[0]].head_bytes)
            lanes[drafting.lane] = replace(lane, weight_bytes=lane.weight_bytes + quick, quick_head_bytes=quick)
    return lanes, seats["base"][0], drafting


def predict(costs: Mapping[int, RecipeCosts], acceptances: Sequence[float], *, timed: bool) -> list[Prediction]:
    """The predictions for every batch size in ``costs`` (whose unit is seconds where they are ``timed``)."""
    found = []
    for n_batch, own in costs.items():
        for acceptance in acceptances:
            shared = own.steered.cycle(0, acceptance, n_batch)
            speculative, n_drafts = own.speculative(acceptance, n_batch)
            found.append(
                Prediction(
                    n_batch,
                    acceptance,
                    own.naive / own.base_alone,
                    shared / own.base_alone,
                    speculative / own.base_alone,
                    n_drafts,
                    own.base_alone / speculative,
                    own.naive / speculative,
                    own.base_alone if timed else None,
                )
            )
    return found


def _plan(
    basis: str,
    lanes: list[LaneShape],
    members: Sequence[MemberReport],
    apart: Sequence[MemberReport],
    predictions: list[Prediction],
    notes: list[str],
) -> Plan:
    return Plan(
        basis,
        lanes,
        {
            "base": members[0].weight_bytes,
            "naive": sum(one.weight_bytes for one in apart),
            "shared": sum(lane.weight_bytes for lane in lanes),
        },
        {
            "base": members[0].kv_bytes_per_token,
            "naive": _sum([one.kv_bytes_per_token for one in apart]),
            "shared": _sum([one.kv_bytes_per_token for one in members]),
        },
        predictions,
        notes,
    )


def _sum(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(size or 0 for size in sizes)


# -- from a probe ---------------------------------------------------------------------------------------------
@dataclass
class _Timed:
    """A lane that is timed: its forwards' seconds by (rows of the batch, columns).

    ``part``: all of it; a step of drafting, which ends in the quick head; or its own head alone.
    """

    lane: Any
    n_seats: int
    part: Literal["all", "draft", "head"] = "all"
    caches: dict[int, DynamicCache] = field(default_factory=dict)
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def run(self, n_batch: int, n_columns: int) -> float:
        rows = n_batch * self.n_seats
        if n_batch not in self.caches:
            self.caches[n_batch] = DynamicCache(config=self.lane.config)
            self._forward(self._ids(rows, CACHED), self.caches[n_batch])
        cache = copy.deepcopy(self.caches[n_batch])
        ids = self._ids(rows, n_columns)
        begin = now(ids.device)
        self._forward(ids, cache)
        return now(ids.device) - begin

    def _ids(self, n_rows: int, n_columns: int) -> Tensor:
        return torch.randint(0, self.lane.config.vocab_size, (n_rows, n_columns), device=self.lane.device)

    def _forward(self, ids: Tensor, cache: DynamicCache) -> None:
        if self.part == "all":
            self.lane(ids, past_key_values=cache, use_cache=True, logits_to_keep=0)
        elif self.part == "draft":
            hidden = self.lane.hidden(ids, past_key_values=cache, use_cache=True)
            self.lane.quick_head(hidden[: len(ids) // self.n_seats])
        else:
            self.lane.head(torch.zeros(*ids.shape, self.lane.quick_head.in_features))

    def cost(self, n_batch: int) -> Cost:
        """The line through the forwards of a batch, seconds over rows; one row alone is taken as it was measured."""
        points = {
            rows * columns * self.n_seats: statistics.median(seconds)
            for (rows, columns), seconds in self.seconds.items()
            if rows == n_batch
        }
        single = points.pop(1, None)
        rows = torch.tensor(list(points), dtype=torch.float64)
        seconds = torch.tensor(list(points.values()), dtype=torch.float64)
        # Errors count relative to the time, so that few rows, which most forwards have, are met as well as many.
        system = torch.stack([torch.ones_like(rows), rows], dim=1) / seconds[:, None]
        fixed, per_row = torch.linalg.lstsq(system, torch.ones_like(seconds)[:, None]).solution.flatten().tolist()
        if per_row < 0:
            fixed, per_row = statistics.geometric_mean(points.values()), 0.0
        if single is None:
            return Cost(fixed, per_row)
        alone = single - per_row
        return Cost(alone, per_row, fixed / alone) if alone > 0 else Cost(fixed, per_row)


@torch.no_grad()
def probe(subject: Subject, batches: Sequence[int]) -> dict[int, RecipeCosts]:
    """Time the lanes of a recipe in memory, and what ``generate`` adds to them, for about :data:`PROBE_SECONDS`.

    Returns:
        batch size -> costs in seconds.
    """
    separate, default = subject.separate, subject.default
    lanes = {id(lane): _Timed(lane, len(lane.seats)) for model in (separate, default) for lane in _lanes_of(model)}
    made = {
        n_batch: [
            _Generated(subject, "base", n_batch),
            _Generated(subject, "shared", n_batch),
            _Generated(subject, "speculative", n_batch),
        ]
        for n_batch in batches
    }
    quick = next((lane for lane in _lanes_of(default) if lane.quick_head is not None), None)
    apart = [] if quick is None else [_Timed(quick, len(quick.seats), "draft"), _Timed(quick, len(quick.seats), "head")]
    every = [*lanes.values(), *apart]
    points = [(timed, n_batch, columns) for n_batch in batches for columns in COLUMNS for timed in every]
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < PROBE_SECONDS:
        for timed, n_batch, columns in points:
            taken = timed.run(n_batch, columns)
            if rounds:  # the first round warms up
                timed.seconds.setdefault((n_batch, columns), []).append(taken)
        for calls in made.values():
            for call in calls:
                call.run(keep=rounds > 0)
        rounds += 1

    found = {}
    for n_batch in batches:
        base, plain, drafted = made[n_batch]
        step_and_head = [timed.cost(n_batch) for timed in apart] if n_batch <= QUICK_ROWS else []
        lane_costs = [
            step_and_head[0] if step_and_head and lane is quick else lanes[id(lane)].cost(n_batch)
            for lane in _lanes_of(default)
        ]
        steered = costs_by_role(
            default.seats["base"][0],
            default.drafting,
            lane_costs,
            [len(lane.seats) for lane in _lanes_of(default)],
            *step_and_head[1:],
        )
        overhead = plain.step() - steered.cycle(0, 0.0, n_batch)
        cycle_overhead = overhead
        if steered.draft is not None and drafted.cycles:
            cycle_overhead = drafted.cycle_seconds() - steered.cycle(PROBE_DRAFTS, drafted.acceptance(), n_batch)
        members = [lanes[id(separate.lanes[separate.seats[name][0]])].cost(n_batch) for name in separate.seats]
        naive = sum(cost.of(n_batch) for cost in members) + overhead
        found[n_batch] = RecipeCosts(base.step(), naive, replace(steered, overhead=overhead), cycle_overhead)
    return found


def plan_probed(
    config: ProxyTuneConfig,
    subject: Subject,
    costs: Mapping[int, RecipeCosts],
    acceptances: Sequence[float],
    loading: Loading | None = None,
) -> Plan:
    """The plan of a recipe in memory, from what :func:`probe` found."""
    loading = loading or Loading()
    members, notes = count_recipe(config, loading)
    lanes, *_ = _lanes(config, members, loading)
    apart, _ = count_recipe(config, replace(loading, share=False))
    basis = f"the recipe's own forwards, timed on this machine for {PROBE_SECONDS:.0f} seconds ({subject.options})"
    return _plan(basis, lanes, members, apart, predict(costs, acceptances, timed=True), notes)


@dataclass
class _Generated:
    """Calls of ``generate`` in one arm, timed."""

    subject: Subject
    arm: str
    n_batch: int
    steps: list[float] = field(default_factory=list)
    decoding: float = 0.0
    cycles: int = 0
    judged: int = 0
    accepted: int = 0

    def run(self, keep: bool) -> None:
        width = self.subject.default.shared_vocab
        ids = torch.randint(0, width, (self.n_batch, CACHED))
        asked = {"speculate": PROBE_DRAFTS} if self.arm == "speculative" else None
        sample = run_arm(self.subject, self.arm, ids, PROBE_TOKENS, asked)
        if keep:
            self.decoding += sample.seconds - sample.first
            self.steps.append((sample.seconds - sample.first) / (PROBE_TOKENS - 1))
            if sample.stats is not None:
                self.cycles += sample.stats.cycles
                self.judged += sample.stats.judged
                self.accepted += sample.stats.accepted

    def step(self) -> float:
        return statistics.median(self.steps)

    def cycle_seconds(self) -> float:
        return self.decoding / self.cycles

    def acceptance(self) -> float:
        return self.accepted / self.judged if self.judged else 0.0


# -- held against a bench -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Compared:
    """A row of ``proxytune bench`` and what was predicted for it: seconds of a step after the prompt; ``error`` is
    predicted / measured - 1."""

    arm: str
    options: str
    batch: int
    prompt: int
    output: int
    predicted: float
    measured: float
    error: float


def compare_with_bench(
    costs: Mapping[int, RecipeCosts], options: str, shares: bool, bench: Mapping[str, Any]
) -> list[Compared]:
    """Hold a probe's costs against the rows of a bench that have the same options and batch sizes.

    Rows of fewer than 32 new tokens are left out: they measure the prompt. The speculative row is predicted from the
    drafts that it had, by kind: how many the text will offer to copy, no plan can know.

    Args:
        options, shares: of the :class:`~proxytune.speed.bench.Subject` that was probed.
        bench: what ``proxytune bench --json`` wrote.
    """
    found = []
    for row in bench["rows"]:
        own = costs.get(row["batch"])
        if own is None or row["options"] != options or row["output"] < MEASURED_OUTPUT:
            continue
        predicted = {"base": own.base_alone, "plain_loop": own.naive, "shared": own.steered.cycle(0, 0.0, row["batch"])}
        predicted["composite"] = own.naive if shares else predicted["shared"]
        if stats := row["speculation"]:
            predicted["speculative"] = own.of_cycles(stats, row["batch"]) / (row["repeats"] * (row["output"] - 1))
        if row["arm"] in predicted:
            whole = row["batch"] * row["output"] / row["tokens_per_second"]
            measured = (whole - row["time_to_first_token_s"]) / (row["output"] - 1)
            names = (row["arm"], row["options"], row["batch"], row["prompt"], row["output"])
            seconds = predicted[row["arm"]]
            found.append(Compared(*names, seconds, measured, seconds / measured - 1))
    return found


def read_bench(path: Path) -> dict[str, Any]:
    """What ``proxytune bench --json`` wrote.

    Raises:
        ProxyTuneError: for a file that it did not write.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if not (isinstance(found, dict) and isinstance(found["rows"], list)):
            raise KeyError("rows")
    except (ValueError, KeyError) as error:
        raise ProxyTuneError(f"{path} was not written by `proxytune bench --json`") from error
    return found


def _lanes_of(model: Any) -> list[Any]:
    return list(model.lanes)
