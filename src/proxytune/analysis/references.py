"""Prompts with gold answers: the file, and what every member gives each gold token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proxytune.answers.files import json_rows
from proxytune.answers.generation import Encoded
from proxytune.errors import ProxyTuneError

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Reference", "gold_ids", "read_gold", "read_references"]


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


def gold_ids(tokenizer: Any, encoded: Encoded, text: str) -> list[int]:
    """The ids of a gold answer, encoded separately from its prompt, without an end token.

    Raises:
        ProxyTuneError: for a text without a token, and for one that does not fit the members' contexts.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ProxyTuneError("a completion has no token")
    if encoded.room is not None and len(ids) > encoded.room:
        raise ProxyTuneError(f"a completion has {len(ids)} tokens, but there is room for {encoded.room}")
    return ids


@torch.inference_mode()
def read_gold(model: ProxyTunedForCausalLM, encoded: Encoded, ids: Sequence[int]) -> dict[str, Tensor]:
    """Every member's logits at the places of gold ``ids``, (1, n_tokens, n_vocab) each, from one pass of each.

    Args:
        encoded: the prompt. ids: the gold answer, at least one id; each is read after those before it.
    """
    read = torch.tensor([[*encoded.ids, *ids[:-1]]], device=model.device)
    own = {name: torch.tensor([row], device=model.device) for name, row in encoded.own.items()}
    more: dict[str, Any] = {"member_input_ids": own, "prompt_length": len(encoded.ids)} if own else {}
    return model(read, output_member_logits=True, use_cache=False, logits_to_keep=len(ids), **more).member_logits
