"""The prompts of members: from one prompt, or a conversation, to the ids that each member reads.

:func:`render` is the one place where text becomes what a member reads. A single prompt is a conversation of one turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.errors import PromptError, RecipeError, first_line
from proxytune.recipe.parts import Member, Prompt, refuse_negative

__all__ = [
    "Encode",
    "Message",
    "Negative",
    "Prompter",
    "last_turn",
    "left_pad",
    "n_common",
    "refuse_unread",
    "render",
    "render_chat",
]

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
Negative = str | Sequence[int] | None  # a negative prompt: its text or its ids; None: what the recipe says
Encode = Callable[[str], Sequence[int]]  # from a text that a prompt may be to its ids
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


class Prompter:
    """Makes the members' own prompts.

    Args:
        tokenizer: the base's tokenizer, which made the ids that the caller gives.
        own: member name -> (its prompt, its tokenizer), for the members whose prompt is not ``raw``.
    """

    def __init__(self, tokenizer: Any, own: Mapping[str, tuple[Prompt, Any]]) -> None:
        self.tokenizer = tokenizer
        self.own = dict(own)

    @classmethod
    def of(cls, members: Iterable[tuple[str, Member]], tokenizers: Mapping[str, Any]) -> Prompter:
        """For the members of a recipe; those without a tokenizer use the base's."""
        base = tokenizers.get("base")
        own = {name: (each.prompt, tokenizers.get(name) or base) for name, each in members if each.prompt.kind != "raw"}
        return cls(base, own)

    def from_ids(
        self, input_ids: Tensor, attention_mask: Tensor | None, negative: Sequence[Negative] | None = None
    ) -> dict[str, Sequence[Sequence[int]]]:
        """Every member's own prompt for the raw ids, (n_batch, n_columns), left-padded; by way of their text if needed.

        Args:
            negative: of each row.

        Raises:
            PromptError: if the ids of some row do not survive decoding and encoding again, since the members
                would then be shown another text than the base.
        """
        kept = [
            ids if attention_mask is None else [i for i, m in zip(ids, attention_mask[row].tolist()) if m]
            for row, ids in enumerate(input_ids.tolist())
        ]
        negative = [None] * len(kept) if negative is None else negative
        by_text = any(self.needs_text(each) for each in negative)
        texts = [self._text(ids, f"the prompt of row {row}") if by_text else "" for row, ids in enumerate(kept)]
        shown = [
            self.from_messages([{"role": "user", "content": text}], ids, self._encode, each)
            for text, ids, each in zip(texts, kept, negative)
        ]
        return {name: [one[name] for one in shown] for name in self.own}

    def needs_text(self, negative: Negative = None) -> bool:
        """Whether members' prompts need what was said as text, and not only its ids; see :meth:`from_messages`."""
        if negative is None:
            return any(prompt.needs_text for prompt, _ in self.own.values())
        said = isinstance(negative, str) and "{prompt}" in negative
        return said or any(prompt.needs_text for prompt, _ in self.own.values() if prompt.kind != "negative")

    def from_prompt(self, text: str | None, ids: Sequence[int], negative: Negative = None) -> dict[str, list[int]]:
        """The members' own prompts for a request's prompt: from ``text`` if it encodes to ``ids``, or from the ids."""
        if text is None or self.tokenizer is None or self._encode(text) != list(ids):
            text = self._text(list(ids), "the prompt", "member_input_ids.NAME") if self.needs_text(negative) else ""
        return self.from_messages([{"role": "user", "content": text}], ids, self._encode, negative)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise PromptError(
                "a negative prompt given as text needs a tokenizer; give its ids, or pass `tokenizer` to from_members"
            )
        return list(self.tokenizer(text)["input_ids"])

    def _text(self, ids: list[int], what: str, key: str = "member_input_ids") -> str:
        """The text that ids are the tokens of. Errors speak of ``what``, and of the ``key`` that gives members' ids."""
        if self.tokenizer is None:
            raise PromptError(
                f"members have prompts of their own, which need a tokenizer; pass `{key}`, or give `tokenizer` to "
                "from_members"
            )
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        again = self.tokenizer(text)["input_ids"]
        if again != ids:
            raise PromptError(
                f"{what} changes if it is decoded and encoded again (from token {n_common(ids, again)} on), so the "
                f"members' own prompts cannot be made from it; give them as ids, by `{key}`"
            )
        return text

    def from_messages(
        self, messages: Sequence[Message], ids: Sequence[int], encode: Encode, negative: Negative = None
    ) -> dict[str, list[int]]:
        """Member name -> the ids that it is shown for a conversation.

        Args:
            ids: what members with a raw prompt read. encode: gives the ids of a text in the place of the last question,
                without the turns before it; a negative prompt is one.
            negative: in place of the recipe's negative prompt.

        Raises:
            PromptError: for a prompt that cannot be made, and a negative one that no member reads or that is empty.
        """
        refuse_unread(negative, (prompt for prompt, _ in self.own.values()))
        shown = {}
        for name, (prompt, tokenizer) in self.own.items():
            if prompt.kind == "negative":
                given = prompt.template if negative is None else negative
                shown[name] = list(ids) if given is None else _negative_ids(given, messages, encode)
            else:
                shown[name] = render(prompt, tokenizer, messages, f"member {name!r}")
        return shown


