"""``generate`` of a composite: its hooks, and the call of the loop for greedy decoding and sampling.

This module decides whether drafts are possible; :mod:`proxytune.decoding` does the rest.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    generation,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from proxytune.cache import ProxyTunedCache
from proxytune.decoding.ahead import Ahead
from proxytune.decoding.certificate import Certifier
from proxytune.decoding.cost import Costs
from proxytune.decoding.drafting import Drafter, Drafting
from proxytune.decoding.gating import Gating, Later
from proxytune.decoding.lane import Scores
from proxytune.decoding.loop import Step, decode
from proxytune.decoding.mixing import Members
from proxytune.decoding.noise import Noise, RowSampler, row_seeds
from proxytune.decoding.pace import Pace, Speculate, parse_speculate
from proxytune.decoding.sampling import Sampler
from proxytune.decoding.text import Text
from proxytune.decoding.trace import TOP_K, TokenTrace, Tracer
from proxytune.errors import PromptError, ProxyTuneError, unknown_arguments
from proxytune.lanes.remote import Count, RemoteLane, RemoteState
from proxytune.lanes.transformers import TransformersLane
from proxytune.own_prompts import as_tensors, negative_rows
from proxytune.recipe.alpha import NAMED, take_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.generation_config import FIELDS, OURS, refuse_fields
from proxytune.recipe.prompts import Prompter
from proxytune.recipe.rules import Steering

__all__ = [
    "NO_TRACE",
    "Asked",
    "SpeculationStats",
    "SteeredGenerationMixin",
    "TracedOutput",
    "last_asked",
    "last_call",
]

SPARE_COLUMNS = 64  # of a static cache: rejected drafts, and padding before a row of a batch has been moved
WORDS = ("alpha", "combine", "gate", "seed", "speculate")  # our own fields of a generation config, besides "alpha.NAME"
NO_TRACE = "a trace needs greedy decoding or sampling by generate() with a cache, without beams or an assistant"
HOPED_FOR = 0.75  # "auto" tries drafts if they would pay at this acceptance, which is the demo's
OF_ONE_MEMBER = ("inputs_embeds", "output_attentions", "output_hidden_states")


_THREAD = threading.local()


def _last_calls() -> weakref.WeakKeyDictionary[Any, SpeculationStats]:
    """The statistics of each model's last call in this thread."""
    return vars(_THREAD).setdefault("of", weakref.WeakKeyDictionary())


def last_asked(model: Any) -> Asked | None:
    """How the model's last call in this thread asked its base; None if the base is not behind an API."""
    return vars(_THREAD).get("asked", {}).get(model)


def last_call(model: Any) -> SpeculationStats:
    """The drafts of the model's last greedy or sampling call in this thread; all zeros before the first call."""
    return _last_calls().get(model) or SpeculationStats()


@dataclass
class SpeculationStats:
    """The drafts of one call of ``generate``. Counts are numbers of tokens, summed over unfinished rows.

    Attributes:
        cycles: passes of M after the prompt's. emitted: new tokens, including that of the prompt's pass.
        drafted, accepted: tokens that a member drafted, and how many of them were accepted.
        looked_up, lookups_accepted: the same for drafts copied from the text, in ``lookup_cycles`` of the cycles.
        judged: drafts of both kinds that the mixture checked: all but those after a rejected one.
    """

    cycles: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    lookups_accepted: int = 0
    lookup_cycles: int = 0
    judged: int = 0

    def count(self, step: Step) -> None:
        """Add a step of the loop."""
        self.cycles += not step.of_prompt
        self.emitted += step.n_written
        self.judged += sum(min(n + 1, step.n_drafts) for n in step.n_accepted)
        drafted, accepted = step.n_drafts * len(step.n_accepted), sum(step.n_accepted)
        if step.source == "lookup":
            self.looked_up += drafted
            self.lookup_cycles += 1
            self.lookups_accepted += accepted
        else:
            self.drafted += drafted
            self.accepted += accepted

    @property
    def acceptance(self) -> float | None:
        """The share of checked drafts that were accepted (the α of 2211.17192); None if nothing was drafted."""
        return (self.accepted + self.lookups_accepted) / self.judged if self.judged else None


@dataclass(frozen=True)
class Asked:
    """How one call of ``generate`` asked a base behind an API.

    Attributes:
        way: see :class:`proxytune.lanes.remote.RemoteLane`.
        certified: for each row, whether each new token is certain to be the choice of the whole mixture.
        calls: the number of requests for each row.
        tv_bound: for each row, how far the distribution of each new token can be from the mixture's (total variation),
            if tokens were drawn from those that the server names; otherwise None.
    """

    way: str
    certified: list[list[bool]]
    calls: list[int]
    tv_bound: list[list[float]] | None = None


