"""The embedded demo: proxy-tuning on a real language model, small enough to ship."""

from __future__ import annotations

from pathlib import Path

from proxytune.demo.assets import FACTS, WORD_PROBLEMS, cache_root, materialize

__all__ = ["cache_root", "demo_recipe", "materialize", "word_problems_recipe"]


def demo_recipe(cache_dir: Path | None = None) -> Path:
    """The directory of the embedded recipe ``demo``, beside its members. It is made in the cache on first use."""
    return materialize(cache_dir) / FACTS.recipe


def word_problems_recipe(cache_dir: Path | None = None) -> Path:
    """The directory of the embedded recipe ``demo-word-problems``: same base and anti-expert, another expert."""
    return materialize(cache_dir) / WORD_PROBLEMS.recipe
