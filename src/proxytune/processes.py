"""A training run in several processes, as ``accelerate launch`` and ``torchrun`` start them.

Each process holds the whole model and takes its share of each batch. The main process alone writes files and prints
anything. (Needs no torch.)
"""

from __future__ import annotations

import os

from proxytune.errors import ProxyTuneError

__all__ = ["check_launch", "is_main", "n_processes"]

# Variables that accelerate sets to split a model over processes; here every process holds the whole model.
SHARED_OUT = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron": "ACCELERATE_USE_MEGATRON_LM",
}


def n_processes() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "")
    return max(1, int(count)) if count.isdecimal() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return n_processes() == 1 or os.environ.get("RANK", "0") == "0"


def check_launch() -> None:
    """Refuse what a launcher can ask for but was not tested.

    Raises:
        ProxyTuneError: for several machines, for a model that is split over processes, and if ``WORLD_SIZE`` was not
            set by a launcher.
    """
    if n_processes() > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise ProxyTuneError(
            f"WORLD_SIZE is {n_processes()}, but RANK or LOCAL_RANK is not set; start the run with accelerate launch, "
            "or unset WORLD_SIZE"
        )
    if os.environ.get("LOCAL_WORLD_SIZE", str(n_processes())) != str(n_processes()):
        raise ProxyTuneError("training takes several processes on one machine, not several machines")
    for name, variable in SHARED_OUT.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ProxyTuneError(
                f"training cannot use {name}: every process holds the whole model; leave it out of accelerate's config"
            )
