"""``proxytune train``: trains M+ from M- with TRL's ``SFTTrainer``, alone or inside the mixture, and makes a recipe of
it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from proxytune.training.options import TrainingOptions

if TYPE_CHECKING:
    from proxytune.training.run import Trained, train

__all__ = ["Trained", "TrainingOptions", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command line needs only the options."""
    if name in __all__:
        return getattr(importlib.import_module("proxytune.training.run"), name)
    raise AttributeError(f"module 'proxytune.training' has no attribute {name!r}")
