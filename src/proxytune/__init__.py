"""Steer a language model at decoding time with two small ones (proxy-tuning, 2401.08565).

Importing the package registers recipes with transformers, so that ``AutoModelForCausalLM.from_pretrained`` and
all that is built on it take a recipe as they take any other model.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from proxytune.config import Expert, Member, Prompt, ProxyTuneConfig
from proxytune.errors import (
    AlphaError,
    MemberError,
    PromptError,
    ProxyTuneError,
    RecipeError,
    VocabularyError,
)
from proxytune.modeling import ProxyTunedCache, ProxyTunedForCausalLM, ProxyTunedOutput
from proxytune.recipe import load_recipe, write_recipe

__version__ = "0.1.0"

__all__ = [
    "AlphaError",
    "Expert",
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
    "VocabularyError",
    "load_recipe",
    "write_recipe",
]

AutoConfig.register(ProxyTuneConfig.model_type, ProxyTuneConfig, exist_ok=True)
AutoModelForCausalLM.register(ProxyTuneConfig, ProxyTunedForCausalLM, exist_ok=True)
