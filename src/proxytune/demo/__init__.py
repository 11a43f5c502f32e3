"""The embedded demo: proxy-tuning on a real language model, small enough to ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxytune.demo.assets import FACTS, WORD_PROBLEMS, cache_root, materialize

__all__ = ["cache_root", "demo_recipe", "materialize", "run_demo", "word_problems_recipe"]


def demo_recipe(cache_dir: Path | None = None) -> Path:
    """The directory of the embedded recipe ``demo``, its members beside it; made in the cache on first use."""
    return materialize(cache_dir) / FACTS.recipe


def word_problems_recipe(cache_dir: Path | None = None) -> Path:
    """The same of the embedded recipe ``demo-word-problems``: the same base and anti-expert, and another expert."""
    return materialize(cache_dir) / WORD_PROBLEMS.recipe


def __getattr__(name: str) -> Any:
    """``run_demo``, imported when it is asked for: it needs torch's and rich's weight."""
    if name == "run_demo":
        from proxytune.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
