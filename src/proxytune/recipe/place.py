"""Where a recipe is: checked without torch or transformers, whose imports take seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from proxytune.errors import RecipeError
from proxytune.recipe.alpha import resolve_alpha
from proxytune.recipe.parts import parse_experts

__all__ = ["MODEL_TYPE", "check_alpha", "check_kind", "check_place", "check_target", "named_recipe"]

MODEL_TYPE = "proxytune"
NAMED_RECIPES = "proxytune.recipes"


def named_recipe(name: str) -> Any:
    """The entry point of a named recipe of some package (``demo``), or None. Calling it gives the directory."""
    path = os.path.expanduser(name)
    return None if os.path.isdir(path) else next(iter(entry_points(group=NAMED_RECIPES, name=path)), None)


def check_place(recipe: str | Path, subfolder: str = "") -> None:
    """Check that ``recipe`` can be one: a named recipe, a directory with a recipe's config.json, or a hub id.

    Raises:
        RecipeError: if it cannot be one.
    """
    if named_recipe(os.fspath(recipe)) is not None:
        return
    path = os.path.expanduser(os.fspath(recipe))
    if os.path.isfile(path):
        raise RecipeError(f"{path!r} is a file; a recipe is a directory with a config.json")
    if not os.path.isdir(path):
        if path.startswith((".", "/")) or path.count("/") != 1:
            raise RecipeError(f"there is no recipe at {path!r}; make one with `proxytune new`")
        return
    file = Path(path, subfolder, "config.json")
    if not file.is_file():
        raise RecipeError(f"{path!r} has no config.json, so it is not a recipe; make one with `proxytune new`")
    _read(file, path)


def check_alpha(recipe: str | Path, alpha: float | Mapping[str, float] | None) -> None:
    """Check that an alpha names experts of a recipe in a directory. Other recipes are checked at loading.

    Raises:
        AlphaError: for an unknown name.
        RecipeError: if the recipe's experts cannot be read.
    """
    path = os.path.expanduser(os.fspath(recipe))
    if alpha is None or not os.path.isdir(path):
        return
    experts = parse_experts(_read(Path(path, "config.json"), path).get("experts"))
    resolve_alpha(alpha, [expert.name for expert in experts], [expert.alpha for expert in experts])


def _read(file: Path, path: str) -> dict[str, Any]:
    """Read the config.json of the recipe at ``path``."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {path!r} cannot be read: its config.json is not valid JSON ({error})") from error
    values = values if isinstance(values, dict) else {}
    check_kind(values, path)
    return values


def check_kind(values: Mapping[str, Any], path: str) -> None:
    """Check that a config.json is that of a recipe.

    Raises:
        RecipeError: if it belongs to another model.
    """
    if (kind := values.get("model_type")) != MODEL_TYPE:
        what = f"a {kind} model" if kind else "a directory whose config.json names no model_type"
        raise RecipeError(f"{path!r} is {what}, not a recipe; `proxytune new DIR --base {path}` makes a recipe from it")


def check_target(directory: Path, force: bool) -> None:
    """Check that a recipe may be written into a directory; ``force`` allows one that is not empty.

    Raises:
        RecipeError: if it must not.
    """
    if directory.is_file():
        raise RecipeError(f"{str(directory)!r} is a file; give the name of a new directory")
    if not force and directory.is_dir() and any(directory.iterdir()):
        raise RecipeError(f"{str(directory)!r} is not empty; give another directory, or --force to write into it")
