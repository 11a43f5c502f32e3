"""The real engine: vLLM's CPU build, or its own on a GPU. ``make test-vllm`` alone collects this directory."""

from __future__ import annotations

import os

# Before vLLM is imported, which reads most of them once.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# The engine in this process, but for what is about processes: starting one takes seconds then.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import tiny
from support.served import expert, wide


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Under ``make test-vllm`` a skipped test is a failure: the environment is made for these tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("PROXYTUNE_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("a test was skipped, which `make test-vllm` counts as a failure", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_wrapped_once() -> None:
    """vLLM wraps its kernels when an engine starts, and trips over those of an earlier one and over numba's modules."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.register_triton_kernel_overrides()
        current_platform.register_triton_kernel_overrides = lambda: None


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: Any) -> SimpleNamespace:
    """Members and recipes on disk; ``recipe(name, **values)`` writes one more."""
    root = tmp_path_factory.mktemp("shelf")
    for seed, family in enumerate(tiny.FAMILIES):
        wide(root / family, family, "base", seed)
        wide(root / f"{family}-small", family, "small", 10 + seed)
        wide(root / f"{family}-anti", family, "small", 20 + seed)

    def recipe(name: str, base: Any = "llama", tokenizer_: Any = True, **values: Any) -> Path:
        base = {"model": f"../{base}"} if isinstance(base, str) else base
        values.setdefault("experts", [expert("expert", "qwen2-small", "qwen2-anti")])
        return tiny.write_recipe_alone(root / name, {"base": base, **values}, tokenizer_=tokenizer_)

    return SimpleNamespace(root=root, recipe=recipe)
