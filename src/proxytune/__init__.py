"""Steer a language model at decoding time with two small ones (proxy-tuning, 2401.08565).

Importing the package registers recipes with transformers, so that ``AutoModelForCausalLM.from_pretrained`` and
everything built on it load a recipe like any other model. It does this without importing transformers, which takes
seconds: the names below are imported on first use, and recipes are registered with ``AutoConfig`` as soon as other code
imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.analysis.explain import explain
    from proxytune.analysis.explanation import Explanation
    from proxytune.answers.text import generate
    from proxytune.cache import ProxyTunedCache
    from proxytune.decoding.trace import TokenTrace
    from proxytune.errors import (
        AlphaError,
        MemberError,
        PromptError,
        ProxyTuneError,
        RecipeError,
        Unfinished,
        VocabularyError,
    )
    from proxytune.generation_mixin import TracedOutput
    from proxytune.model import ProxyTunedForCausalLM, ProxyTunedOutput
    from proxytune.recipe.config import ProxyTuneConfig
    from proxytune.recipe.parts import Expert, Member, Prompt
    from proxytune.recipe.store import load_recipe, write_recipe

__version__ = "0.1.0"

__all__ = [
    "AlphaError",
    "Expert",
    "Explanation",
    "Member",
    "MemberError",
    "Prompt",
    "PromptError",
    "ProxyTuneConfig",
    "ProxyTuneError",
    "ProxyTunedCache",
    "ProxyTunedForCausalLM",
    "ProxyTunedOutput",
    "RecipeError",
    "TokenTrace",
    "TracedOutput",
    "Unfinished",
    "VocabularyError",
    "explain",
    "generate",
    "load_recipe",
    "write_recipe",
]

_HOME = {
    "analysis.explain": ("explain",),
    "analysis.explanation": ("Explanation",),
    "answers.text": ("generate",),
    "cache": ("ProxyTunedCache",),
    "decoding.trace": ("TokenTrace",),
    "generation_mixin": ("TracedOutput",),
    "recipe.config": ("ProxyTuneConfig",),
    "recipe.parts": ("Expert", "Member", "Prompt"),
    "errors": (
        "AlphaError",
        "MemberError",
        "PromptError",
        "ProxyTuneError",
        "RecipeError",
        "Unfinished",
        "VocabularyError",
    ),
    "model": ("ProxyTunedForCausalLM", "ProxyTunedOutput"),
    "recipe.store": ("load_recipe", "write_recipe"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    for module, names in _HOME.items():
        if name in names:
            globals()[name] = getattr(importlib.import_module(f"proxytune.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module 'proxytune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _WhenImported(MetaPathFinder):
    """Imports :mod:`proxytune.recipe.config`, which registers itself, right after transformers' ``AutoConfig``."""

    name = "transformers.models.auto.configuration_auto"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("proxytune.recipe.config")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _WhenImported.name in sys.modules:
    importlib.import_module("proxytune.recipe.config")
else:
    sys.meta_path.insert(0, _WhenImported())
