"""A conversation with a steered model, its cache carried from turn to turn.

Each turn renders the whole transcript with the chat template. What the cache already holds is not read again. Between
turns the transcript is text, so its tokens may differ from those that were generated. Then the cache is cut back to the
part that both have in common. Members with prompts of their own continue from their own part, so a negative prompt is
read only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from proxytune.answers.generation import Answer, Encoded, Printer, Sampling, answer, with_room
from proxytune.decoding.trace import TOP_K
from proxytune.errors import ProxyTuneError
from proxytune.recipe.parts import refuse_negative
from proxytune.recipe.prompts import NAMES, Message, last_turn, n_common, refuse_unread, render_chat, transcript

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Conversation"]


class Conversation:
    """A multi-turn conversation.

    Args:
        model: the steered model. tokenizer: the recipe's.
        alphas: one value per expert; may be changed between turns, since no cache depends on it.
        system: a system prompt for the recipe's chat template, and for members that have none of their own.
        negative_prompt: used instead of the recipe's; may be changed between turns.

    Attributes:
        messages: the conversation so far.
        read: the ids that the cache holds.
        reused: how many of them the last turn did not have to read again.
        last: the last answer with its trace, and its alphas; None if there is none.
    """

    def __init__(
        self,
        model: ProxyTunedForCausalLM,
        tokenizer: Any,
        alphas: Sequence[float],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        system: str | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.alphas = model, tokenizer, tuple(alphas)
        self.negative_prompt = negative_prompt
        self.sampling, self.max_new_tokens, self.system = sampling, max_new_tokens, system
        self.n_turns = 0
        self.messages: list[Message]
        self.read: list[int]
        self.rows: list[list[list[int]]]  # the same of each lane, for each of its seats
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, except the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.last: tuple[Answer, tuple[float, ...]] | None = None
        self._forget()

    def set_system(self, system: str | None) -> None:
        """Change the system prompt; None removes it."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.system = system
        self.messages = [{"role": "system", "content": system}, *said] if system is not None else said

    def set_negative(self, text: str | None) -> None:
        """Change the negative prompt; None goes back to the recipe's.

        Raises:
            PromptError: if no member reads one.
            RecipeError: if it is not a valid negative prompt.
        """
        refuse_unread(text, (prompt for prompt, _ in self.model.prompter.own.values()))
        if text is not None:
            refuse_negative(text)
        self.negative_prompt = text

    def load(self, messages: Sequence[Message]) -> None:
        """Continue from another conversation.

        Raises:
            ProxyTuneError: if its turns do not alternate between user and assistant.
        """
        first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        turns = list(messages[first is not None :])
        roles = [message["role"] for message in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ProxyTuneError("a conversation must alternate between user and assistant, and end with the assistant")
        self.messages = turns
        self.last = None
        self.set_system(first)

    def take_back(self) -> str:
        """Forget the last question and its answer, and return the question.

        Raises:
            ProxyTuneError: if nothing has been said.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ProxyTuneError("the conversation is empty")
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        self.last = None
        return question

    def compare(self, alphas: Sequence[Sequence[float]], stopped: Callable[[], bool] | None = None) -> list[Answer]:
        """Answer the last question at each of the ``alphas``, in one batch. The conversation does not change.

        Raises:
            ProxyTuneError: if nothing has been said.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ProxyTuneError("there is no answer yet, so there is nothing to compare")
        made = self._answer(self.encode(self.messages[:-1]), alphas, stopped)
        return [replace(each, text=self._own(each.text)) for each in made]

    def say(self, text: str, write: Callable[[str], Any], stopped: Callable[[], bool] | None = None) -> Answer:
        """Answer ``text``. The answer is passed to ``write`` piece by piece, and ``stopped`` may end it.

        Raises:
            PromptError: if the transcript cannot be rendered or is too long; the conversation is then unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        encoded = self.encode(messages)
        self.n_turns += 1
        try:
            self._cut_back(encoded)
            (made,) = self._answer(
                encoded,
                [self.alphas],
                stopped,
                streamer=Printer(self.tokenizer, write),
                past_key_values=self.cache,
                trace_top_k=TOP_K if self.model.complete else None,
            )
        except BaseException:  # some members may have read a token that others have not
            self._forget()
            raise
        continued = made.tokens[: self.cache.n_columns - len(encoded.ids)]
        self.read = encoded.ids + continued
        self.rows = [[prompt + continued for prompt in lane] for lane in self._prompts(encoded)]
        self.last = (made, self.alphas)
        said = self._own(made.text)
        self.messages = [*messages, {"role": "assistant", "content": said.strip()}]
        return replace(made, text=said, trace=None)

    def _answer(
        self,
        encoded: Encoded,
        alphas: Sequence[Sequence[float]],
        stopped: Callable[[], bool] | None,
        **options: Any,
    ) -> list[Answer]:
        """Answer one prompt at each of the ``alphas``; ``options`` are those of :func:`answer`."""
        return answer(
            self.model,
            self.tokenizer,
            [encoded] * len(alphas),
            alphas,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            rows=[self.n_turns] * len(alphas),  # each turn draws its own numbers; in one turn only alpha differs
            stopped=stopped,
            stop_strings=self._stops(),
            **options,
        )

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The transcript as each member reads it. A negative prompt is the only question of its own conversation."""

        def ids_of(messages: Sequence[Message]) -> list[int]:
            if self.tokenizer.chat_template:
                return render_chat(self.tokenizer, messages, "the recipe")
            return list(self.tokenizer(f"{transcript(messages)}\n{NAMES['assistant']}:")["input_ids"])

        ids = ids_of(messages)
        own = self.model.prompter.from_messages(
            messages, ids, lambda text: ids_of(last_turn(messages, text)), self.negative_prompt
        )
        return with_room(self.model.contexts, ids, own)

    def _stops(self) -> list[str]:
        """The strings that end an answer in a plain transcript: the user's next turn."""
        return [] if self.tokenizer.chat_template else [f"\n{NAMES['user']}:"]

    def _own(self, text: str) -> str:
        """The answer without the stop string that ended it."""
        for stop in self._stops():
            text = text.split(stop, maxsplit=1)[0]
        return text

    def _forget(self) -> None:
        self.cache = self.model.new_cache()
        self.read = []
        self.rows = []
        self.reused = 0

    def _prompts(self, encoded: Encoded) -> list[list[list[int]]]:
        """For each lane, the ids of each seat's prompt."""
        lanes = zip(self.model.lanes, self.model.own_prompts)
        return [
            [encoded.own.get(seat.names[0], encoded.ids) if own else encoded.ids for seat in lane.seats]
            for lane, own in lanes
        ]

    def _cut_back(self, encoded: Encoded) -> None:
        """Cut the cache back to the part that it has in common with a prompt. At least one token of the prompt is left
        to read."""
        ids = encoded.ids
        if any(self.model.own_prompts):
            with torch.inference_mode():
                self.reused = self.cache.go_on_with(self.rows, self._prompts(encoded), len(ids)) if self.rows else 0
            if not self.reused:
                self._forget()
            return
        common = n_common(self.read, ids[:-1])
        surplus = len(self.read) - common
        if surplus:
            try:
                self.cache.crop(-surplus)
            except RuntimeError:  # a sliding window has already dropped what would have to come back
                common = 0
        if common == 0:
            self._forget()
        self.read, self.reused = self.read[:common], common
