"""Alpha per request: its forms in a request, and the columns that carry it beside the hidden states.

A request has ``extra_args`` (``vllm_xargs`` in the OpenAI API), which can hold only scalars and flat lists::

    {"alpha": 0.5}                            for all experts
    {"alpha": [0.5, 1.0]}                     one per expert, in the recipe's order
    {"alpha.math": 0.5}                       for one expert by name; others use "alpha" or the recipe's
    {"combine": "mean"}                       the rule by which several experts are joined
    {"gate": "unsure=0.9"}                    where to steer; "between" only where the text is known, see `unread`
    {"weight.base": 1, "weight.math.expert": 1}    the sum of members' logits by these weights, and no steering

The transformers engine takes the same but for the weights (:func:`proxytune.recipe.alpha.take_alpha`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proxytune.errors import AlphaError, ProxyTuneError, RecipeError
from proxytune.recipe.alpha import finite_alpha, resolve_alpha, take_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.parts import Expert
from proxytune.recipe.rules import Steering, check_rule
from proxytune.vllm.own_prompts import ids_in

__all__ = ["PIECES", "Recipe", "Request", "Row", "join", "requested", "split", "unread"]

logger = logging.getLogger(f"vllm.{__name__}")  # so that vLLM's settings show it

WEIGHT = "weight."  # and the name of a member
PIECES = 3  # three bfloat16 with 8 bits each hold the 24 bits of a float32 exactly


Weights = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Request:
    """What a request asks for.

    Attributes:
        alphas: one per expert. steering: how they steer. weights: (member, weight) in place of both; the others' are 0.
        prompts: part -> what it reads in place of the outer prompt (:mod:`proxytune.vllm.own_prompts`).
    """

    alphas: tuple[float, ...]
    steering: Steering
    weights: Weights = ()
    prompts: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, compare=False)

    @property
    def how(self) -> Steering | Weights:
        """How members' logits become the mixture's."""
        return self.weights or self.steering

    @property
    def by_text(self) -> bool:
        """Whether it depends on the text of the answer."""
        return self.steering.by_text and not self.weights


@dataclass(frozen=True)
class Row:
    """A request in a batch.

    Attributes:
        n_read, n: its tokens that were read before, and those in the batch.
        n_prompt: the length of its outer prompt.
        tokens: its ids, at least the first ``n_read + n``; None where they are on the device alone.
    """

    request: Request
    n_read: int
    n: int
    n_prompt: int
    tokens: np.ndarray[Any, Any] | None

    @property
    def filled(self) -> tuple[int, int] | None:
        """The places of the outer prompt that the base does not read, from and up to; None if it reads them all."""
        ids = self.request.prompts.get("base")
        return None if ids is None or len(ids) == self.n_prompt else (len(ids) - 1, self.n_prompt - 1)

    def answers(self) -> list[list[int]]:
        """The answer as it is after each of the row's tokens in the batch."""
        assert self.tokens is not None
        told = self.tokens[self.n_prompt : self.n_read + self.n].tolist()
        return [told[: max(self.n_read + at + 1 - self.n_prompt, 0)] for at in range(self.n)]


def unread(vllm_config: Any) -> str | None:
    """Why an engine's worker does not know the text of the answers that it writes, and what to do; None if it does."""
    if vllm_config.model_config.skip_tokenizer_init:
        return "this server has no tokenizer; start it without --skip-tokenizer-init"
    if vllm_config.use_v2_model_runner:
        return "vLLM's V2 model runner keeps it on the device; start the server with VLLM_USE_V2_MODEL_RUNNER=0"
    if vllm_config.scheduler_config.async_scheduling:
        return "a step begins before the last token is known; start the server with --no-async-scheduling"
    return None


