"""What gates cost and save on the demo's members: the tables and the figure of docs/gates.md.

    python scripts/gates.py --work runs/conflicts --out runs/gates.json --figure docs/gates_curve

Two pairs, with experts of three seeds that scripts/conflicts.py has trained or trains now:

    house  house words for facts: the base never writes that form
    steps  worked solutions of word problems: the base writes such text, but in other words

``count``: an answer is right if greedy decoding writes exactly it, so one pass over the right answers scores all gates.
``time``: the same prompts are answered under some gates in turn, and each time is divided by that without a gate.
What is done is kept in ``--out``, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from build_demo import anti_expert_of, gold_logits
from conflicts import TASKS, expert_of
from proxytune import ProxyTunedForCausalLM
from proxytune.decoding.gating import between
from proxytune.decoding.mixing import mix, opening, scheduled
from proxytune.demo.assets import ASSETS, about, load_base
from proxytune.evaluation.plots import LINES, STYLE, save
from proxytune.evaluation.statistics import wilson
from proxytune.recipe.gates import Gate, gate_of
from proxytune.tables import Table, markdown

PAIRS = {"house": "house words for facts", "steps": "worked solutions of problems"}
GRID: dict[str, Sequence[Any]] = {
    "unsure": (0.99, 0.95, 0.9, 0.8, 0.65, 0.5, 0.3),
    "entropy": (0.1, 0.25, 0.5, 1, 1.5, 2, 3),
    "kl": (1, 2, 4, 6, 8, 12),
    "bet": (0, 0.1, 0.3, 0.5, 0.7, 0.9),
    "warmup": (2, 4, 8, 16),
    "decay": (4, 8, 16, 32, 64),
    "cycle": (1, 2, 4),
}
MORE = {"house": (("", ":"), (":", "")), "steps": (("", "####"), ("####", ""))}
TIMED = ("none", "unsure=0.9", "unsure=0.5", "entropy=1", "entropy=2", "decay=8", "cycle=4", "kl=4", "bet=0.3")
N_NEW = 32
MARKERS = {"unsure": "o", "entropy": "s", "decay": "v", "cycle": "D", "between": "X"}  # of the kinds in the figure


def grid(task: str) -> list[Gate | None]:
    """The gates that are counted; None is none."""
    return [
        None,
        *(gate_of({kind: value}) for kind, values in GRID.items() for value in values),
        *(gate_of({"between": texts}) for texts in MORE[task]),
    ]


# ---- right answers -----------------------------------------------------------------------------------


@torch.inference_mode()
def counted(task: str, seeds: Sequence[int], count: int, work: Path) -> dict[str, dict[str, Any]]:
    """By seed and gate: which answers are right, and at which share of their tokens the gate is open."""
    base, tokenizer = load_base()
    small = anti_expert_of(base, ASSETS, about()["layers"])
    experts = [expert_of(task, seed, work, small, tokenizer) for seed in seeds]
    found: dict[str, dict[str, Any]] = {}
    for (b, a, *each), wanted, n_tokens in gold_logits([base, small, *experts], tokenizer, TASKS[task].asked(count)):
        for seed, e in zip(seeds, each, strict=True):
            for gate in grid(task):
                line = found.setdefault(str(seed), {}).setdefault(str(gate or "none"), {"right": [], "open": []})
                far = torch.ones(len(b)) if gate is None else how_far(gate, b, e - a, wanted, n_tokens, tokenizer)
                mixed = mix(b[None], [(e[None], a[None])], torch.ones(1, 1), gate=gate, opened=far[None])[0]
                hits = (mixed.argmax(dim=-1) == wanted).split(n_tokens)
                line["right"] += [bool(hit.all()) for hit in hits]
                line["open"] += [float((part > 0).float().mean()) for part in far.split(n_tokens)]
        print(f"{task}: {len(line['right'])} of {count}", flush=True)
    return found


def how_far(gate: Gate, base: Tensor, offset: Tensor, wanted: Tensor, n_tokens: list[int], tokenizer: Any) -> Tensor:
    """How far a gate is open at each token of several answers, (n_tokens in all,)."""
    if gate.kind == "between":
        texts = [[tokenizer.decode(part[:t]) for t in range(len(part))] for part in wanted.split(n_tokens)]
        return torch.tensor([float(between(text, *gate.texts)) for each in texts for text in each])
    if gate.scheduled:
        return scheduled(gate, torch.cat([torch.arange(n) for n in n_tokens]))
    parts = zip(base.split(64), offset.split(64))  # of long answers, memory
    return torch.cat([opening(gate, b[None], o[None])[0] for b, o in parts])


# ---- time --------------------------------------------------------------------------------------------


def timed(task: str, seed: int, work: Path, n_prompts: int, rounds: int) -> dict[str, Any]:
    """Seconds per token under each gate, with and without drafts, as ratios to those without a gate in the same round;
    and the share of tokens at which it was open."""
    base, tokenizer = load_base()
    small = anti_expert_of(base, ASSETS, about()["layers"])
    model = ProxyTunedForCausalLM.from_members(
        base, expert_of(task, seed, work, small, tokenizer), small, tokenizer=tokenizer
    )
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt, _ in TASKS[task].asked(n_prompts)]
    found: dict[str, Any] = {"open": {}}
    for gate in TIMED:
        traces = [trace for prompt in prompts for trace in written(model, prompt, gate, return_trace=True).traces]
        shares = [1.0 if token.opened is None else float(token.opened > 0) for row in traces for token in row]
        found["open"][gate] = fmean(shares)
    for speculate in (False, "auto"):
        seconds(model, prompts, "none", speculate)  # the first answers take longer
        seen: dict[str, list[float]] = {gate: [] for gate in TIMED}
        for _ in range(rounds):
            taken = {gate: seconds(model, prompts, gate, speculate) for gate in TIMED}
            for gate in TIMED:
                seen[gate].append(taken[gate] / taken["none"])
        found["drafts" if speculate else "no drafts"] = {gate: median(ratios) for gate, ratios in seen.items()}
        print(f"time, {task}, {speculate=}: {found}", flush=True)
    return found


def written(model: Any, prompt: Tensor, gate: str, **more: Any) -> Any:
    """A greedy answer of N_NEW tokens."""
    options = {"do_sample": False, "max_new_tokens": N_NEW, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, gate=gate, **options, **more)


def seconds(model: Any, prompts: Sequence[Tensor], gate: str, speculate: Any) -> float:
    """Of all answers, one at a time."""
    start = time.perf_counter()
    for prompt in prompts:
        written(model, prompt, gate, speculate=speculate)
    return time.perf_counter() - start


# ---- what it shows -----------------------------------------------------------------------------------


def shares(by_seed: dict[str, Any], gate: str) -> tuple[float, list[float]]:
    """The share of tokens at which a gate is open, and the share of right answers by seed."""
    lines = [line[gate] for line in by_seed.values()]
    return fmean(fmean(line["open"]) for line in lines), [fmean(line["right"]) for line in lines]


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """One of right answers, and one of times as far as they are measured."""
    gates = {gate: None for task in PAIRS for gate in found[task]["count"]["0"]}
    rows = []
    for gate in gates:
        cells = []
        for task in PAIRS:
            by_seed = found[task]["count"]
            if gate not in by_seed["0"]:
                cells += ["", ""]
                continue
            right = [line[gate]["right"] for line in by_seed.values()]
            low, high = wilson(sum(map(sum, right)), sum(map(len, right)))
            each = ", ".join(str(sum(of)) for of in right)
            cells += [f"{100 * shares(by_seed, gate)[0]:.0f} %", f"{each} ({100 * low:.0f} – {100 * high:.0f})"]
        rows.append([f"`{gate}`", *cells])
    heads = [f"{what}, {task}" for task in PAIRS for what in ("steered", "right")]
    yield Table(["gate", *heads], rows, "right answers by seed, and the 95 % interval in per cent")
    if any("time" not in found[task] for task in PAIRS):
        return
    rows = []
    for gate in TIMED:
        of = [found[task]["time"] for task in PAIRS]
        cells = [
            cell
            for each in of
            for cell in (
                f"{100 * each['open'][gate]:.0f} %",
                f"{each['no drafts'][gate]:.2f}",
                f"{each['drafts'][gate]:.2f}",
            )
        ]
        rows.append([f"`{gate}`", *cells])
    heads = [f"{what}, {task}" for task in PAIRS for what in ("steered", "time", "time with drafts")]
    yield Table(["gate", *heads], rows, "seconds per token, as a ratio to those without a gate")


def figure(found: dict[str, Any], path: Path) -> list[Path]:
    """Right answers over the share of steered tokens: a panel for each pair, a line for each kind of gate."""
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 3.9), layout="constrained")
        for panel, (task, title) in zip(drawn.subplots(1, len(PAIRS)), PAIRS.items()):
            count = found[task]["count"]
            _, whole = shares(count, "none")
            panel.axhline(100 * fmean(whole), color="#999999", linestyle="--", linewidth=1, label="every token steered")
            for kind, color in zip(MARKERS, LINES):
                points = sorted(shares(count, gate) for gate in count["0"] if gate.startswith(f"{kind}="))
                across = [100 * opened for opened, _ in points]
                for at in range(len(whole)):
                    panel.scatter(across, [100 * right[at] for _, right in points], s=9, color=color, alpha=0.4)
                style = {"linestyle": "-" if kind in ("unsure", "entropy") else "", "marker": MARKERS[kind]}
                panel.plot(across, [100 * fmean(right) for _, right in points], color=color, label=kind, **style)
            panel.set_title(title, loc="left", fontweight="bold", fontsize=10)
            panel.set_xlabel("tokens steered, %")
            panel.set_ylabel("right answers, %")
            panel.set_xlim(0, 103)
            panel.set_ylim(bottom=-1)
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        return save(drawn, path)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/conflicts"), help="where the experts are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/gates.json"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", type=int, default=100, help="of each pair")
    parser.add_argument("--prompts", type=int, default=6, help="that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="count,time", help="the times only on an idle machine")
    parser.add_argument("--figure", type=Path, help=".png and .svg are added")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for task in PAIRS:
        kept = found.setdefault(task, {})
        for what in given.parts.split(","):
            if what not in kept:
                kept[what] = (
                    counted(task, seeds, given.problems, given.work)
                    if what == "count"
                    else timed(task, seeds[0], given.work, given.prompts, given.rounds)
                )
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(markdown(tables(found)))
    if given.figure:
        figure(found, given.figure)


if __name__ == "__main__":
    main()
