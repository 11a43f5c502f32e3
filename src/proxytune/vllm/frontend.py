"""vLLM's side that takes requests: what a request asks for is checked, and its members' own prompts are made.

Bad requests are answered with 400. These methods of vLLM are wrapped: ``InputProcessor.process_inputs``, through which
every request goes; ``BaseRenderer.validate_token_ids``, the only place where a prompt's ids are checked;
``BaseRenderer.render_chat`` and its asynchronous twin, which know the conversation that a prompt was made from;
``RequestState._new_request_output``, which tells how much of a prompt was cached; and what may have to be refused: the
three ways to beam search, and conversations rendered for later. Models that are not recipes are left alone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestState

from proxytune.errors import PromptError, ProxyTuneError
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.prompts import Message, Negative, Prompter, last_turn, refuse_unread
from proxytune.vllm.alpha import WEIGHT, Recipe
from proxytune.vllm.own_prompts import KEY, as_extra_args, ids_in
from proxytune.vllm.plan import Part, reads_own_prompts

__all__ = ["Served", "serve", "served_by"]

GIVEN = "member_input_ids."  # and the name of a member: its prompt in a request
# Keys that are likely slips, and what was meant. NAME is a member's.
MEANT = {"member_input_ids": f"{GIVEN}NAME", "weight": f"{WEIGHT}NAME", "negative_prompts": "negative_prompt"}
# What vLLM passes to chat templates if a request asks for nothing. (It always passes two more.)
USUAL = {"add_generation_prompt": True, "continue_final_message": False}
ALWAYS = ("tokenize", "cohere_format")
OPTIONS = (*USUAL, "documents", "reasoning_effort", "tools")  # of a request itself; others are in chat_template_kwargs
CONVERSATION = "proxytune_conversation"  # a field of a rendered prompt, which stays in the process


@dataclass(frozen=True)
class Conversation:
    """What a prompt was made from.

    Attributes:
        messages: as the request has them. encode: the ids of a text in the place of the last question, without the
            turns before it. not_followed: options of the request that members' own prompts do not follow.
    """

    messages: Sequence[Mapping[str, Any]]
    encode: Callable[[str], Sequence[int]]
    not_followed: Sequence[str]


@dataclass
class Served:
    """A recipe that this process serves.

    Attributes:
        parts: its models. widths, contexts: of each part the number of its ids, and of the tokens that it can read.
        prompter: makes the members' own prompts; None if the recipe has none.
    """

    recipe: Recipe
    parts: Sequence[Part]
    widths: Mapping[str, int]
    contexts: Mapping[str, int]
    prompter: Prompter | None

    def check(self, extra_args: Mapping[str, Any] | None, engine: Any) -> None:
        """Raise :class:`ProxyTuneError` for a request that asks for what cannot be had.

        Args:
            engine: its ``VllmConfig``.
        """
        if reserved := ids_in(extra_args):
            name = KEY + next(iter(reserved))
            raise PromptError(f"{name!r} cannot be set by a request; for a negative prompt use negative_prompt")
        if wrong := [name for name in MEANT if name in (extra_args or {})]:
            raise PromptError(f"a request has no key {wrong[0]!r}; write {MEANT[wrong[0]]!r}")
        self.recipe.requested(extra_args, engine)
        negative_of(extra_args, self.prompter)
        if self._given(extra_args) and self.prompter is None:
            raise PromptError(f"members of this recipe read one prompt; leave {GIVEN}… out")

    def check_ids(self, ids: Sequence[int], parts: Sequence[Part], parameter: str | None, what: str = "prompt") -> None:
        """Raise an error for an id that some of these parts lack. ``what`` is said to have it."""
        part = min(parts, key=lambda part: self.widths[part.name])
        width = self.widths[part.name]
        if (highest := max(ids)) >= width:
            reason = f"the {what} has token id {highest}, but member {part.owner!r} has only {width} tokens"
            raise VLLMValidationError(reason, parameter=parameter)

    def give_prompts(self, request: Any, prompt: Any, resumable: bool, context: int) -> None:
        """Give a request, vLLM's ``EngineCoreRequest``, its members' own prompts, and room for its answer.

        Args:
            prompt: what the request was made from. context: the engine's.
        """
        params, base = request.sampling_params, request.prompt_token_ids
        if self.prompter is None or params is None:
            return
        if base is None or resumable:
            raise PromptError("members of this recipe have prompts of their own, which are made from a whole prompt")
        extra = dict(params.extra_args or {})
        own = self._own(prompt, list(base), extra)
        # So `usage`, penalties and drafts are of what the base reads, also if it has a prompt of its own.
        request.prompt_token_ids = base = list(own["base"])
        carried = as_extra_args(base, own)
        asked = (params.prompt_logprobs, params.prompt_logprob_token_ids)
        if carried and any(each is not None for each in asked):
            raise PromptError(
                "log-probabilities of the prompt cannot be had, because members read prompts of their own; leave out "
                "prompt_logprobs, prompt_logprob_token_ids, logprobs beside echo, and echo in a chat"
            )
        if carried and params.thinking_token_budget is not None:
            raise PromptError(
                "thinking_token_budget cannot be had, because members read prompts of their own: vLLM would count what "
                "fills up the shorter ones; leave it out"
            )
        rooms = {}
        for part in self.parts:
            ids, limit = own[part.name], min(self.contexts[part.name], context)
            negative = part.member.prompt.kind == "negative" and extra.get("negative_prompt") is not None
            what = "negative prompt" if negative else "prompt"
            if not ids:
                raise PromptError(f"the prompt of member {part.owner!r} is empty; give at least one token")
            self.check_ids(ids, [part], what.replace(" ", "_"), what)
            rooms[part.owner] = limit - len(ids)
            if len(ids) >= limit:
                raise PromptError(
                    f"the {what} has {len(ids)} tokens for member {part.owner!r}, which reads {limit} with the answer; "
                    "shorten it"
                )
        owner, room = min(rooms.items(), key=lambda item: item[1])
        if params.min_tokens > room:
            raise PromptError(f"min_tokens is {params.min_tokens}, but member {owner!r} has room for {room} tokens")
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params.extra_args = extra | carried

    def _given(self, extra_args: Mapping[str, Any] | None) -> dict[str, list[int]]:
        """Part -> its prompt, in a request that names members' prompts.

        Raises:
            PromptError: for an unknown member, what are not ids, and two prompts of members that are one model.
        """
        given: dict[str, list[int]] = {}
        asked = extra_args or {}
        for name, ids in asked.items():
            if not name.startswith(GIVEN):
                continue
            part = next((part for part in self.parts if name[len(GIVEN) :] in part.names), None)
            if part is None:
                members = ", ".join(member for part in self.parts for member in part.names)
                raise PromptError(f"there is no member {name[len(GIVEN) :]!r} to give a prompt; there are {members}")
            if not are_ids(ids) or not ids:
                raise PromptError(f"{name} must be ids, not {ids!r}")
            others = [asked.get(GIVEN + other) for other in part.names]
            if any(not are_ids(other) or list(other or ()) != list(ids) for other in others):
                names = " and ".join(GIVEN + other for other in part.names)
                raise PromptError(f"{' and '.join(part.names)} are one model here; give {names} the same ids")
            given[part.name] = list(ids)
        return given

    def _own(self, prompt: Any, base: list[int], extra: Mapping[str, Any]) -> dict[str, Sequence[int]]:
        """Part -> what it reads as its prompt."""
        assert self.prompter is not None
        given, negative = self._given(extra), negative_of(extra, self.prompter)
        twice = [p.owner for p in self.parts if p.name in given and p.member.prompt.kind == "negative"]
        if negative is not None and twice:
            raise PromptError(
                f"a request gives the prompt of {twice[0]!r} by {GIVEN}{twice[0]} or by negative_prompt, not both"
            )
        shown: Mapping[str, Sequence[int]] = {}
        if any(part.name not in given for part in self.parts if part.names[0] in self.prompter.own):
            shown = self._shown(prompt, base, negative)
        return {part.name: given.get(part.name) or shown.get(part.names[0], base) for part in self.parts}

    def _shown(self, prompt: Any, base: list[int], negative: Negative) -> Mapping[str, Sequence[int]]:
        """Member -> its own prompt."""
        assert self.prompter is not None
        asked = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        conversation = asked.get(CONVERSATION)
        if conversation is not None:
            messages = messages_of(conversation) if self.prompter.needs_text(negative) else []
            return self.prompter.from_messages(messages, base, conversation.encode, negative)
        text = asked.get("prompt")
        return self.prompter.from_prompt(text if isinstance(text, str) else None, base, negative)


def negative_of(extra_args: Mapping[str, Any] | None, prompter: Prompter | None) -> Negative:
    """The negative prompt of a request.

    Raises:
        PromptError: for one that no member reads, and for a value that is neither a text nor ids.
    """
    negative = (extra_args or {}).get("negative_prompt")
    if negative is None:
        return None
    refuse_unread(negative, [] if prompter is None else [prompt for prompt, _ in prompter.own.values()])
    if not isinstance(negative, str) and not are_ids(negative):
        raise PromptError(f"negative_prompt must be a text or its ids, not {negative!r}")
    return negative if isinstance(negative, str) else list(negative)


def are_ids(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, (list, tuple)) and all(type(each) is int and each >= 0 for each in value)


def messages_of(conversation: Conversation) -> list[Message]:
    """A conversation's turns as plain text.

    Raises:
        PromptError: for what members' chat templates were not tried with.
    """
    if options := conversation.not_followed:
        raise PromptError(
            f"members of this recipe have prompts of their own, which do not follow {', '.join(options)}; "
            f"leave {'it' if len(options) == 1 else 'them'} out"
        )
    messages: list[Message] = []
    for message in conversation.messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = "\n".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        role = "system" if message.get("role") == "developer" else message.get("role")  # its newer name
        more = any(value for name, value in message.items() if name not in ("role", "content"))  # tool_calls, name, …
        if role not in ("system", "user", "assistant") or not isinstance(content, str) or more:
            raise PromptError(
                "members of this recipe have prompts of their own, which are made from texts of system, user and "
                "assistant; leave other messages out"
            )
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] != "user":
        raise PromptError("members of this recipe have prompts of their own, so the last message must be the user's")
    return messages


@contextmanager
def answered() -> Iterator[None]:
    """Let vLLM answer our errors with 400."""
    try:
        yield
    except ProxyTuneError as error:
        raise VLLMValidationError(str(error)) from error


_served: dict[int, Served] = {}  # by the identity of the recipe's config


def served_by(model_config: Any) -> Served | None:
    """The recipe that an engine with this ``ModelConfig`` serves; None for another model."""
    return _served.get(id(model_config.hf_config))


def serve(
    config: ProxyTuneConfig,
    parts: Sequence[Part],
    widths: Mapping[str, int],
    tokenizers: Mapping[str, Any],
    contexts: Mapping[str, int],
) -> None:
    """Remember a recipe that this process serves, as long as vLLM keeps its config.

    Args:
        tokenizers: member -> its tokenizer.
    """
    prompter = Prompter.of(config.members(), tokenizers) if reads_own_prompts(config) else None
    _served[id(config)] = Served(Recipe(config), parts, widths, contexts, prompter)
    weakref.finalize(config, _served.pop, id(config), None)
    _wrap()


def _refuse_beams(served: Served | None, extra_args: Mapping[str, Any] | None = None) -> None:
    """Refuse what vLLM's beam search would lose: it starts a new request for each token, without its ``extra_args``."""
    if served is not None and served.prompter is not None:
        raise PromptError("beam search cannot be had, because members of this recipe have prompts of their own")
    if served is not None and extra_args:
        names = ", ".join(extra_args)
        raise ProxyTuneError(f"vLLM's beam search does not pass on {names}; leave one of the two out")