def requested(
    extra_args: Mapping[str, Any] | None,
    experts: Sequence[Expert],
    usual: Steering,
    *,
    split: bool = False,
    unread: str | None = None,
) -> Request:
    """What a request asks for. Other keys of ``extra_args`` are ignored.

    Args:
        experts, usual: the recipe's experts, and how they steer. split: whether vocabularies are split over processes,
            so that a request cannot ask for what needs them whole. unread: why the text of answers is not known.

    Raises:
        AlphaError: for a value that is not finite or does not fit the rule, a list of another length, an unknown name,
            a weight below 0, and weights beside alphas, a rule or a gate. RecipeError: for a rule or gate that is
            unknown or not possible.
    """
    names, others = [expert.name for expert in experts], dict(extra_args or {})
    if weights := weights_of(others, experts):
        return Request(tuple(expert.alpha for expert in experts), usual, weights)
    steering = usual.but(others.pop("combine", None), others.pop("gate", None))
    alpha = take_alpha(others, names, others.pop("alpha", None))
    row = resolve_alpha(alpha, names, [expert.alpha for expert in experts])
    check_rule(steering.rule, experts, [row])
    if unread is not None and steering.by_text:
        raise RecipeError(f"the gate {steering.gate} needs the text of the answer, but {unread}")
    if split and not steering.local:
        what = f"the gate {steering.gate}" if steering.gate is not None else f"the rule {steering.rule}"
        raise RecipeError(
            f"{what} needs whole vocabularies, which are split over processes here; leave it out, or name it in the "
            "recipe"
        )
    return Request(row, steering)


def weights_of(extra_args: Mapping[str, Any], experts: Sequence[Expert]) -> Weights:
    """The weights of members in a request, without those that are 0; empty if it has none."""
    given = {name[len(WEIGHT) :]: value for name, value in extra_args.items() if name.startswith(WEIGHT)}
    if not given:
        return ()
    members = ["base"]
    for expert in experts:
        members += [f"{expert.name}.{side}" for side in ("expert", "anti_expert") if getattr(expert, side) is not None]
    if unknown := [name for name in given if name not in members]:
        raise AlphaError(f"there is no member {unknown[0]!r} to give a weight; there are {', '.join(members)}")
    if other := [name for name in extra_args if name in ("combine", "gate") or name.partition(".")[0] == "alpha"]:
        raise AlphaError(f"a request has weights of members or {other[0]}, not both")
    weights = {name: finite_alpha(value, f"the weight of {name}") for name, value in given.items()}
    if min(weights.values()) < 0 or not any(weights.values()):
        raise AlphaError("weights of members are 0 or more, and one of them is more than 0")
    return tuple(sorted((name, weight) for name, weight in weights.items() if weight))


class Recipe:
    """A recipe's experts, and how they are mixed unless a request says otherwise; read once.

    Attributes:
        default: what a request asks for that says nothing.
    """

    def __init__(self, config: ProxyTuneConfig) -> None:
        self.experts = config.expert_list
        self.names = [expert.name for expert in self.experts]
        self.default = requested({}, self.experts, Steering().but(config.combine, config.gate))

    def requested(self, extra_args: Mapping[str, Any] | None, engine: Any = None) -> Request:
        """What a request asks for; see :func:`requested`.

        Args:
            engine: its ``VllmConfig``; None where requests have been checked. Vocabularies are split over processes
                with tensor parallelism, unless the recipe itself needs them whole.
        """
        usual = self.default.steering
        split = engine is not None and engine.parallel_config.tensor_parallel_size > 1 and usual.local
        why = None if engine is None else unread(engine)
        return requested(extra_args, self.experts, usual, split=split, unread=why)

    def asked_by(self, sampling_params: Any) -> Request:
        """What a request asks for that the frontend accepted.

        Nothing is raised here: an exception in a worker ends the engine for all requests.
        """
        extra_args = getattr(sampling_params, "extra_args", None)
        if not extra_args:
            return self.default
        try:
            asked = self.requested(extra_args)
        except ProxyTuneError as error:
            logger.error("a request reached the worker with bad values, the recipe's are used: %s", error)
            asked = self.default
        return replace(asked, prompts={part: np.asarray(ids) for part, ids in ids_in(extra_args).items()})


def split(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Alpha as columns of another dtype that sum to it: (n, n_experts) float32 -> (n, PIECES * n_experts)."""
    pieces, rest = [], alpha.float()
    for _ in range(PIECES):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    return torch.cat(pieces, dim=-1)


def join(columns: Tensor) -> Tensor:
    """The reverse of :func:`split`, float32."""
    return columns.float().unflatten(-1, (PIECES, -1)).sum(dim=-2)
