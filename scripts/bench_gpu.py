"""What steering costs on a GPU, measured on models of real shapes with random weights: `make bench-gpu`.

    python scripts/bench_gpu.py --pair 32B/1.5B --acceptance 0.6,0.8 --json gpu.json

No checkpoint is needed, since time depends on shapes. One thing does not: how many drafts are accepted. Random members
agree on nothing, so here a coin of a stated probability accepts each draft instead of the mixture. Drafting, verifying,
mixing, choosing and taking back are the work of a real run; the text is nonsense, and is not compared. The speculative
arm drafts the number of tokens that the cost model calls best at that acceptance, and copies none from the text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from predict_pairs import SHAPES, llama2
from proxytune import ProxyTunedForCausalLM, ProxyTuneError
from proxytune.cli.shared import show
from proxytune.cli.speed import bench_tables
from proxytune.decoding import sampling
from proxytune.speed.bench import Subject, run_bench
from proxytune.speed.options import BenchOptions

TINY = {"tiny base": llama2(64, 128, 4, 4, 2), "tiny": llama2(32, 64, 2, 2, 2)}  # for a test without a GPU
PAIRS = {
    "13B/7B": ("Llama-2-13B", "Llama-2-7B"),
    "32B/1.5B": ("Qwen2.5-32B", "Qwen2.5-1.5B"),
    "70B/7B": ("Llama-2-70B", "Llama-2-7B"),
    "tiny": ("tiny base", "tiny"),
}
ARMS = ("base", "plain_loop", "composite", "speculative")
MARGIN = 4 * 2**30  # bytes for caches and activations, beside the weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each pair that fits; the exit status is 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="13B/7B,32B/1.5B,70B/7B", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--acceptance", default="0.6,0.8", help="probabilities of the coin")
    parser.add_argument("--drafts", type=int, metavar="N", help="of a cycle; by default what the cost model calls best")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--lengths", default="64/128", help="PROMPT/OUTPUT,... in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        found = [one for name in given.pair.split(",") for one in measure_pair(name, given)]
        if not found:
            raise ProxyTuneError("none of these pairs fits into the device's memory")
    except (ProxyTuneError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


def measure_pair(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch size at every acceptance, printed and as plain values; none where the pair does not fit."""
    if name not in PAIRS:
        raise ProxyTuneError(f"no pair is called {name!r}; known are {', '.join(PAIRS)}")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ProxyTuneError("torch sees no CUDA device here; --device cpu --pair tiny tries the bench itself")
    dtype = getattr(torch, given.dtype)
    shapes = {**SHAPES, **TINY}
    configs = [shapes[part] for part in (PAIRS[name][0], PAIRS[name][1], PAIRS[name][1])]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(map(n_parameters, configs)) * dtype.itemsize + MARGIN
        if needed > free:
            print(f"{name} is left out: it needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free\n")
            return []
    base, expert, anti_expert = (random_model(config, seed, device, dtype) for seed, config in enumerate(configs))
    model = ProxyTunedForCausalLM.from_members(base, expert, anti_expert)
    subject = Subject(given.dtype, model, model)
    found = []
    for n_batch, acceptance in itertools.product(
        map(int, given.batch.split(",")), map(float, given.acceptance.split(","))
    ):
        n_drafts = given.drafts or model.costs.best_drafts(acceptance, n_batch)
        arms = ARMS if n_drafts else ARMS[:-1]
        options = BenchOptions(
            (n_batch,),
            tuple(given.lengths.split(",")),
            arms,
            repeats=given.repeats,
            minutes=0,
            speculate=n_drafts or "auto",
        )
        said = f"{n_drafts} drafts a cycle" if n_drafts else "no number of drafts is predicted to pay"
        print(
            f"## {name}, random weights, batch {n_batch}, each draft accepted with probability {acceptance}: {said}\n"
        )
        with mock.patch.object(sampling, "accept_greedy", coin(acceptance)):
            result = run_bench(
                [subject], options, itertools.repeat(("x" * 64,) * 2), tokenizer=RandomTokens(), compare=False
            )
        show(*bench_tables(result))
        found.append({"pair": name, "coin": acceptance, "drafts": n_drafts, **result.to_json()})
        if result.interrupted:
            break
    return found


def random_model(config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of this shape, whose weights never leave the device."""
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def n_parameters(config: Any) -> int:
    """Of a model of this shape, counted without storage."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def coin(probability: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """In place of :func:`proxytune.decoding.acceptance.accept_greedy`: each draft is accepted with this probability."""

    def accept(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        best = scores.argmax(dim=-1)  # as the rule does
        lucky = torch.rand(drafts.shape, device=drafts.device) < probability
        n_accepted = lucky.long().cumprod(dim=1).sum(dim=1)
        at = n_accepted.clamp(max=drafts.shape[1] - 1)
        return n_accepted, best.gather(1, at[:, None]).squeeze(1)

    return accept


class RandomTokens:
    """In place of a tokenizer: a random id for each character."""

    bos_token_id = None
    source = random.Random(0)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """The ids, as a tokenizer returns them."""
        return SimpleNamespace(input_ids=[self.source.randrange(3, 30000) for _ in text])


if __name__ == "__main__":
    sys.exit(main())