def _refuse_beams_of(request: Any) -> None:
    """The same for a request to a server. It does not know its engine, but a server has only one."""
    for served in _served.values():
        _refuse_beams(served, request.vllm_xargs)


def _refuse_rendering(served: Served | None) -> None:
    """Refuse to render a conversation for later: its ids are not enough for members' own prompts."""
    if served is not None and served.prompter is not None:
        raise PromptError(
            "a conversation cannot be rendered for later, because members of this recipe have prompts of their own, "
            "which are made from it; use /v1/chat/completions"
        )


def _wrap() -> None:
    """Wrap vLLM's methods, once."""
    if getattr(BaseRenderer.validate_token_ids, "asks_members", False):
        return
    validate, process = BaseRenderer.validate_token_ids, InputProcessor.process_inputs
    render, render_async = BaseRenderer.render_chat, BaseRenderer.render_chat_async
    new_output = RequestState._new_request_output

    @functools.wraps(validate)
    def validate_token_ids(self: Any, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        validate(self, token_ids, parameter=parameter)
        if token_ids and (served := served_by(self.model_config)):
            served.check_ids(token_ids, served.parts, parameter)

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        served = served_by(self.model_config)
        if served is None:
            return process(self, request_id, prompt, params, *args, **kwargs)
        with answered():
            served.check(getattr(params, "extra_args", None), self.vllm_config)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        with answered():
            served.give_prompts(request, prompt, kwargs.get("resumable", False), self.model_config.max_model_len)
        return request

    def remember(self: Any, conversations: Sequence[Any], prompts: Sequence[Any], params: Any, tok_params: Any) -> None:
        """Keep what each prompt was made from."""
        served = served_by(self.model_config)
        if served is None or served.prompter is None:
            return
        for messages, prompt in zip(conversations, prompts):

            def encode(text: str, messages: Any = messages) -> Sequence[int]:
                # Without vLLM's limit, whose message would speak of the prompt.
                endless = replace(tok_params or self.default_chat_tok_params, max_total_tokens=None)
                (_,), (encoded,) = render(self, [last_turn(messages, text)], params, endless)
                return list(encoded["prompt_token_ids"])

            said = {name: value for name, value in params.chat_template_kwargs.items() if name not in ALWAYS}
            if said.get("reasoning_effort") is not None:
                said.pop("enable_thinking", None)  # vLLM adds it
            asked = [name for name, value in said.items() if value is not None and value is not USUAL.get(name)]
            not_followed = [name if name in OPTIONS else f"chat_template_kwargs.{name}" for name in asked]
            if getattr(tok_params, "truncate_prompt_tokens", None) is not None:
                not_followed.append("truncate_prompt_tokens")
            prompt[CONVERSATION] = Conversation(messages, encode, not_followed)

    @functools.wraps(render)
    def render_chat(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        found = render(self, conversations, chat_params, tok_params, *args, **kwargs)
        remember(self, conversations, found[1], chat_params, tok_params)
        return found

    @functools.wraps(render_async)
    async def render_chat_async(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        found = await render_async(self, conversations, chat_params, tok_params, *args, **kwargs)
        remember(self, conversations, found[1], chat_params, tok_params)
        return found

    @functools.wraps(new_output)
    def _new_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_output(self, *args, **kwargs)
        if output.num_cached_tokens and output.prompt_token_ids is not None:  # it counts in the longest of the prompts
            output.num_cached_tokens = min(output.num_cached_tokens, len(output.prompt_token_ids))
        return output

    validate_token_ids.asks_members = True  # type: ignore[attr-defined]
    BaseRenderer.validate_token_ids, InputProcessor.process_inputs = validate_token_ids, process_inputs
    BaseRenderer.render_chat, BaseRenderer.render_chat_async = render_chat, render_chat_async
    RequestState._new_request_output = _new_request_output

    def refusing(plain: Any, refuse: Callable[[Any], None]) -> Any:
        @functools.wraps(plain)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            with answered():
                refuse(self)
            return plain(self, *args, **kwargs)

        return checked

    for kind in (CompletionRequest, ChatCompletionRequest):
        kind.to_beam_search_params = refusing(kind.to_beam_search_params, _refuse_beams_of)
    BeamSearchOfflineMixin.beam_search = refusing(
        BeamSearchOfflineMixin.beam_search, lambda llm: _refuse_beams(served_by(llm.model_config))
    )
    ServingRender.render_chat_request = refusing(
        ServingRender.render_chat_request, lambda server: _refuse_rendering(served_by(server.model_config))
    )
