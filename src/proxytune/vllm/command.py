"""``proxytune serve --engine vllm``: the full command that serves a recipe. Importing this module needs no vLLM."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from proxytune.errors import MemberError, RecipeError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.vllm import check_version, installed_version
from proxytune.vllm.plan import parts_of, reads_own_prompts, refuse

__all__ = ["serve_command", "server_of"]


def serve_command(
    config: ProxyTuneConfig,
    options: Sequence[str] = (),
    *,
    name: str | None = None,
    draft: str | None = None,
    draft_tokens: int | None = None,
) -> list[str]:
    """The words of the command that serves the recipe.

    Args:
        options: vLLM's own options, passed on unchanged.
        name: what the user calls the recipe, and requests too, unless an option gives another name. By default that is
            the recipe's path, which nobody knows of an embedded one.
        draft: the expert that drafts for the mixture; vLLM loads and runs it a second time.
        draft_tokens: number of tokens per draft, by default 4.

    Raises:
        ProxyTuneError: if vLLM is missing or not supported.
        MemberError: see :func:`proxytune.vllm.plan.refuse`.
    """
    if draft is not None and reads_own_prompts(config):
        raise RecipeError("--draft does not fit this recipe, because members read prompts of their own; leave it out")
    drafting = [] if draft is None else ["--speculative-config", json.dumps(_draft(config, draft, draft_tokens))]
    refuse(config)
    check_version(installed_version())
    path = str(config.name_or_path)
    named = any(option.startswith("--served-model-name") for option in options)
    called = ["--served-model-name", name] if name not in (None, path) and not named else []
    return [*server_of(path), *called, *drafting, *options]


def server_of(model: str) -> list[str]:
    """The words that serve ``model``, a recipe or any other."""
    try:
        version("vllm")
    except PackageNotFoundError:  # PyPI's CPU build: its script looks for this name
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm", "serve", model]


def _draft(config: ProxyTuneConfig, draft: str, n_tokens: int | None) -> dict[str, str | int]:
    experts = [expert.name for expert in config.expert_list if expert.expert is not None]
    if draft not in experts:
        raise RecipeError(f"--draft {draft!r} is not an expert of the recipe; it has {', '.join(experts) or 'none'}")
    part = next(part for part in parts_of(config) if f"{draft}.expert" in part.names)
    if part.adapter is not None:
        raise MemberError(f"expert {draft!r} is an adapter, but vLLM drafts with whole models; merge it with PEFT")
    found: dict[str, str | int] = {
        "method": "draft_model",
        "model": part.source.path,
        "num_speculative_tokens": 4 if n_tokens is None else n_tokens,
    }
    return found | ({"revision": part.source.revision} if part.source.revision else {})