def refuse_unread(negative: Negative, prompts: Iterable[Prompt]) -> None:
    """Raise :class:`PromptError` for a negative prompt that no member of a recipe with these prompts reads."""
    if negative is not None and all(prompt.kind != "negative" for prompt in prompts):
        raise PromptError(
            "the recipe has no member that reads a negative prompt; make one with `proxytune new DIR --base MODEL "
            "--negative-prompt TEXT`, or leave the negative prompt out"
        )


def _negative_ids(given: str | Sequence[int], messages: Sequence[Message], encode: Encode) -> list[int]:
    if not isinstance(given, str):
        if len(given) == 0:
            raise PromptError("the negative prompt is empty; give at least one token, or leave it out")
        return list(given)
    try:
        refuse_negative(given)
    except RecipeError as error:
        raise PromptError(str(error)) from error
    if "{prompt}" in given:
        given = given.replace("{prompt}", messages[-1]["content"])
    return list(encode(given))


def render(prompt: Prompt, tokenizer: Any, said: str | Sequence[Message], who: str = "a member") -> list[int]:
    """The ids that one member is shown for ``said``: the user's text, or a conversation whose last turn is the user's.

    Raises:
        PromptError: without a tokenizer or a chat template, or where the template refuses the conversation.
    """
    if tokenizer is None:
        raise PromptError(f"{who} has a prompt of its own, but has no tokenizer; add one to its directory")
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else [dict(message) for message in said]
    if prompt.kind == "raw":
        return list(tokenizer(_as_text(messages))["input_ids"])
    last = messages[-1]
    if prompt.response_prefix and last["content"].rstrip().endswith(prompt.response_prefix.strip()):
        last["content"] = last["content"].rstrip().removesuffix(prompt.response_prefix.strip()).rstrip()
    if prompt.kind == "template":
        assert prompt.template is not None
        before = "".join(f"{question}{answer}\n\n" for question, answer in prompt.examples)
        filled = before + prompt.template.replace("{prompt}", _as_text(messages)) + prompt.response_prefix
        return list(tokenizer(filled)["input_ids"])
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    for question, answer in reversed(prompt.examples):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *turns]
    for message in turns:
        if message["role"] == "user":
            message["content"] = prompt.user_prefix + message["content"]
    if prompt.system is not None:  # the recipe's own comes before the conversation's
        system = [{"role": "system", "content": prompt.system}]
    messages = [*system, *turns]
    return render_chat(tokenizer, messages, who, prompt.response_prefix)


def render_chat(tokenizer: Any, messages: Sequence[Message], who: str, response_prefix: str = "") -> list[int]:
    """The ids of a conversation that the assistant is to answer, by the tokenizer's chat template."""
    text = chat_text(tokenizer, messages, who) + response_prefix
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_text(tokenizer: Any, messages: Sequence[Message], who: str) -> str:
    """The same as text."""
    if not tokenizer.chat_template:
        raise PromptError(f"the tokenizer of {who} has no chat template; use a `template` prompt, or no chat")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it raises what it likes (no system role, turns out of order)
        raise PromptError(f"the chat template of {who} refuses this conversation: {first_line(error)}") from error


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text, for models without a chat template."""
    return "\n".join(f"{NAMES[message['role']]}: {message['content']}" for message in messages)


def last_turn(messages: Sequence[Message], text: str) -> list[Message]:
    """``text`` as the only question of a conversation, after its system prompt (OpenAI's newer name: developer)."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return [*system, {"role": "user", "content": text}]


def _as_text(messages: Sequence[Message]) -> str:
    return messages[0]["content"] if len(messages) == 1 else transcript(messages)


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def left_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on the left: (ids, mask), each of shape (n_rows, width)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask
