"""Predict what steering costs for common pairs of models, from their public shapes: the table in docs/speed.md.

    python scripts/predict_pairs.py

Each pair becomes a recipe of config files alone, for which `proxytune plan` needs no weights. All in bfloat16 on a GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.parts import Expert, Member
from proxytune.speed.options import PlanOptions
from proxytune.speed.plan import plan_recipe

ACCEPTANCES = (0.6, 0.8)
LLAMA: dict[str, Any] = {"vocab_size": 32000, "dtype": "bfloat16", "max_position_embeddings": 4096}
QWEN: dict[str, Any] = {"dtype": "bfloat16", "max_position_embeddings": 32768}


def llama2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """A Llama-2, from the numbers in its config.json."""
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, **LLAMA,
    )  # fmt: skip


def qwen25(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Qwen2Config:
    """A Qwen2.5, likewise."""
    return Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, **QWEN,
    )  # fmt: skip


SHAPES: dict[str, Any] = {
    "Llama-2-70B": llama2(8192, 28672, 80, 64, 8),
    "Llama-2-13B": llama2(5120, 13824, 40, 40, 40),
    "Llama-2-7B": llama2(4096, 11008, 32, 32, 32),
    "Qwen2.5-32B": qwen25(152064, 5120, 27648, 64, 40, 8, False),
    "Qwen2.5-1.5B": qwen25(151936, 1536, 8960, 28, 12, 2, True),
}
PAIRS = (("Llama-2-70B", "Llama-2-7B"), ("Qwen2.5-32B", "Qwen2.5-1.5B"), ("Llama-2-13B", "Llama-2-7B"))


def main() -> None:
    """Print the table as Markdown."""
    print("| pair | acceptance | naive, to base | with drafts, to base | with drafts, to naive | drafts |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:

        def member(name: str, role: str) -> Member:
            place = Path(folder) / role / name
            SHAPES[name].save_pretrained(place)
            return Member(model=str(place))

        for base, small in PAIRS:
            expert = Expert(name="expert", expert=member(small, "expert"), anti_expert=member(small, "anti"))
            recipe = ProxyTuneConfig(base=member(base, "base"), experts=[expert])
            for found in plan_recipe(recipe, PlanOptions(ACCEPTANCES, (1,), device="cuda")).predictions:
                print(
                    f"| {base} / {small} | {found.acceptance:g} | {1 / found.naive:.2f} | {found.ratio_to_base:.2f} "
                    f"| {found.ratio_to_naive:.2f} | {found.n_drafts} |"
                )


if __name__ == "__main__":
    main()
