"""The embedded demo: proxy-tuning on a real language model, small enough to ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxytune.demo.assets import FACTS, WORD_PROBLEMS, cache_root, materialize

__all__ = ["cache_root", "demo_recipe", "materialize", "run_demo", "word_problems_recipe"]


def demo_recipe(cache_dir: Path | None = None) -> Path:
    """The directory of the embedded recipe ``demo``, beside its members. It is made in the cache on first use."""
    return materialize(cache_dir) / FACTS.recipe


def word_problems_recipe(cache_dir: Path | None = None) -> Path:
    """The directory of the embedded recipe ``demo-word-problems``: same base and anti-expert, another expert."""
    return materialize(cache_dir) / WORD_PROBLEMS.recipe


def __getattr__(name: str) -> Any:
    """Import ``run_demo`` on first use, because it imports torch and rich."""
    if name == "run_demo":
        from proxytune.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