@dataclass
class TracedOutput(GenerateDecoderOnlyOutput):
    """The result of ``generate(..., return_trace=True)``: the sequences, and why each new token was chosen.

    Attributes:
        sequences: ids of prompt and answer, padded on the right, shape = (n_batch, n_columns), int64.
        traces: per sequence a list with one record per new token, in order, the end token included, padding left out.
        scores, logits, past_key_values: as in transformers, if ``return_dict_in_generate`` asks for them.

    Example:
        >>> import torch
        >>> from proxytune import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe")
        >>> output = model.generate(torch.tensor([[1, 40, 41]]), max_new_tokens=3, return_trace=True, trace_top_k=2)
        >>> [len(row) for row in output.traces]
        [3]
        >>> first = output.traces[0][0]
        >>> list(first.offsets), first.origin
        (['expert'], 'plain')
    """

    # None only because dataclass fields after those with a default need one too.
    traces: list[list[TokenTrace]] = None  # type: ignore[assignment]


# ---- when drafts are possible -------------------------------------------------------------------------------
def _classes(names: str) -> tuple[type, ...]:
    return tuple(getattr(generation, name) for name in names.split())


# Processors that look at one row's scores alone: all positions of all rows go through them in one call.
CONTEXT_FREE = _classes(
    """EpsilonLogitsWarper EtaLogitsWarper InfNanRemoveLogitsProcessor LogitNormalization MinPLogitsWarper
    SuppressTokensLogitsProcessor TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper"""
)
# Those, and processors and criteria that are functions of one row's text and scores: drafts may call them with texts
# that are discarded, and rows of different lengths can be passed one by one. Anything else (a user's class, one with a
# state, one that counts rows) gets each token once and the whole batch, without drafts.
ROW_BY_ROW = CONTEXT_FREE + _classes(
    """ExponentialDecayLengthPenalty ForcedEOSTokenLogitsProcessor MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor SuppressTokensAtBeginLogitsProcessor
    EosTokenCriteria MaxLengthCriteria MaxTimeCriteria StopStringCriteria"""
)


def _whole_batch(each: Any) -> bool:
    """Whether a processor or criterion may need all rows of a batch. True unless it is known not to."""
    return type(each) not in ROW_BY_ROW and not getattr(type(each), "row_by_row", False)


def obstacle_of(
    model: SteeredGenerationMixin,
    cache: ProxyTunedCache,
    processors: LogitsProcessorList,
    together: str | None,
    speculate: Speculate,
) -> str | None:
    """Why nothing can be drafted in this call, or None. ``together`` says why rows must stay side by side.

    If no lane can draft, ``"auto"`` still copies drafts from the text.
    """
    if model.drafting is None and speculate != "auto":
        return "no member with weights of its own can draft for the base"
    if not all(state.forgets for state in cache.states):
        return "a member's cache cannot forget rejected tokens"
    if model.unlike_in_pieces is not None:
        return model.unlike_in_pieces
    for each in filter(_whole_batch, processors):
        return (
            f"{type(each).__name__} may depend on more than a row's text and scores, and drafts call it more than once "
            "per token (if it does not, set `row_by_row = True` on its class)"
        )
    return together if cache.n_batch > 1 else None


def together_because(
    cache: ProxyTunedCache, criteria: StoppingCriteriaList, config: GenerationConfig, streamer: BaseStreamer | None
) -> str | None:
    """Why all rows of a batch must stay side by side, including those that have ended; None if they need not."""
    for each in filter(_whole_batch, criteria):
        return f"{type(each).__name__} needs all rows of a batch at once"
    if streamer is not None:
        return "a streamer needs all rows of a batch at once"
    if config.return_dict_in_generate or cache._is_user_defined:
        return "returned scores and caches need all rows of a batch at once"
    if not _has_eos(criteria) and len(criteria) > 1:
        return "without an end token all rows of a batch stop together"
    return None


def _has_eos(criteria: StoppingCriteriaList) -> bool:
    return any(hasattr(each, "eos_token_id") for each in criteria)


@contextmanager
def _drafting(cache: ProxyTunedCache, room: int | None) -> Iterator[None]:
    """Prepare states for drafts, with room for that many columns; None: no drafts."""
    if room is None:
        yield
        return
    for state in cache.states:
        state.begin_drafts(room)
    try:
        yield
    finally:  # the cache outlives the call, even after an error
        for state in cache.states:
            state.end_drafts()


