"""``proxytune plan``: predicts the cost of steering compared with the base alone, before anything is loaded.

The arithmetic is that of decoding.cost, which also chooses the drafts while decoding. Its input is one of:

- the members' shapes and dtypes, counted without storage: a step costs the bytes that it moves, and each further row a
  fixed share of them. This fits large models. The cost of launching kernels is missing, so small models are slower.
- a probe of about ten seconds, if the models are on this machine (:func:`probe`): each lane's forward is timed for
  several numbers of rows. The time of ``generate`` for a few tokens, minus the forwards, is its overhead.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from proxytune.decoding.cost import QUICK_HEAD, QUICK_ROWS, ROW_SHARE, UNPACKED_CPU, Cost, Costs, cost_of_weights
from proxytune.decoding.drafting import Drafting, choose_drafting, costs_by_role
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.recipe.check import MemberReport, cache_bytes, count_recipe
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.layout import group_by_weights, seats_of
from proxytune.recipe.members import Loading
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase
from proxytune.speed.bench import Sample, Subject, load_subject, now, run_arm
from proxytune.speed.options import PlanOptions

__all__ = ["Plan", "plan_recipe"]

PROBE_SECONDS = 10.0
COLUMNS = (1, 2, 4, 8)  # tokens per row in the timed forwards
CACHED = 64  # tokens in the cache before them
PROBE_TOKENS, PROBE_DRAFTS = 20, 3  # new tokens of the timed calls of `generate`
MEASURED_OUTPUT = 32  # new tokens of a bench's row; with fewer it measures the prompt, and is not compared with a plan


# -- what comes out -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LaneShape:
    """The size of one set of weights.

    Attributes:
        members: the members computed with it, in ``n_seats`` blocks of rows.
        weight_bytes: bytes of all its weights, with the quick head that packing gives to a drafting float32 lane.
        read_bytes: bytes of weights that a forward reads, adapters included.
        quick_head_bytes: bytes of that quick head, 0 if there is none; see :class:`proxytune.lanes.kernels.QuickHead`.
        kv_bytes_per_token: bytes of cache for all seats; None if unknown.
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
    """The prediction for one batch size and one acceptance. Costs are those of one more token in every row; the base
    alone costs 1.

    Attributes:
        naive: one forward for every member. shared: one for every set of weights. speculative: with ``n_drafts`` drafts
            per cycle, the number that makes it cheapest; 0, and the cost of ``shared``, where drafting cannot pay.
        ratio_to_base, ratio_to_naive: ratios of speculative decoding, in tokens per second; more is better.
        base_seconds: seconds per token of the base alone; None if nothing was measured.
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
    """The costs of a step at one batch size, in one unit.

    Attributes:
        base_alone: transformers' own ``generate`` of the base. naive: a forward of every member.
        steered: the recipe as it is loaded by default, with the overhead of ``generate`` per plain step.
        cycle_overhead: the overhead of a cycle of drafting and verifying, in place of ``steered.overhead``.
    """

    base_alone: float
    naive: float
    steered: Costs
    cycle_overhead: float = 0.0

    @property
    def drafting(self) -> Costs:
        return replace(self.steered, overhead=self.cycle_overhead)

    def speculative(self, acceptance: float, n_batch: int) -> tuple[float, int]:
        """The cost of a token with the best number of drafts, and this number."""
        plain = self.steered.cycle(0, acceptance, n_batch)
        n_drafts = self.drafting.best_drafts(acceptance, n_batch)
        cost = self.drafting.per_token(n_drafts, acceptance, n_batch)
        return (cost, n_drafts) if n_drafts and cost < plain else (plain, 0)

    def of_cycles(self, stats: Mapping[str, int], n_batch: int) -> float:
        """The cost of counted cycles (``SpeculationStats``), each kind with its mean number of drafts."""
        copying, others = stats["lookup_cycles"], stats["cycles"] - stats["lookup_cycles"]
        n_copied = stats["looked_up"] / max(1, copying) / n_batch
        n_drafts = stats["drafted"] / max(1, others) / n_batch
        acceptance = stats["accepted"] / max(1, stats["drafted"])
        other = (self.drafting if n_drafts else self.steered).cycle(n_drafts, acceptance, n_batch)
        return copying * self.drafting.lookup_cycle(n_copied, n_batch) + others * other


@dataclass(frozen=True)
class Plan:
    """The predictions, and their basis.

    Attributes:
        basis: the basis of the predictions, in words.
        weight_bytes, kv_bytes_per_token: ``base`` alone, ``naive`` (every member apart), ``shared``.
        compared: rows of a bench, with the ``predicted`` and the ``measured`` seconds of a step after the prompt, and
            ``error``, predicted / measured - 1.
    """

    basis: str
    lanes: list[LaneShape]
    weight_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int | None]
    predictions: list[Prediction]
    notes: list[str]
    compared: list[dict[str, Any]]


def predict(costs: Mapping[int, RecipeCosts], acceptances: Sequence[float], *, timed: bool) -> list[Prediction]:
    """The predictions for every batch size in ``costs`` (whose unit is seconds where they are ``timed``)."""
    predictions = []
    for n_batch, own in costs.items():
        base, shared = own.base_alone, own.steered.cycle(0, 0.0, n_batch)
        for acceptance in acceptances:
            cost, n_drafts = own.speculative(acceptance, n_batch)
            relative = (own.naive / base, shared / base, cost / base)
            ratios = (base / cost, own.naive / cost)
            predictions.append(
                Prediction(n_batch, acceptance, *relative, n_drafts, *ratios, base_seconds=base if timed else None)
            )
    return predictions


def plan_recipe(config: ProxyTuneConfig, options: PlanOptions, loading: LoadingOptions | None = None) -> Plan:
    """Predict from only the members' configs or, with ``probe``, from the timed forwards of the recipe.

    Without ``probe`` neither weights nor tokenizers need to exist.

    Args:
        loading: its ``device_map`` (for a probe) and ``trust_remote_code``.
    """
    loading = loading or LoadingOptions()
    if isinstance(config.base_member, ApiBase):
        raise MemberError("the base runs behind an API, so what it needs is not known here; see plan_requests")
    if not options.probe and not (options.against is None and loading.device_map is None):
        raise ProxyTuneError("--against and --device-map need --probe: without it nothing is loaded")
    bench = None if options.against is None else read_bench(options.against)
    own = Loading(options.members.dtype, pack=options.members.pack, trust_remote_code=loading.trust_remote_code)
    members, notes = count_recipe(config, own)
    apart, _ = count_recipe(config, replace(own, share=False))
    lanes, base, drafting = _lane_shapes(config, own, members)
    compared = []
    if options.probe:
        subject = load_subject(config, options.members, loading)
        costs = probe(subject, options.batches)
        basis = f"the recipe's own forwards, timed on this machine for {PROBE_SECONDS:.0f} seconds ({subject.options})"
        if bench is not None and not (compared := compare_with_bench(costs, subject, bench)):
            raise ProxyTuneError(
                f"{options.against} has no row with the options {subject.options} and these batch sizes"
            )
    else:
        costs, basis = _estimated(lanes, options, members, base, drafting)
    held = {"base": members[:1], "naive": apart, "shared": members}
    weights = {kind: sum(one.weight_bytes for one in those) for kind, those in held.items()}
    weights["shared"] += sum(lane.quick_head_bytes for lane in lanes)
    caches = {kind: cache_bytes(those) for kind, those in held.items()}
    predictions = predict(costs, options.acceptances, timed=options.probe)
    if drafting is None:
        notes = [
            *notes,
            "no member besides the base's has weights of its own, so none can draft; drafts are copied from "
            "the text where it repeats itself, which these figures leave out",
        ]
    elif not any(one.n_drafts for one in predictions):
        notes = [*notes, "drafting cannot pay here"]
    return Plan(basis, lanes, weights, caches, predictions, notes, compared)


# -- from shapes ----------------------------------------------------------------------------------------------
def _estimated(
    lanes: Sequence[LaneShape],
    options: PlanOptions,
    members: Sequence[MemberReport],
    base: int,
    drafting: Drafting | None,
) -> tuple[dict[int, RecipeCosts], str]:
    """The costs by the bytes that a step moves, and their basis."""
    device, pack = options.device or ("cuda" if torch.cuda.is_available() else "cpu"), options.members.pack

    def cost(n_bytes: float, dtype: str) -> Cost:
        return cost_of_weights(n_bytes, 0, device, packed=pack or dtype != "float32")

    saved = [lane.quick_head_bytes * (1 / QUICK_HEAD - 1) for lane in lanes]
    lane_costs = [cost(lane.read_bytes - less, lane.dtype) for lane, less in zip(lanes, saved)]
    heads = [cost(lane.quick_head_bytes / QUICK_HEAD, lane.dtype) for lane in lanes if lane.quick_head_bytes]
    steered = costs_by_role(base, drafting, lane_costs, [lane.n_seats for lane in lanes], *heads)
    naive = [cost(one.read_bytes, one.dtype) for one in members]
    costs = {n: RecipeCosts(naive[0].of(n), sum(each.of(n) for each in naive), steered) for n in options.batches}
    basis = (
        f"the bytes of weights that a step moves, and {100 * ROW_SHARE[device]:g} % of them for each row ({device}); "
        "launching kernels is not counted, so members of less than a few GB are slower than this (--probe measures)"
    )
    if device == "cpu" and not pack and any(lane.dtype == "float32" for lane in lanes):
        basis += (
            f"; float32 weights that are not packed take {UNPACKED_CPU:g} times as long for several rows as for one"
        )
    return costs, basis


def _lane_shapes(
    config: ProxyTuneConfig, loading: Loading, members: Sequence[MemberReport]
) -> tuple[list[LaneShape], int, Drafting | None]:
    """The lanes as they would be loaded, the lane of the base, and the lane that would draft."""
    reports = {one.name: one for one in members}
    lanes: list[LaneShape] = []
    blocks: dict[str, tuple[int, int]] = {}
    for group in group_by_weights(config, list(config.members()), loading)[0]:
        seats = seats_of(group, {name: member.adapter for name, member in group})
        blocks |= {name: (len(lanes), block) for block, seat in enumerate(seats) for name in seat.names}
        own = [reports[name] for name, _ in group]
        lanes.append(
            LaneShape(
                members=tuple(one.name for one in own),
                dtype=own[0].dtype,
                n_seats=len(seats),
                n_layers=own[0].layers,
                weight_bytes=sum(one.weight_bytes for one in own),
                read_bytes=own[0].read_bytes + sum(one.adapter_bytes for one in own),
                kv_bytes_per_token=cache_bytes(own),
            )
        )
    drafting = choose_drafting([lane.read_bytes for lane in lanes], blocks, config.expert_names)
    if loading.pack and drafting is not None and lanes[drafting.lane].dtype == "float32":
        lane = lanes[drafting.lane]
        quick = int(QUICK_HEAD * reports[lane.members[0]].head_bytes)
        lanes[drafting.lane] = replace(lane, weight_bytes=lane.weight_bytes + quick, quick_head_bytes=quick)
    return lanes, blocks["base"][0], drafting


# -- from a probe ---------------------------------------------------------------------------------------------
@dataclass
class _Forward:
    """A timed forward: (n_batch, n_columns) -> seconds."""

    lane: Any
    call: Callable[[Any, Tensor, DynamicCache], Any]
    caches: dict[int, DynamicCache] = field(default_factory=dict)
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, n_batch: int, n_columns: int, keep: bool) -> None:
        if n_batch not in self.caches:
            self.caches[n_batch] = DynamicCache(config=self.lane.config)
            self.call(self.lane, self._ids(n_batch, CACHED), self.caches[n_batch])
        cache, ids = copy.deepcopy(self.caches[n_batch]), self._ids(n_batch, n_columns)
        begin = now(ids.device)
        self.call(self.lane, ids, cache)
        if keep:
            self.seconds[n_batch, n_columns].append(now(ids.device) - begin)

    def _ids(self, n_batch: int, n_columns: int) -> Tensor:
        shape = (n_batch * len(self.lane.seats), n_columns)
        return torch.randint(0, self.lane.config.vocab_size, shape, device=self.lane.device)

    def cost(self, n_batch: int) -> Cost:
        rows = n_batch * len(self.lane.seats)
        return cost_of_forwards({rows * n: statistics.median(self.seconds[n_batch, n]) for n in COLUMNS})


def _read(lane: Any, ids: Tensor, cache: DynamicCache) -> None:
    lane(ids, past_key_values=cache, use_cache=True, logits_to_keep=0)


def _draft(lane: Any, ids: Tensor, cache: DynamicCache) -> None:
    """A step of drafting, which ends with the lane's quick head."""
    hidden = lane.hidden(ids, past_key_values=cache, use_cache=True)
    lane.quick_head(hidden[: len(ids) // len(lane.seats)])


def _head(lane: Any, ids: Tensor, cache: DynamicCache) -> None:
    """Only the lane's own head."""
    lane.head(torch.zeros(*ids.shape, lane.quick_head.in_features))


def cost_of_forwards(seconds: Mapping[int, float]) -> Cost:
    """A line fitted to forwards, rows -> seconds. The value for one row is the measured one."""
    points = {rows: each for rows, each in seconds.items() if rows > 1}
    taken = np.array([*points.values()])
    # Relative errors count, so that few rows, which most forwards have, fit as well as many.
    per_row, fixed = np.polyfit([*points], taken, 1, w=1 / taken).tolist()
    if per_row < 0:
        fixed, per_row = statistics.geometric_mean(taken), 0.0
    alone = seconds.get(1, 0.0) - per_row
    return Cost(alone, per_row, fixed / alone) if alone > 0 else Cost(fixed, per_row)


@torch.no_grad()
def probe(subject: Subject, batches: Sequence[int]) -> dict[int, RecipeCosts]:
    """Time the lanes of a recipe in memory, and the overhead of ``generate``, for about :data:`PROBE_SECONDS`. Returns
    the costs in seconds by batch size."""
    separate, default = subject.separate, subject.default
    lanes: list[Any] = list(default.lanes)
    forwards = {lane: _Forward(lane, _read) for lane in (*lanes, *separate.lanes)}
    quick = next((at for at, lane in enumerate(lanes) if lane.quick_head is not None), None)
    parts = [] if quick is None else [_Forward(lanes[quick], call) for call in (_draft, _head)]
    calls: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < PROBE_SECONDS:
        for n_batch in batches:
            for n_columns in COLUMNS:
                for forward in (*forwards.values(), *parts):
                    forward.run(n_batch, n_columns, keep=rounds > 0)  # the first round warms up
            for arm in ("base", "shared", "speculative"):
                ids = torch.randint(0, default.shared_vocab, (n_batch, CACHED))
                asked = {"speculate": PROBE_DRAFTS} if arm == "speculative" else None
                sample = run_arm(subject, arm, ids, PROBE_TOKENS, asked)
                calls[arm, n_batch] += [sample] if rounds else []
        rounds += 1

    costs = {}
    for n_batch in batches:
        lane_costs, heads = [forwards[lane].cost(n_batch) for lane in lanes], []
        if quick is not None and n_batch <= QUICK_ROWS:
            lane_costs[quick], *heads = (part.cost(n_batch) for part in parts)
        seats = [len(lane.seats) for lane in lanes]
        steered = costs_by_role(default.seats["base"][0], default.drafting, lane_costs, seats, *heads)
        base, plain = (statistics.median(each.step for each in calls[arm, n_batch]) for arm in ("base", "shared"))
        overhead = cycle_overhead = plain - steered.cycle(0, 0.0, n_batch)
        drafted = calls["speculative", n_batch]
        stats = [each.stats for each in drafted if each.stats is not None]
        if steered.draft is not None and (n_cycles := sum(each.cycles for each in stats)):
            acceptance = sum(each.accepted for each in stats) / max(1, sum(each.judged for each in stats))
            cycle = sum(each.seconds - each.first for each in drafted) / n_cycles
            cycle_overhead = cycle - steered.cycle(PROBE_DRAFTS, acceptance, n_batch)
        members = [forwards[separate.lanes[lane]].cost(n_batch) for lane, _ in separate.seats.values()]
        naive = sum(cost.of(n_batch) for cost in members) + overhead
        costs[n_batch] = RecipeCosts(base, naive, replace(steered, overhead=overhead), cycle_overhead)
    return costs


# -- compared with a bench -------------------------------------------------------------------------------------
def compare_with_bench(
    costs: Mapping[int, RecipeCosts], subject: Subject, bench: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Compare a probe's costs with the rows of a bench that have the same options and batch sizes.

    The speculative row is predicted from the drafts that it had, by kind, because no plan can know how many drafts the
    text will offer to copy.
    """
    compared = []
    for row in bench["rows"]:
        batch, steps = row["batch"], row["output"] - 1
        if batch not in costs or row["options"] != subject.options or row["output"] < MEASURED_OUTPUT:
            continue
        own = costs[batch]
        predicted = {"base": own.base_alone, "plain_loop": own.naive, "shared": own.steered.cycle(0, 0.0, batch)}
        predicted["composite"] = own.naive if subject.shares else predicted["shared"]
        if row["speculation"]:
            predicted["speculative"] = own.of_cycles(row["speculation"], batch) / (row["repeats"] * steps)
        if row["arm"] in predicted:
            seconds = predicted[row["arm"]]
            measured = (batch * row["output"] / row["tokens_per_second"] - row["time_to_first_token_s"]) / steps
            names = {name: row[name] for name in ("arm", "options", "batch", "prompt", "output")}
            compared.append({**names, "predicted": seconds, "measured": measured, "error": seconds / measured - 1})
    return compared


def read_bench(path: Path) -> dict[str, Any]:
    """Read the file that ``proxytune bench --output`` wrote."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ProxyTuneError(f"{path} was not written by `proxytune bench --output`")
    return found
