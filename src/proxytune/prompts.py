"""What each member is shown: from one prompt to the ids of every member that has a prompt of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.config import Prompt
from proxytune.errors import PromptError

__all__ = ["Prompter"]


class Prompter:
    """Makes the members' own prompts.

    Args:
        tokenizer: the base's tokenizer, which made the ids that the caller gives.
        own: member name -> (its prompt, its tokenizer), for the members whose prompt is not ``raw``.
    """

    def __init__(self, tokenizer: Any, own: Mapping[str, tuple[Prompt, Any]]) -> None:
        self.tokenizer = tokenizer
        self.own = dict(own)

    def from_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Sequence[Sequence[int]]]:
        """Render every member's own prompt from the raw ids, by way of their text.

        Args:
            input_ids: shape = (n_batch, n_columns), left-padded. attention_mask: the same shape, or None.

        Raises:
            PromptError: if the ids of some row do not survive decoding and encoding again, since the members
                would then be shown another text than the base.
        """
        if self.tokenizer is None:
            raise PromptError(
                "members have prompts of their own, but no tokenizer is known to render them; "
                "pass `member_input_ids`, or give `tokenizer` to from_members"
            )
        texts = []
        for row, ids in enumerate(input_ids.tolist()):
            kept = ids if attention_mask is None else [i for i, m in zip(ids, attention_mask[row].tolist()) if m]
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            again = self.tokenizer(text)["input_ids"]
            if again != kept:
                at = next((i for i, (a, b) in enumerate(zip(kept, again)) if a != b), min(len(kept), len(again)))
                raise PromptError(
                    f"the prompt of row {row} is not what its text encodes to again (they differ at token {at}), so "
                    "the members' own prompts cannot be made from it; pass `member_input_ids`"
                )
            texts.append(text)
        return self.from_texts(texts)

    def from_texts(self, texts: Sequence[str]) -> dict[str, Sequence[Sequence[int]]]:
        """Member name -> the ids of its own prompt, one list a text."""
        return {
            name: [render(prompt, tokenizer, text) for text in texts] for name, (prompt, tokenizer) in self.own.items()
        }


def render(prompt: Prompt, tokenizer: Any, text: str) -> list[int]:
    """The ids that one member is shown for ``text``."""
    if tokenizer is None:
        raise PromptError("a member with a prompt of its own has no tokenizer; add one to its directory")
    body = text
    if prompt.response_prefix and body.rstrip().endswith(prompt.response_prefix.strip()):
        body = body.rstrip().removesuffix(prompt.response_prefix.strip()).rstrip()
    if prompt.kind == "template":
        assert prompt.template is not None
        filled = prompt.template.replace("{prompt}", body) + prompt.response_prefix
        return list(tokenizer(filled)["input_ids"])
    if prompt.kind == "raw":
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise PromptError("a member's prompt is `chat`, but its tokenizer has no chat template; use a `template`")
    messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
    messages.append({"role": "user", "content": prompt.user_prefix + body})
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a chat template is a program, and raises what it likes
        raise PromptError(f"a member's chat template refuses the prompt: {error}") from error
    return list(tokenizer(shown + prompt.response_prefix, add_special_tokens=False)["input_ids"])


def left_pad(rows: Sequence[Sequence[int]], width: int | None = None, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on the left: (ids, mask), each of shape (n_rows, width)."""
    width = width or max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask
