"""Greedy decoding and sampling of a composite: what ``generate`` prepared, handed to the loop, and what it returns.

Here it is decided whether drafts are possible at all; :mod:`proxytune.decoding` does the rest.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, generation
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from proxytune.cache import ProxyTunedCache
from proxytune.decoding.cost import Costs
from proxytune.decoding.drafting import Drafter, Drafting
from proxytune.decoding.lane import Scores
from proxytune.decoding.loop import Step, decode
from proxytune.decoding.noise import Noise
from proxytune.decoding.pace import Pace, Speculate
from proxytune.decoding.sampling import Sampler
from proxytune.decoding.text import Text
from proxytune.errors import ProxyTuneError

__all__ = ["SpeculationStats", "last_call", "sample"]

HOPED_FOR = 0.75  # the acceptance, the demo's, at which drafting must pay for "auto" to try it


class _LastCalls(threading.local):
    """The statistics of each model's last call, in each thread."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Any, SpeculationStats] = weakref.WeakKeyDictionary()


_LAST_CALLS = _LastCalls()


def last_call(model: Any) -> SpeculationStats:
    """What the model's last greedy or sampling call in this thread drafted; of all zeros before the first."""
    return _LAST_CALLS.of.get(model) or SpeculationStats()


@dataclass
class SpeculationStats:
    """What one call of ``generate`` drafted. Counts are of tokens, summed over the rows that were not yet finished.

    Attributes:
        cycles: passes of M after the prompt's. emitted: new tokens, the prompt's own pass included.
        drafted, accepted: tokens that a member drafted, and how many of them were accepted.
        looked_up, lookups_accepted: the same of drafts copied from the text so far, in ``lookup_cycles`` of the cycles.
        judged: drafts of both kinds that were held against the mixture: all but those behind a rejected one.
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
        """The share of judged drafts that was accepted (the α of 2211.17192), or None where nothing was drafted."""
        return (self.accepted + self.lookups_accepted) / self.judged if self.judged else None


# ---- what drafts may be held against ---------------------------------------------------------------------------
# Processors that look at one row's scores alone: all positions of all rows go through them in one call.
CONTEXT_FREE = tuple(
    getattr(generation, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
# Those, and processors and criteria that are functions of one row's text and scores: drafts may ask them about texts
# that are thrown away, and rows of unequal lengths can be given to them one by one. Anything else (a class of the
# user's, one with a state, one that counts rows) sees each token once and the whole batch, undrafted.
ROW_BY_ROW = CONTEXT_FREE + tuple(
    getattr(generation, name)
    for name in (
        "ExponentialDecayLengthPenalty",
        "ForcedEOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
    )
)


class Steered(Protocol):
    """What is asked of the composite here: who can draft and what that costs, and how lanes are mixed."""

    config: Any
    lanes: Any
    drafting: Drafting | None
    costs: Costs
    unlike_in_pieces: str | None
    shared_vocab: int

    @property
    def device(self) -> torch.device: ...

    @property
    def _prefill(self) -> Any: ...

    def mix_lanes(self, lane_logits: Sequence[Tensor], alpha: Tensor) -> Tensor: ...

    def alpha_rows(self, alpha: Any, n_batch: int) -> Tensor: ...


def _whole_batch(each: Any) -> bool:
    """Whether a processor or criterion may need all rows of a batch, as far as is known."""
    return type(each) not in ROW_BY_ROW and not getattr(type(each), "row_by_row", False)


def obstacle_of(
    model: Steered,
    cache: ProxyTunedCache,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> str | None:
    """Why nothing can be drafted in this call, or None."""
    if model.drafting is None:
        return "no member with weights of its own can draft for the base"
    if not all(state.forgets for state in cache.states):
        return "a member's cache cannot forget rejected tokens"
    if model.unlike_in_pieces is not None:
        return model.unlike_in_pieces

    for each in filter(_whole_batch, processors):
        return (
            f"{type(each).__name__} is not known to depend on a row's text and scores alone, and drafts call it "
            "more than once a token (a class that does says so with `row_by_row = True`)"
        )
    if cache.n_batch == 1:
        return None
    for each in filter(_whole_batch, criteria):
        return f"{type(each).__name__} must see the rows of a batch side by side"
    if streamer is not None:
        return "a streamer takes the rows of a batch side by side"
    if config.return_dict_in_generate or cache._is_user_defined:
        return "the scores and the cache of a batch are returned row beside row"
    if not _has_eos(criteria) and len(criteria) > 1:
        return "without an end token the rows of a batch stop together"
    return None


def _has_eos(criteria: StoppingCriteriaList) -> bool:
    return any(hasattr(each, "eos_token_id") for each in criteria)


@contextmanager
def _drafting(cache: ProxyTunedCache, room: int | None) -> Iterator[None]:
    """Let states expect drafts, which leave room for so many columns; None: no drafts."""
    if room is None:
        yield
        return
    for state in cache.states:
        state.begin_drafts(room)
    try:
        yield
    finally:  # the cache outlives the call, whatever ends it
        for state in cache.states:
            state.end_drafts()


def sample(
    model: Steered,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
    speculate: Speculate,
    noise: Noise | None = None,
) -> Any:
    """Greedy decoding or sampling, with drafts where they pay; what ``generate`` returns.

    Args:
        model: the composite.
        input_ids: the prompt, (n_batch, n_columns), left-padded.
        model_kwargs: what ``generate`` has prepared: the cache, mask, positions, alpha, own prompts.
        noise: where samples are to depend on each row's seed alone, see decoding.noise; otherwise they are drawn from
            torch's generator, and drafts are accepted by rejection sampling.
        The others are those of transformers' ``_sample``.

    Raises:
        ProxyTuneError: if a number of drafts was asked for that this call cannot have.
    """
    stats = _LAST_CALLS.of[model] = SpeculationStats()
    outputs = model._prefill(input_ids, config, model_kwargs)
    cache: ProxyTunedCache = outputs.past_key_values
    prompt = outputs.logits[:, -1:]
    del outputs  # the prompt's logits are large
    n_batch, n_prompt = input_ids.shape
    limit = cast(int, criteria.max_length)  # without one transformers' own loop runs

    obstacle = obstacle_of(model, cache, processors, criteria, config, streamer)
    if obstacle is not None and speculate not in ("auto", False):
        raise ProxyTuneError(f"speculate={speculate} is not possible here, because {obstacle}; leave it out")
    if obstacle is not None or (speculate == "auto" and model.costs.best_drafts(HOPED_FOR, n_batch) == 0):
        speculate = False  # and the rows stay side by side
    pad = config._pad_token_tensor
    text = Text(
        input_ids,
        criteria,
        pad=0 if pad is None else int(pad),
        has_eos=_has_eos(criteria),
        aligned=n_batch == 1 or speculate is False,
    )
    sampler = Sampler(
        text,
        processors,
        sample=bool(config.do_sample),
        noise=noise,
        context_free=all(type(each) in CONTEXT_FREE for each in processors),
        remember=bool(config.return_dict_in_generate and (config.output_scores or config.output_logits)),
    )
    drafter = Drafter(
        model.drafting if obstacle is None else None,
        model.lanes,
        cache.states,
        text,
        sampler,
        Pace(speculate, model.costs, n_batch),
        n_vocab=model.config.vocab_size,
        n_shared=model.shared_vocab,
    )

    def mixture(scores: Sequence[Scores], alpha: Tensor) -> Tensor:
        return model.mix_lanes([each.values for each in scores], alpha)

    # On the device of the logits: a copy to it at each step would wait for all that the device has still to do.
    alpha = model.alpha_rows(model_kwargs.get("alpha"), n_batch).to(model.device)
    # Static caches keep finished rows, so that no shape changes under a compiled model; so do calls in which something
    # may look at the whole batch.
    leave = cache.capacity is None and not any(map(_whole_batch, (*processors, *criteria)))
    steps = decode(prompt, cache.states, mixture, alpha, text, sampler, drafter, leave=leave)
    kept: list[Step] = []
    with _drafting(cache, None if speculate is False else limit - n_prompt - 1):
        for step in steps:
            stats.count(step)
            if streamer is not None:
                for column in zip(*step.tokens):
                    streamer.put(torch.tensor(column))
            if sampler.remember:
                kept.append(step)
    if streamer is not None:
        streamer.end()
    cache.n_columns += text.length[0] - n_prompt - 1  # the newest token is read by the next call
    sequences = text.sequences()
    if not config.return_dict_in_generate:
        return sequences

    def seen(name: str, wanted: bool) -> Any:
        return tuple(part for step in kept for part in getattr(step, name).unbind(dim=1)) if wanted else None

    return GenerateDecoderOnlyOutput(
        sequences=cast(Any, sequences),
        scores=seen("scores", config.output_scores),
        logits=seen("logits", config.output_logits),
        past_key_values=cache,
    )