class _Asking:
    """A base behind an API in one call of ``generate``: what is certain of its tokens, and how it was asked."""

    def __init__(
        self,
        lane: int,
        remote: RemoteLane,
        cache: ProxyTunedCache,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        *,
        needs_best: bool,
    ) -> None:
        """``lane``: its number. ``cache``: it has read the prompt. ``needs_best``: see :class:`Certifier`."""
        self.remote, self.cache, self.state = remote, cache, cast(RemoteState, cache.states[lane])
        self.calls = list(self.state.calls)
        self.certifier = Certifier(
            lane,
            self.state,
            remote.n_vocab,
            cache.n_batch,
            asks=remote.way != "pull" and not config.do_sample,
            draws=remote.way == "push",
            exact=not processors and not config.do_sample,
            whole=remote.complete,
            needs_best=needs_best,
            temperature=(config.temperature or 1.0) if remote.sample_named else None,
        )

    def prompt(self, mix: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """The mixture after the prompt, (n_batch, 1, n_vocab)."""
        read = [each.part(-1, None) for each in cast("list[Scores]", self.cache.prompt_scores)]
        mixed = self.certifier.mix(read, mix)
        self.again, self.cache.prompt_scores = self.state.again(), None
        return mixed

    def certified(self, traces: list[list[TokenTrace]]) -> list[list[TokenTrace]]:
        """The traces of all rows, which also say what is certain."""
        return [
            [replace(each, certified=mark) for each, mark in zip(row, marks)]
            for row, marks in zip(traces, self.certifier.marks)
        ]

    def asked(self) -> Asked:
        """How it was asked; at the end of the call, which asks once more whether it still answers the same."""
        self.again()
        self.state.calls = [Count() for _ in self.state.calls]
        apart = self.certifier.apart if self.remote.sample_named else None
        return Asked(self.remote.way, self.certifier.marks, [count.n for count in self.calls], apart)


class SteeredGenerationMixin(GenerationMixin):
    """The hooks of ``generate``: its arguments, its cache, and our loop in place of transformers' own."""

    if TYPE_CHECKING:  # the parts of the composite
        config: ProxyTuneConfig
        lanes: Sequence[TransformersLane]
        tokenizer: Any
        prompter: Prompter
        seats: dict[str, tuple[int, int]]
        expert_names: list[str]
        own_prompts: list[bool]
        drafting: Drafting | None
        costs: Costs
        speculate: Speculate
        unlike_in_pieces: str | None
        shared_vocab: int
        cache_implementation: str
        generation_config: Any

        steering: Steering
        alpha_rows: Callable[..., Tensor]
        mix_lanes: Callable[..., Tensor]
        member_logits: Callable[..., Tensor]
        whole_logits: Callable[..., list[Tensor]]
        all_logits: Callable[..., dict[str, Tensor]]
        paired: Callable[..., Members]
        new_cache: Callable[..., ProxyTunedCache]
        context_of: Callable[..., int | None]
        forward: Callable[..., Any]

    # The first two say what decides the type of the result; they take all other arguments too.
    @overload  # type: ignore[override]
    def generate(
        self,
        inputs: Tensor | None = ...,
        generation_config: GenerationConfig | None = ...,
        *,
        return_trace: Literal[True],
        **kwargs: Any,
    ) -> TracedOutput: ...

    @overload
    def generate(
        self,
        inputs: Tensor | None = ...,
        generation_config: GenerationConfig | None = ...,
        *,
        return_trace: Literal[False] = ...,
        return_dict_in_generate: Literal[True],
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput: ...

    @overload
    def generate(
        self,
        inputs: Tensor | None = ...,
        generation_config: GenerationConfig | None = ...,
        *,
        alpha: Any = ...,
        combine: str | None = ...,
        gate: Any = ...,
        member_input_ids: Mapping[str, Any] | None = ...,
        member_attention_mask: Mapping[str, Tensor] | None = ...,
        negative_prompt: Any = ...,
        speculate: Any = ...,
        seed: int | Sequence[int] | None = ...,
        return_trace: Literal[False] = ...,
        return_dict_in_generate: Literal[False] | None = ...,
        **kwargs: Any,
    ) -> Tensor: ...

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        alpha: Any = None,
        combine: str | None = None,
        gate: Any = None,
        member_input_ids: Mapping[str, Any] | None = None,
        member_attention_mask: Mapping[str, Tensor] | None = None,
        negative_prompt: Any = None,
        speculate: Any = None,
        seed: int | Sequence[int] | None = None,
        return_trace: bool = False,
        trace_top_k: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write text with the steered model. It takes every option of transformers' ``generate``, and the following.

        ``alpha``, ``"alpha.NAME"``, ``combine``, ``gate``, ``speculate`` and ``seed`` may also be attributes of the
        generation config. Arguments of the call come first.

        Args:
            alpha: the strength of steering: a number, a list with one per row (for a single expert), a list with one
                per expert, a list of such lists with one per row, or a mapping by expert name. ``**{"alpha.NAME":
                0.5}`` sets it for one expert, as requests to servers do.
            combine: the rule by which several experts are joined, instead of the recipe's: ``"sum"``, ``"mean"``,
                ``"convex"``, ``"dynamic"``, ``"union"`` or ``"intersection"``.
            gate: where to steer, instead of the recipe's gate: ``{"unsure": 0.9}``, ``{"entropy": 1.0}``, ``{"kl":
                0.5}``, the same as ``"unsure=0.9"``, or ``"none"`` for everywhere; see
                :class:`proxytune.recipe.gates.Gate`.
            member_input_ids: member name -> its own prompt: a list of lists of ids, or a left-padded tensor of shape
                (n_batch, its width). By default they are made from the text of ``input_ids``, as the recipe says.
            member_attention_mask: member name -> the mask of such a tensor, 0 at padding.
            negative_prompt: the negative prompt instead of the recipe's: a text, which may contain ``{prompt}``; its
                ids; or a list of these with one entry per row, where None means the recipe's. A row without any
                negative prompt is not guided.
            speculate: drafting. ``"auto"`` drafts where it is predicted to pay, False never drafts, a number always
                drafts that many tokens. By default the value given at loading. Greedy output stays the same. Samples
                keep their distribution, but the same torch seed gives different ones.
            seed: a seed for sampling, or a list with one per sequence. Each row then draws random numbers of its own,
                so its tokens depend on its seed and its text only, not on the batch and not on drafts. Without it
                torch's generator draws, as elsewhere in transformers.
            return_trace: return a :class:`TracedOutput`, whose ``traces`` say why each new token was chosen. The tokens
                are the same as without; each one takes a few per cent longer.
            trace_top_k: how many of the most probable tokens of each distribution a trace lists; 5 by default.

        Raises:
            PromptError: if a prompt is empty, is longer than the shortest member's context, or cannot be made for a
                member.
            AlphaError: if alpha is not finite, has the wrong shape or does not fit the rule.
            RecipeError: for an unknown rule or gate, or a rule that the recipe's experts do not fit.
            TypeError: for an unknown argument.

        Example:
            >>> from proxytune import ProxyTunedForCausalLM
            >>> from transformers import AutoTokenizer
            >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe")
            >>> tokenizer = AutoTokenizer.from_pretrained("my-recipe")
            >>> inputs = tokenizer(["The fox", "The lazy dog"], padding=True, return_tensors="pt")
            >>> ids = model.generate(**inputs, max_new_tokens=5, do_sample=True, seed=1, alpha=[0.5, 1.0])
            >>> len(tokenizer.batch_decode(ids))
            2
        """
        fields = refuse_fields(kwargs, generation_config, self.generation_config)
        if kwargs.get("negative_prompt_ids") is not None and "guidance_scale" not in fields:
            raise ProxyTuneError(
                "negative_prompt_ids are for transformers' guidance_scale; a recipe's member reads negative_prompt"
            )
        if "stop_strings" in fields and kwargs.get("tokenizer") is None:
            if self.tokenizer is None:
                raise ProxyTuneError("stop strings need a tokenizer; pass `tokenizer` to generate()")
            kwargs["tokenizer"] = self.tokenizer
        if not return_trace and trace_top_k is not None:
            raise ProxyTuneError("trace_top_k is for traces; add return_trace=True, or leave it out")
        if return_trace:
            trace_top_k = TOP_K if trace_top_k is None else trace_top_k
            if isinstance(trace_top_k, bool) or not isinstance(trace_top_k, int) or trace_top_k < 1:
                raise ProxyTuneError(f"trace_top_k must be a whole number of at least 1, not {trace_top_k!r}")
        alpha = take_alpha(kwargs, self.expert_names, alpha)
        said = _words_of(generation_config, self.generation_config)
        if said:
            alpha = take_alpha(said, self.expert_names, said.pop("alpha", None)) if alpha is None else alpha
            speculate = said.get("speculate") if speculate is None else speculate
            seed = said.get("seed") if seed is None else seed
            combine = said.get("combine") if combine is None else combine
            gate = said.get("gate") if gate is None else gate
        rule = self.steering.but(combine, gate).rule
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            _check_shape(input_ids)
            if alpha is not None or combine is not None:
                alpha = self.alpha_rows(alpha, input_ids.shape[0], rule)
            negative = negative_rows(negative_prompt, input_ids.shape[0])
            if negative is not None and member_input_ids is not None:
                raise PromptError("give either member_input_ids or negative_prompt, not both")
            if (any(self.own_prompts) or negative is not None) and member_input_ids is None:
                member_input_ids = self.prompter.from_ids(input_ids, kwargs.get("attention_mask"), negative)
            if member_input_ids is not None:
                member_input_ids, member_attention_mask = as_tensors(member_input_ids, member_attention_mask)
            self._check_prompts(input_ids, kwargs.get("attention_mask"), member_input_ids)
        return super().generate(  # type: ignore[misc]
            inputs,
            generation_config,
            alpha=alpha,
            combine=combine,
            gate=gate,
            member_input_ids=member_input_ids,
            member_attention_mask=member_attention_mask,
            speculate=self.speculate if speculate is None else parse_speculate(speculate),
            seed=seed,
            trace_top_k=trace_top_k,
            **kwargs,
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """transformers' own method, which would confuse our arguments with fields of the same names in the config."""
        ours = {name: kwargs.pop(name) for name in WORDS if name in kwargs}
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        for name in _words_of(config):
            delattr(config, name)
        return config, {**model_kwargs, **ours}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Refuse arguments that neither transformers' ``generate`` nor a forward reads."""
        refuse_of_one_member(model_kwargs)
        read = {*signature(self.forward).parameters, "inputs_embeds"} - {"kwargs"}
        if unknown := [name for name, value in model_kwargs.items() if value is not None and name not in read]:
            raise unknown_arguments(
                self.generate, unknown, [*signature(GenerationMixin.generate).parameters, *FIELDS, *read]
            )

    def _sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: our loop, or transformers' own for calls that ours does not support."""
        seed = model_kwargs.pop("seed", None)
        seeds = None if seed is None else row_seeds(seed, input_ids.shape[0])
        if seeds is not None and not generation_config.do_sample:
            raise ProxyTuneError("seed is for sampling; add do_sample=True, or leave it out")
        schedule = self.steering.but(None, model_kwargs.get("gate")).schedule
        if generation_config.is_assistant and schedule is not None:
            raise ProxyTuneError(
                f"an assistant does not know where the answer begins, so the gate {schedule} does not fit"
            )
        plain = synced_gpus or generation_config.is_assistant or model_kwargs.get("past_key_values") is None
        if plain or stopping_criteria.max_length is None:
            if model_kwargs.get("trace_top_k") is not None:
                raise ProxyTuneError(NO_TRACE)
            if seeds is not None:
                generation_config = copy.copy(generation_config)
                generation_config.do_sample = False
                logits_processor = LogitsProcessorList([*logits_processor, RowSampler(seeds)])
            return super()._sample(  # type: ignore[misc]
                cast(Any, input_ids),
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        speculate = model_kwargs.pop("speculate")
        noise = None if seeds is None else Noise(seeds)
        return self._decode(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            model_kwargs,
            speculate,
            noise,
            model_kwargs.pop("trace_top_k"),
        )

    def _decode(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
        speculate: Speculate,
        noise: Noise | None,
        trace_top_k: int | None,
    ) -> Any:
        """Greedy decoding or sampling, with drafts where they pay. Returns the result of ``generate``.

        ``model_kwargs`` hold what ``generate`` has prepared: the cache, mask, positions, alpha, own prompts. Without
        ``noise`` torch's generator draws, and drafts are accepted by rejection sampling.

        Raises:
            ProxyTuneError: if the call asks for a number of drafts, but drafts are not possible.
        """
        stats = _last_calls()[self] = SpeculationStats()
        steering = self.steering.but(model_kwargs.get("combine"), model_kwargs.get("gate"))
        remote = self._remote(config, speculate, trace_top_k, processors, steering)
        if remote is not None:
            model_kwargs["past_key_values"].prompt_scores = []
            speculate = speculate if remote.way == "verify" else False
        n_batch, n_prompt = input_ids.shape
        base = self.seats["base"][0]

        # All members read the prompt.
        cache, prompt, tracer = self._read_prompt(input_ids, config, model_kwargs, steering, trace_top_k)
        # On the device of the logits: copying it there at each step would wait for all pending work of the device.
        alpha = self.alpha_rows(model_kwargs.get("alpha"), n_batch, steering.rule).to(prompt.device)
        asking = None
        if remote is not None:
            asking = _Asking(base, remote, cache, processors, config, needs_best=self.config.plausibility is not None)
            prompt = asking.prompt(partial(self.mix_lanes, alpha=alpha, steering=steering))

        # The text to be written, and who chooses its tokens. Without drafts the rows stay side by side.
        together = together_because(cache, criteria, config, streamer)
        speculate = self._possible_drafts(speculate, cache, processors, together)
        text = Text(
            input_ids,
            criteria,
            pad=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
            has_eos=_has_eos(criteria),
            aligned=n_batch == 1 or speculate is False,
            pure=not any(map(_whole_batch, criteria)),
        )
        returned = ("scores", "logits") if config.return_dict_in_generate else ()
        kept: dict[str, list[Tensor]] = {name: [] for name in returned if getattr(config, f"output_{name}")}
        sampler = Sampler(
            text,
            processors,
            sample=bool(config.do_sample),
            noise=noise,
            context_free=all(type(each) in CONTEXT_FREE for each in processors),
            remember=bool(kept),
            show_scores="scores" in kept,
        )

        # The lanes' states, and who drafts.
        gating = None
        if steering.gate is not None:
            # Traces show the experts' scores of every token. Static caches read one column at a time.
            waits = tracer is None and asking is None and cache.capacity is None and self.unlike_in_pieces is None
            gating = Gating(steering.gate, text, self.tokenizer, self._base_logits, waits=waits)
        states = self._lane_states(cache, gating, remote)
        ahead = [state for state in states if isinstance(state, Ahead)]
        pace = Pace(speculate, self.costs, n_batch)
        n_vocab, n_shared = prompt.shape[-1], self.shared_vocab
        drafter = Drafter(self.drafting, self.lanes, states, text, sampler, pace, n_vocab=n_vocab, n_shared=n_shared)

        def mixture(scores: Sequence[Scores | None], alpha: Tensor, opened: Tensor | None) -> Tensor:
            if asking is None:
                return self.mix_lanes([None if s is None else s.values for s in scores], alpha, steering, opened)
            read = cast("Sequence[Scores]", scores)

            def read_ahead() -> None:
                if ahead and text.room > 0:
                    ids = drafter.likeliest(read[drafter.lane], alpha)
                    for each in ahead:
                        each.guess(ids)

            return asking.certifier.mix(
                read, lambda values: self.mix_lanes(values, alpha, steering, opened), read_ahead
            )

        # Rows that have ended leave, if nothing may look at the whole batch. In static caches no shape may change, and
        # torch's generator draws for all rows at once.
        free = together is None and not any(map(_whole_batch, processors)) and not sampler.rejecting
        leave = cache.capacity is None and (free or not text.aligned)
        steps = decode(
            prompt, states, base, mixture, alpha, text, sampler, drafter, leave=leave, gating=gating, tracer=tracer
        )
        del prompt  # it is large
        traces: list[list[TokenTrace]] = [[] for _ in range(n_batch)]
        room = cast(int, criteria.max_length) - n_prompt - 1  # without a length transformers' own loop runs
        with _drafting(cache, None if speculate is False and not ahead else room):
            for step in steps:
                stats.count(step)
                if asking is not None:
                    asking.certifier.settle(step)
                for row, trace in zip(step.rows, step.trace or ()):
                    traces[row] += trace
                if streamer is not None:
                    for column in zip(*step.tokens):
                        streamer.put(torch.tensor(column))
                for name in kept:
                    kept[name] += getattr(step, name).unbind(dim=1)
            for each in ahead:
                each.settle()

        if asking is not None:
            traces = asking.certified(traces)
            _THREAD.asked = weakref.WeakKeyDictionary({self: asking.asked()})
        if streamer is not None:
            streamer.end()
        if config.return_dict_in_generate or cache._is_user_defined:  # the cache outlives the call
            for state in states:
                if isinstance(state, Later):
                    state.catch_up()
        cache.n_columns += text.length[0] - n_prompt - 1  # the newest token is read by the next call
        result: dict[str, Any] = {"sequences": text.sequences()}
        if config.return_dict_in_generate:
            result |= {name: tuple(parts) for name, parts in kept.items()}
            result["past_key_values"] = cache
        if tracer is not None:
            return TracedOutput(**result, traces=traces)
        return GenerateDecoderOnlyOutput(**result) if config.return_dict_in_generate else result["sequences"]

    def _read_prompt(
        self,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        steering: Steering,
        trace_top_k: int | None,
    ) -> tuple[ProxyTunedCache, Tensor, Tracer | None]:
        """Let all members read the prompt: the cache, the mixture after it, (n_batch, 1, n_vocab), and the tracer of a
        traced call."""
        model_kwargs["output_member_logits"] = trace_top_k is not None
        outputs = cast(Any, self)._prefill(input_ids, config, model_kwargs)
        prompt = outputs.logits[:, -1:]
        if trace_top_k is None:
            return outputs.past_key_values, prompt, None
        tracer = Tracer(
            self.paired({name: logits[:, -1:] for name, logits in outputs.member_logits.items()}),
            prompt,
            lambda scores: self.paired(self.all_logits(self.whole_logits(scores, refuse=False))),
            self.expert_names,
            top_k=trace_top_k,
            steering=steering,
            plausibility=self.config.plausibility,
            n_shared=self.shared_vocab,
        )
        return outputs.past_key_values, prompt, tracer

    def _possible_drafts(
        self, speculate: Speculate, cache: ProxyTunedCache, processors: LogitsProcessorList, together: str | None
    ) -> Speculate:
        """``speculate``, or False where nothing can be drafted, or where ``"auto"`` expects no gain from it.

        Raises:
            ProxyTuneError: for a number of drafts, if they are not possible.
        """
        obstacle = obstacle_of(self, cache, processors, together, speculate)
        if obstacle is not None and speculate not in ("auto", False):
            raise ProxyTuneError(f"speculate={speculate} is not possible here, because {obstacle}; leave it out")
        pays = speculate != "auto" or self.costs.drafts_pay(HOPED_FOR, cache.n_batch)
        return speculate if obstacle is None and pays else False

    def _lane_states(self, cache: ProxyTunedCache, gating: Gating | None, remote: RemoteLane | None) -> list[Any]:
        """One state per lane. Experts read later where a gate that waits is closed, or ahead while a server chooses."""
        # Ahead only for one row: of several guesses one is usually wrong.
        guesses = remote is not None and remote.way == "push" and self.drafting is not None and cache.n_batch == 1
        kind: Any = None
        if gating is not None and gating.waits:
            kind = Later
        elif guesses and all(state.forgets for state in cache.states):
            kind = Ahead
        base = self.seats["base"][0]
        return [state if kind is None or at == base else kind(state) for at, state in enumerate(cache.states)]

    def _base_logits(self, scores: Scores) -> Tensor:
        """The base's logits of the ids that all members have, float32, in its lane's scores."""
        lane = self.seats["base"][0]
        values = [scores.values if at == lane else None for at in range(len(self.lanes))]
        return self.member_logits("base", values)[..., : self.shared_vocab].float()

    def _remote(
        self,
        config: GenerationConfig,
        speculate: Speculate,
        trace_top_k: int | None,
        processors: LogitsProcessorList,
        steering: Steering,
    ) -> RemoteLane | None:
        """The lane of a base behind an API, or None if the base's weights are here.

        Raises:
            ProxyTuneError: if the call asks for something that such a base cannot give.
        """
        lane: Any = self.lanes[self.seats["base"][0]]
        if not isinstance(lane, RemoteLane):
            return None
        rule, gate = steering.rule, steering.gate
        if lane.way == "push":
            names = [type(each).__name__ for each in processors]
            names += ["sampling"] if config.do_sample else ["a trace"] if trace_top_k is not None else []
            names += [f"the rule {rule}"] if rule in ("convex", "dynamic") else []
            names += [] if gate is None else ["a gate"]
            names += ["plausibility"] if self.config.plausibility is not None else []
            if names:
                raise ProxyTuneError(f"with the way push the server chooses, so {names[0]} is not possible; use ask")
        n = lane.endpoint.n
        if lane.sample_named:
            changes = [type(each).__name__ for each in processors if type(each) is not TemperatureLogitsWarper]
            changes += ["the rule convex"] if rule == "convex" else []
            if not config.do_sample or changes:
                why = f"no bound is known under {changes[0]}" if config.do_sample else "this is greedy decoding"
                raise ProxyTuneError(f"--sample-named is for sampling at a temperature alone, and {why}; leave it out")
        elif config.do_sample and not lane.complete:
            raise ProxyTuneError(
                f"sampling needs the base's probabilities of all tokens, and its server gives {n}; decode greedily, or "
                "draw from those alone (--sample-named)"
            )
        if trace_top_k is not None and not lane.complete:
            raise ProxyTuneError(
                f"a trace needs the base's probabilities of all tokens, and its server gives {n}; leave the trace out"
            )
        whole = "the rule dynamic" if rule == "dynamic" else None
        if gate is not None and steering.schedule is None:
            whole = f"the gate {gate.kind}"
        if whole is not None and not lane.complete:
            raise ProxyTuneError(
                f"{whole} needs the base's probabilities of all tokens, and its server gives {n}; leave it out"
            )
        if lane.way != "verify" and speculate not in ("auto", False):
            raise ProxyTuneError(f"speculate={speculate} needs the way verify, and the base is asked by {lane.way}")
        return lane

    def _check_prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None, own: Mapping[str, Tensor] | None
    ) -> None:
        """Check that each member can read its prompt: every id is in its vocabulary, and the prompt fits its
        context."""
        for name in self.seats:
            ids, mask = (own[name], None) if own and name in own else (input_ids, attention_mask)
            self._check_ids(name, ids, mask)
            length = ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
            limit = self.context_of(name)
            if limit is not None and length > limit:
                raise PromptError(
                    f"the prompt has {length} tokens, but member {name!r} can read only {limit}; shorten the prompt"
                )

    def _check_ids(self, name: str, ids: Tensor, mask: Tensor | None) -> None:
        """Check that member ``name`` has every id that is not masked."""
        width = self.lanes[self.seats[name][0]].n_vocab
        read = ids if mask is None else ids.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
        if (highest := int(read.max())) >= width or int(read.min()) < 0:
            raise PromptError(f"the prompt has token id {highest}, but member {name!r} has only {width} tokens")

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        for key in ("member_input_ids", "member_attention_mask"):  # transformers expands tensors, not mappings
            if model_kwargs.get(key) is not None and expand_size > 1:
                model_kwargs[key] = {
                    name: ids.repeat_interleave(expand_size, dim=0) for name, ids in model_kwargs[key].items()
                }
        schedule = self.steering.but(None, model_kwargs.get("gate")).schedule
        if input_ids is not None and (any(self.own_prompts) or schedule is not None):
            model_kwargs["prompt_length"] = input_ids.shape[1]
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, ProxyTunedCache):
            raise ProxyTuneError("`past_key_values` must come from this model; make one with model.new_cache()")
        if cache is not None:
            cache._is_user_defined = True  # transformers asks it of a cache that outlives generate()
        elif generation_config.use_cache is not False:
            capacity = None
            if (generation_config.cache_implementation or self.cache_implementation) == "static":
                widest = [ids.shape[1] for ids in (model_kwargs.get("member_input_ids") or {}).values()]
                capacity = max_cache_length + max(widest, default=0) + SPARE_COLUMNS
            cache = model_kwargs["past_key_values"] = self.new_cache(capacity)
        if cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        # An assistant is another model, which does not know our arguments.
        ours = (*OURS, "prompt_length", "output_member_logits", "seed", "trace_top_k")
        plain = {key: value for key, value in model_kwargs.items() if key not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=plain, **kwargs)  # type: ignore[misc]

    @property
    def init_continuous_batching(self) -> Any:
        # Paged attention has one cache, not one per member. Servers ask with hasattr(), and then serve without it.
        raise AttributeError("a recipe cannot be served with transformers' continuous batching")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching keeps one paged cache, not one per member."""
        raise ProxyTuneError("generate_batch() does not fit several members' caches; use generate()")


def refuse_of_one_member(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that make sense only for one member.

    Raises:
        ProxyTuneError: names the first of these arguments that was given.
    """
    for name in OF_ONE_MEMBER:
        if (value := arguments.get(name)) is not None and value is not False:
            raise ProxyTuneError(f"`{name}` belongs to one member, not to the mixture; ask model.member(NAME) for it")


def _words_of(*configs: GenerationConfig | None) -> dict[str, Any]:
    """Our own fields in generation configs; the first config comes first. (Some tools can pass on only a config.)"""
    found: dict[str, Any] = {}
    for config in filter(None, configs):
        words = {name: value for name, value in vars(config).items() if name in WORDS or name.startswith(NAMED)}
        if any(name.startswith("alpha") for name in found):  # alphas of several configs are not combined
            words = {name: value for name, value in words.items() if not name.startswith("alpha")}
        found = {**words, **found}
    return found


def _check_shape(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise PromptError(f"input_ids must be a tensor of shape (n_batch, n_columns), not {type(input_ids).__name__}")
    if input_ids.dim() != 2:
        shape = tuple(input_ids.shape)
        raise PromptError(f"input_ids have shape {shape}, not (n_batch, n_columns); one row is input_ids[None]")
    if input_ids.shape[1] == 0:
        raise PromptError("the prompt is empty; give at least one token")
