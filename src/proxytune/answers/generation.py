"""From prompts to answers: the code that ``proxytune generate`` and ``proxytune chat`` share.

A prompt is encoded for every member, a batch goes through the model's own ``generate``, and each row is cut to its own
tokens. Sampling gives every row random numbers of its own (see decoding.noise). So a row's answer does not depend on
the other rows of its batch, on where a job was interrupted, or on drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from proxytune.answers.options import Sampling
from proxytune.decoding.noise import row_seed
from proxytune.decoding.trace import TokenTrace
from proxytune.errors import PromptError
from proxytune.generation_mixin import last_asked
from proxytune.recipe.generation_config import ends_of, fields_of, plain_generation_config
from proxytune.recipe.prompts import last_turn, left_pad, render_chat

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Answer", "Encoded", "Printer", "Sampling", "answer", "answer_batches", "cut", "encode"]

Finish = Literal["stop", "length", "interrupt"]


@dataclass(frozen=True)
class Encoded:
    """One prompt, as every member reads it.

    Attributes:
        ids: what members with a raw prompt read.
        own: member name -> the ids of its own prompt, if it has one.
        room: how many new tokens the shortest context leaves, or None if no member sets a limit.
    """

    ids: list[int]
    own: dict[str, list[int]] = field(default_factory=dict)
    room: int | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: the new text, without special tokens.
        tokens: the new ids in order, with the end-of-sequence token if the model chose it, without padding.
        finish: what ended the text: ``stop`` (the model, or a stop string), ``length`` (the limit of new tokens, or a
            member's context) or ``interrupt`` (the caller).
        trace: why each of ``tokens`` was chosen, if the call asked for a trace.
        certified: for each of ``tokens``, whether it is certain to be the whole mixture's choice. way: how the base was
            asked. calls: the number of requests for this answer. All three only for a base behind an API.
        tv_bound: for each of ``tokens``, how far the distribution that it was drawn from can be from the mixture's, if
            it was drawn from the tokens that the base's server names.
    """

    text: str
    tokens: list[int]
    finish: Finish
    trace: list[TokenTrace] | None = None
    certified: list[bool] | None = None
    calls: int | None = None
    way: str | None = None
    tv_bound: list[float] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """How the base was asked, as fields of a result; empty for a base on this machine."""
        if self.way is None:
            return {}
        # Rounded up: a bound.
        named = {} if self.tv_bound is None else {"tv_bound": [math.ceil(1e6 * bound) / 1e6 for bound in self.tv_bound]}
        return {"certified": self.certified, **named, "calls": self.calls, "way": self.way}


# -- prompts --------------------------------------------------------------------------------------------------
def encode(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    negative_prompt: str | None = None,
) -> Encoded:
    """Encode one prompt for every member.

    Args:
        chat: put the prompt, as the user's turn, into the chat template of the recipe's tokenizer. Members with prompts
            of their own still read those.
        system: a system prompt for that template, and for members with the prompt kind `chat` that have none.
        negative_prompt: used instead of the recipe's. With ``chat`` it is put into the chat template too.

    Raises:
        PromptError: if the prompt is empty, cannot be rendered, or leaves no room for a new token in some member's
            context.
    """
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})

    def ids_of(text: str) -> list[int]:
        if chat:
            return render_chat(tokenizer, last_turn(messages, text), "the recipe")
        return list(tokenizer(text)["input_ids"])

    ids = ids_of(prompt)
    return with_room(model.contexts, ids, model.prompter.from_messages(messages, ids, ids_of, negative_prompt))


