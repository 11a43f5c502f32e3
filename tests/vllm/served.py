"""What the tests of the real engine share: models that its CPU kernels take, engines, and the transformers engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tiny
from oracle import assert_same_tokens

# Attention on CPU has kernels for some head sizes alone, 32 the smallest: the tiny models of the other tests, widened.
WIDE: dict[str, dict[str, dict[str, int]]] = {
    "base": {"": {"hidden_size": 128}, "gpt2": {"n_embd": 128}, "gemma3": {"head_dim": 32}},
    "small": {"": {"hidden_size": 64}, "gpt2": {"n_embd": 64}, "gemma3": {"head_dim": 64}},
}
ROWS = [[1, 40, 77, 102, 9, 33, 250, 61], [1, 88, 15], [1, 7, 300, 41, 12], [1, 5, 5, 9, 200, 17, 18, 19, 20, 21, 22]]
N_NEW = 24  # past the sliding windows


def wide(directory: Path, family: str, size: str, seed: int, **config: Any) -> Path:
    """A tiny model that vLLM's CPU kernels take."""
    widths = WIDE[size].get(family, WIDE[size][""])
    return tiny.write_model(directory, family, size, seed, **{**widths, **config})


def expert(name: str, towards: str | None, away: str | None, alpha: float = 1.0, **adapter: str) -> dict[str, Any]:
    """A term of a recipe that lies beside its members."""
    sides = {
        "expert": towards and {"model": f"../{towards}", **adapter},
        "anti_expert": away and {"model": f"../{away}"},
    }
    return {"name": name, "alpha": alpha, **{side: member for side, member in sides.items() if member}}


@contextmanager
def engine(recipe: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine of a recipe, gone at the end."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

    from vllm import LLM

    if dispatcher._registry:  # vLLM is made for one engine a process, and trips over wrapping its kernels once more
        current_platform.register_triton_kernel_overrides = lambda: None
    made = LLM(
        model=str(recipe),
        **{"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "disable_log_stats": True, **options},
    )
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, rows: list[list[int]], n_new: int = N_NEW, alphas: Any = None, **params: Any) -> list[list[int]]:
    """Greedy continuations; ``alphas``: the ``extra_args`` of each row."""
    from vllm import SamplingParams

    each = [
        SamplingParams(**{"temperature": 0.0, "max_tokens": n_new, "ignore_eos": True, "extra_args": extra, **params})
        for extra in (alphas or [None] * len(rows))
    ]
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], each, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class Reference:
    """The transformers engine on the same recipe."""

    def __init__(self, recipe: Path) -> None:
        from proxytune import ProxyTunedForCausalLM

        self.model = ProxyTunedForCausalLM.from_pretrained(recipe, dtype="float32")

    def greedy(
        self, rows: list[list[int]], n_new: int = N_NEW, alpha: Any = None, allowed: list[int] | None = None
    ) -> list[tuple[list[int], Any]]:
        """Each row's tokens and the logits that they were chosen from.

        ``alpha``: (n_rows, n_experts). ``allowed``: the only ids that may be chosen.
        """

        def mask(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            keep = torch.zeros(logits.shape[-1], dtype=torch.bool)
            keep[allowed] = True
            return logits.masked_fill(~keep, -torch.inf)

        out = self.model.generate(
            **tiny.padded(rows),
            do_sample=False,
            max_new_tokens=n_new,
            eos_token_id=None,
            pad_token_id=tiny.PAD,
            alpha=None if alpha is None else torch.tensor(alpha),
            logits_processor=[] if allowed is None else [mask],
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[:, -n_new:].tolist()
        return [(tokens[row], [step[row] for step in out.scores]) for row in range(len(rows))]


def assert_all_same(ours: list[list[int]], reference: list[tuple[list[int], Any]]) -> None:
    """A first difference counts where the top two logits lie more than 1e-3 apart."""
    assert len(ours) == len(reference)
    for tokens, expected in zip(ours, reference):
        assert_same_tokens(tokens, expected)


def counted(llm: Any, name: str) -> float:
    """The value of one of vLLM's counters."""
    return float(sum(metric.value for metric in llm.get_metrics() if metric.name == name))
