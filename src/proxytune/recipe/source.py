"""The place of a member: a directory, a file, or a repository on the hub."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from proxytune.errors import RecipeError

__all__ = ["Source", "rebase", "resolve"]


@dataclass(frozen=True)
class Source:
    """A place for ``from_pretrained``: a path or hub id, with revision and subfolder for the hub."""

    path: str
    revision: str | None = None
    subfolder: str = ""

    @property
    def is_local(self) -> bool:
        return os.path.exists(self.path)


def resolve(path: str, recipe: str | None, revision: str | None = None, recipe_revision: str | None = None) -> Source:
    """Find a member's ``path``: absolute, relative to the ``recipe``, or a hub id.

    Args:
        path: the path in the recipe.
        recipe: the directory of the recipe, or its place on the hub: ``owner/name``, ``owner/name/folder/in/it``, or a
            repository of one word, such as ``gpt2``.
        revision: the member's own.
        recipe_revision: the commit of the recipe; members in the same repository use it too.

    Raises:
        RecipeError: if it is clearly a path but does not exist.
    """
    expanded = os.path.expanduser(path)
    looks_like_path = expanded.startswith((".", os.sep)) or expanded.endswith(".gguf") or expanded.count("/") > 1
    if os.path.isabs(expanded):
        if not os.path.exists(expanded):
            raise RecipeError(f"member {path!r} does not exist; correct the path in the recipe")
        return Source(os.path.normpath(expanded))
    if recipe and os.path.isdir(recipe):
        beside = os.path.normpath(os.path.join(recipe, expanded))
        if os.path.exists(beside):
            return Source(beside)
        if looks_like_path:
            raise RecipeError(f"member {path!r} does not exist beside the recipe {recipe!r} (looked at {beside!r})")
    elif recipe and (looks_like_path or path.startswith("members/")):
        # A bundled recipe on the hub keeps its members in folders of its own repository.
        repository, folder = "/".join(recipe.split("/")[:2]), recipe.split("/")[2:]
        inside = posixpath.normpath(posixpath.join(*folder, expanded))
        if inside.startswith(".."):
            raise RecipeError(f"member {path!r} leads out of the repository {repository}; correct the recipe")
        return Source(repository, recipe_revision, "" if inside == "." else inside)
    elif os.path.exists(expanded):
        return Source(os.path.abspath(expanded))
    if looks_like_path:
        raise RecipeError(f"member {path!r} does not exist; give a path that does, or a hub id")
    return Source(path, revision)


def rebase(path: str | None, old: str | None, new: str | Path) -> str | None:
    """Change a ``path`` relative to directory ``old`` into one relative to directory ``new``; other paths stay as they
    are."""
    if path is None or os.path.isabs(os.path.expanduser(path)) or not old or not os.path.isdir(old):
        return path
    target = os.path.normpath(os.path.join(os.path.abspath(old), path))
    return os.path.relpath(target, os.path.abspath(new)) if os.path.exists(target) else path
