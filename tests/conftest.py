"""Fixtures that many files share. Nothing here reaches the network."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers.utils import logging

from proxytune.vllm import installed_version
from support import tiny

# The tests of the real engine run in vLLM's own environment: make test-vllm.
collect_ignore = [] if installed_version() else ["vllm"]

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_searched():
    """An evaluation collects garbage after each arm, and would search all libraries and all tests each time: 0.3 s."""
    if not installed_version():
        gc.collect()
        gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # hypothesis, where it is imported only now, looks for who refers to a random generator


@pytest.fixture(scope="session")
def data() -> Path:
    """The real data that ``PROXYTUNE_DATA`` names."""
    place = os.environ.get("PROXYTUNE_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("PROXYTUNE_DATA does not name a directory of real data")
    return Path(place)


@pytest.fixture
def no_progress():
    """No bars of transformers' own, as the command line's ``main`` has it in a process of its own."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def trio() -> SimpleNamespace:
    """Models in memory, of unequal sizes and families: never change them."""
    return SimpleNamespace(
        base=tiny.llama("base", 1), expert=tiny.qwen2("small", 2), anti_expert=tiny.qwen2("small", 3)
    )


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """A directory of written things: ``base``, ``expert``, ``anti``, ``adapter`` (on anti), ``recipe``. Read only."""
    root = tmp_path_factory.mktemp("shelf")
    tiny.write_recipe(root / "recipe")
    tiny.write_adapter(root / "adapter", root / "anti")
    return root