def with_room(contexts: Mapping[str, int | None], ids: list[int], own: dict[str, list[int]]) -> Encoded:
    """Count how many new tokens the members' contexts leave room for. (The last new token is never read.)

    Args:
        contexts: member name -> how many tokens it can read, None for any number.
        ids: the prompt. own: member name -> what that member reads instead.

    Raises:
        PromptError: if there are no ids, or more than a member can read.
    """
    if not ids:
        raise PromptError("the prompt is empty: its text gives no token")
    rooms = []
    for name, limit in contexts.items():
        length = len(own.get(name, ids))
        if limit is not None and length > limit:
            raise PromptError(
                f"the prompt has {length} tokens, but member {name!r} can read only {limit}; shorten the prompt"
            )
        if limit is not None:
            rooms.append(limit - length + 1)
    return Encoded(ids, own, min(rooms, default=None))


# -- generation -----------------------------------------------------------------------------------------------
def answer(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    alphas: Sequence[Sequence[float]] | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    rows: Sequence[int | str] | None = None,
    streamer: BaseStreamer | None = None,
    stopped: Callable[[], bool] | None = None,
    past_key_values: Any = None,
    n_shared: int = 0,
    stop_strings: Sequence[str] = (),
    processors: Sequence[LogitsProcessor] = (),
    criteria: Sequence[StoppingCriteria] = (),
    trace_top_k: int | None = None,
) -> list[Answer]:
    """Answer a batch of prompts.

    Args:
        alphas: one tuple per prompt, one value per expert; None for the model's own.
        rows: determines each row's random numbers, together with the seed; by default the row's place.
        streamer: gets the tokens of a single prompt as they are written.
        stopped: called after every token; True ends all rows.
        past_key_values: a cache of the first columns.
        n_shared: how many tokens all prompts begin with. They are the first columns; padding follows them.
        stop_strings: strings that end an answer and are part of it, besides those of the generation config.
        processors, criteria: additional logits processors and stopping criteria of transformers.
        trace_top_k: trace the answers, with that many candidates per distribution; None: no trace.
    """
    rows = range(len(prompts)) if rows is None else rows
    ids, mask = left_pad([prompt.ids[n_shared:] for prompt in prompts])  # (n_batch, n_columns), after what is shared
    shared = torch.tensor(prompts[0].ids[:n_shared], dtype=torch.long).expand(len(prompts), -1)
    ids, mask = torch.cat([shared, ids], dim=1), torch.cat([torch.ones_like(shared), mask], dim=1)
    limits = [max_new_tokens if p.room is None else min(max_new_tokens, p.room) for p in prompts]
    config = plain_generation_config(model, max(limits))
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
    stops += stop_strings
    config.stop_strings = stops or None
    limit_rows = RowLimit(ids.shape[1], limits, stopped)
    criteria = StoppingCriteriaList(criteria)
    if stopped is not None or len(set(limits)) > 1:  # anything that looks at a whole batch prevents drafts
        criteria.append(limit_rows)
    own = {name: [prompt.own[name] for prompt in prompts] for name in prompts[0].own}
    if not sampling.greedy:  # generate() fills in what is None, so "off" must be explicit
        config.do_sample = True
        config.temperature, config.min_p = sampling.temperature or 1.0, sampling.min_p
        config.top_k, config.top_p = sampling.top_k or 0, sampling.top_p or 1.0
    more: dict[str, Any] = {"tokenizer": tokenizer} if stops else {}
    if trace_top_k is not None:
        more |= {"return_trace": True, "trace_top_k": trace_top_k}
    with torch.inference_mode():
        output: Any = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=criteria,
            streamer=streamer,
            past_key_values=past_key_values,
            alpha=None if alphas is None else torch.tensor([list(row) for row in alphas], dtype=torch.float32),
            member_input_ids=own or None,
            seed=None if sampling.greedy else [row_seed(sampling.seed, row) for row in rows],
            **fields_of(config),
            **more,
        )
    sequences = output if trace_top_k is None else output.sequences
    ends = ends_of(config)
    answers = [
        cut(tokenizer, prompt.ids, new, limit, ends, stops, limit_rows.interrupted)
        for prompt, new, limit in zip(prompts, sequences[:, ids.shape[1] :].tolist(), limits)
    ]
    if (asked := last_asked(model)) is not None:
        answers = [
            replace(one, certified=marks[: len(one.tokens)], calls=calls, way=asked.way)
            for one, marks, calls in zip(answers, asked.certified, asked.calls)
        ]
        if asked.tv_bound is not None:
            answers = [replace(one, tv_bound=own[: len(one.tokens)]) for one, own in zip(answers, asked.tv_bound)]
    if trace_top_k is None:
        return answers
    return [replace(one, trace=trace[: len(one.tokens)]) for one, trace in zip(answers, output.traces)]


