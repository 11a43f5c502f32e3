"""The embedded demo: proxy-tuning on a real language model, small enough to ship.

assets.py    what is shipped (int8 layers, a LoRA adapter), and how it becomes models in a cache
run.py       the evaluation of its task (evaluation/problems.py), shown live
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.demo.assets import cache_root, materialize

if TYPE_CHECKING:
    from proxytune.demo.run import DemoResult

__all__ = ["cache_root", "demo_recipe", "materialize", "run_demo"]


def demo_recipe(cache_dir: Path | None = None) -> Path:
    """The embedded recipe's directory, its members beside it; made in the cache on first use."""
    return materialize(cache_dir) / "recipe"


def run_demo(problems: int | None = None, seed: int = 0, json_path: Path | None = None, **options: Any) -> DemoResult:
    """Show the demo; see :func:`proxytune.demo.run.run_demo`, which is imported only now."""
    from proxytune.demo.run import run_demo as run

    return run(problems, seed, json_path, **options)
