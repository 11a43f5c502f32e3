"""Prompts with gold answers, as a file holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxytune.answers.files import json_rows

__all__ = ["Reference", "read_references"]


@dataclass(frozen=True)
class Reference:
    """A prompt and its gold answers; where: its place in a file, in words."""

    prompt: str
    completions: tuple[str, ...]
    where: str = ""


def read_references(lines: Iterable[bytes]) -> tuple[list[Reference], list[str]]:
    """Read ``{"prompt": TEXT, "completion": TEXT or a list of texts}`` lines. Broken lines are returned as messages."""
    references, broken = [], []
    for row in json_rows(lines):
        value = row.value if isinstance(row.value, dict) else {}
        prompt, gold = value.get("prompt"), value.get("completion")
        texts = tuple(gold) if isinstance(gold, list) else (gold,)
        if row.broken is not None:
            broken.append(f"{row.where}: {row.broken}")
        elif not isinstance(prompt, str) or not prompt.strip():
            broken.append(f'{row.where}: its "prompt" is missing or is not a text')
        elif not texts or not all(isinstance(text, str) and text for text in texts):
            broken.append(f'{row.where}: its "completion" is missing, or is neither a text nor a list of texts')
        else:
            references.append(Reference(prompt, texts, row.where))
    return references, broken