def answer_batches(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    alphas: Sequence[Sequence[float]],
    *,
    rows: Sequence[int | str],
    batch_size: int,
    **options: Any,
) -> Iterator[list[Answer]]:
    """Answer prompts in batches, in order, and yield each batch's answers; see :func:`answer`."""
    for at in range(0, len(prompts), batch_size):
        these = slice(at, at + batch_size)
        yield answer(model, tokenizer, prompts[these], alphas[these], rows=rows[these], **options)


def cut(
    tokenizer: Any,
    prompt: list[int],
    new: list[int],
    limit: int,
    ends: Sequence[int],
    stops: Sequence[str],
    interrupted: bool,
) -> Answer:
    """A row's own tokens: up to its end-of-sequence token, a stop string or its limit; what follows is padding."""
    end = next((at for at, token in enumerate(new[:limit]) if token in ends), None)
    tokens = new[:limit] if end is None else new[: end + 1]
    if stops:
        stopped = StopStringCriteria(tokenizer, list(stops))
        for at in range(1, len(tokens) + 1):
            if stopped(torch.tensor([[*prompt, *tokens[:at]]]), None):  # type: ignore[arg-type]
                return Answer(new_text(tokenizer, prompt, tokens[:at]), tokens[:at], "stop")
    finish: Finish = "stop"
    if end is None and len(tokens) == limit:
        finish = "length"
    elif end is None and interrupted:
        finish = "interrupt"
    return Answer(new_text(tokenizer, prompt, tokens), tokens, finish)


class RowLimit(StoppingCriteria):
    """Ends each row at its own number of new tokens, or all rows when ``stopped`` returns True."""

    def __init__(self, n_prompt: int, limits: Sequence[int], stopped: Callable[[], bool] | None) -> None:
        self.n_prompt, self.limits, self.stopped = n_prompt, torch.tensor(limits), stopped
        self.interrupted = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Shape (n_batch,), True where the row is finished."""
        if self.stopped is not None and self.stopped():
            self.interrupted = True
            return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return (self.limits <= input_ids.shape[1] - self.n_prompt).to(input_ids.device)


# -- text -----------------------------------------------------------------------------------------------------
def new_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of ``new`` as it continues ``prompt``.

    Decoded after the end of the prompt, since SentencePiece drops the space of a text's first word.
    """
    before = list(prompt[-8:])
    context = _decode(tokenizer, before)
    whole = _decode(tokenizer, before + list(new))
    return whole[len(context) :] if whole.startswith(context) else _decode(tokenizer, list(new))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Printer(BaseStreamer):
    """Passes a single answer's text to ``write`` piece by piece. The pieces add up to :attr:`Answer.text`."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.prompt: list[int] | None = None
        self.tokens: list[int] = []
        self.shown = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt, shape (1, n_columns), and then each new token."""
        if self.prompt is None:
            self.prompt = value.flatten().tolist()
            return
        self.tokens += value.flatten().tolist()
        self._show(whole=False)

    def end(self) -> None:
        """Write what was held back."""
        self._show(whole=True)

    def _show(self, *, whole: bool) -> None:
        text = new_text(self.tokenizer, self.prompt or [], self.tokens)
        if whole or not text.endswith("\ufffd"):  # half a character: its other bytes are still to come
            self.write(text[self.shown :])
            self.shown = max(self.shown, len(text))


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut a list into batches, in order."""
    return [items[at : at + size] for at in range(0, len(items), size)]
