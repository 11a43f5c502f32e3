"""The manifest of a run: what decides its predictions. It is compared when a run is continued."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.answers.journal import Journal, write_whole
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.answering import TaskPlan
from proxytune.evaluation.options import EvaluationOptions
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase

__all__ = ["manifest_of", "write_manifest"]


def manifest_of(
    config: ProxyTuneConfig,
    options: EvaluationOptions,
    loading: LoadingOptions,
    plans: Sequence[TaskPlan],
    what: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The description of a run: ``decides`` and ``tasks`` determine its predictions, the rest is for the record.

    ``config`` is the command's options, as --config reads them.
    """
    experts = [{key: value for key, value in expert.items() if key != "alpha"} for expert in config.experts]
    return {
        "decides": {
            "command": "sweep" if "sweep" in what else "eval",
            "base": config.base,
            "experts": experts,
            "combine": config.combine,
            "gate": config.gate,
            "plausibility": config.plausibility,
            "alpha": what.get("sweep", dict(zip(config.expert_names, config.alphas_of(options.alpha)))),
            "tuned": options.tuned,
            "mean_weight": options.mean_weight,
            "steering_vector": _vector_hash(options),
            "seed": options.seed,
            "dtype": loading.dtype,
            "engine": options.engine,
            "pack": loading.pack,
            **({"way": loading.way} if isinstance(config.base_member, ApiBase) else {}),
        },
        "tasks": {
            plan.name: {
                "limit": options.limit,
                "examples": plan.examples,
                "samples": plan.repeats,
                "version": plan.metadata.get("version"),
                "data_sha256": plan.data_sha256,
            }
            for plan in plans
        },
        **({"arms": list(what["arms"])} if "arms" in what else {}),
        "config": dict(settings or {}),
        "recipe": str(config.name_or_path),
        "data": options.data or os.environ.get("PROXYTUNE_DATA") or "hub",
        "batch_size": options.rows_per_batch,
        "engine_options": dict(options.engine_options),
        "speculate": loading.speculate,
        "versions": _versions(),
    }


def _vector_hash(options: EvaluationOptions) -> str | None:
    """A hash of the steering vector's file, with its strength."""
    if options.vector is None:
        return None
    file, strength = options.vector
    return f"{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]} * {strength:g}"


def _versions() -> dict[str, str]:
    packages = ("proxytune", "torch", "transformers", "lm_eval", "datasets", "peft", "numpy")
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **found}


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Start a run in ``out``, or continue the one there.

    Existing predictions fix their settings: a task's predictions those of the task, any prediction those of the whole
    run, and the tuned arm's predictions the name of that model.

    Raises:
        ProxyTuneError: if a fixed setting differs; it names the setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
            decided, tasks = {"engine": "transformers", **before["decides"]}, dict(before["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProxyTuneError(f"{path} is not a manifest of this command; choose another --output") from error
        predicted = {name: _predicted(out / name) for name in tasks}
        arms = set().union(*predicted.values())
        tasks = {name: task for name, task in tasks.items() if predicted[name]}
        for setting, arm in SETTINGS.items():
            was = decided.get(setting) if arm in arms else None
            now = manifest["decides"][setting]
            manifest["decides"][setting] = was if now is None else now
            decided[setting] = now if was is None else was
        if arms:
            _refuse_others(out, "", decided, manifest["decides"])
        for name in set(tasks) & set(manifest["tasks"]):
            _refuse_others(out, f"{name}: ", tasks[name], manifest["tasks"][name])
        manifest = {**manifest, "tasks": {**tasks, **manifest["tasks"]}}
        if "arms" in manifest:
            kept = [arm for arm in before.get("arms", []) if arm in arms]
            manifest["arms"] = list(dict.fromkeys([*kept, *manifest["arms"]]))
    write_whole(path, json.dumps(manifest, indent=2) + "\n")


# Settings of one arm only -> that arm.
SETTINGS = {"tuned": "tuned", "mean_weight": "weighted_mean", "steering_vector": "steering_vector"}


def _predicted(folder: Path) -> set[str]:
    """The arms, or the alphas of a sweep, that have a prediction in a task's folder."""
    files = (path for path in folder.glob("*.jsonl") if not path.name.endswith(".trace.jsonl"))
    return {path.stem for path in files if Journal(path).read().lines}


FOLLOWS = {"limit": ("examples", "data_sha256"), "examples": ("data_sha256",), "samples": ("data_sha256",)}


def _refuse_others(out: Path, said: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = {key for key in now if before.get(key) != now[key]}
    changed -= {result for cause in changed for result in FOLLOWS.get(cause, ())}
    differing = []
    for key in (key for key in now if key in changed):
        texts = (json.dumps(value) for value in (before.get(key), now[key]))
        was, is_now = (text if len(text) <= 80 else f"{text[:77]}…" for text in texts)
        differing.append(f"{said}{key.replace('_', ' ')} {was}, now {is_now}")
    if differing:
        raise ProxyTuneError(
            f"{out} was started with {'; '.join(differing)}; use that again, or choose another --output"
        )
