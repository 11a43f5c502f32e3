"""The transformers composite: a proxy-tuned model is just a model.

Its central method is :meth:`ProxyTunedForCausalLM.forward`: each lane (a set of weights) reads its members' rows, and
the members' logits are mixed. Beams, assistants, lm_eval and training call it. Greedy decoding and sampling read the
lanes in a loop of their own, see :mod:`proxytune.generation_mixin`.

From outside there is one sequence: ``input_ids``, as the base reads it. A member with a prompt of its own reads ``own
prompt + continuation``, where the continuation is what follows column ``prompt_length`` of ``input_ids``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.assembling import config_of_members, load_parts, loading_of_call
from proxytune.cache import ProxyTunedCache
from proxytune.decoding.certificate import bounded, known_ids
from proxytune.decoding.cost import APART_BYTES
from proxytune.decoding.drafting import choose_drafting, costs_by_role
from proxytune.decoding.lane import Scores, stacked
from proxytune.decoding.mixing import Members, mix, scheduled
from proxytune.decoding.pace import parse_speculate
from proxytune.errors import MemberError, PromptError, ProxyTuneError, RecipeError, unknown_arguments
from proxytune.generation_mixin import (
    NO_TRACE,
    OF_ONE_MEMBER,
    SpeculationStats,
    SteeredGenerationMixin,
    last_call,
    refuse_of_one_member,
)
from proxytune.lanes.kernels import compile_model
from proxytune.lanes.reading import refuse_unequal_lengths, unlike_in_pieces
from proxytune.lanes.transformers import TransformersLane, kept_positions
from proxytune.own_prompts import comparable, first_columns, last_columns, reads_its_own
from proxytune.recipe.alpha import alpha_rows, take_alpha
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.generation_config import adapted, base_generation_config
from proxytune.recipe.members import Loading, load_recipe_tokenizer
from proxytune.recipe.parts import Expert, Member
from proxytune.recipe.prompts import Prompter
from proxytune.recipe.rules import Rule, Steering, check_rule
from proxytune.recipe.store import HUB_ARGUMENTS, load_recipe, read_from
from proxytune.saving import push_model, save_model

__all__ = ["ProxyTunedForCausalLM", "ProxyTunedOutput"]

logger = logging.getLogger(__name__)
PUSHED_ALONG = {"commit_message", "private", "revision", "create_pr"}  # by save_pretrained(push_to_hub=True)
# Further arguments of transformers' save_pretrained, and the values that have no effect.
SAVED_AS_EVER = {
    "variant": None,
    "distributed_checkpoint": False,
    "save_peft_format": True,
    "save_original_format": True,
    "safe_serialization": True,
}
# Arguments that transformers passes to a forward: for the loss, and from generate().
PASSED_ALONG = ("num_items_in_batch", "ignore_index", "shift_labels", "tokenizer", "assistant_tokenizer")


@dataclass
class ProxyTunedOutput(CausalLMOutputWithPast):
    """A causal LM's output, and on request each member's own logits.

    Attributes:
        logits: the mixture, float32, shape = (n_batch, n_positions, n_vocab of the base).
        member_logits: member name -> logits, shape = (n_batch, n_positions, n_vocab of the member); None unless the
            call set ``output_member_logits``.

    Example:
        >>> import torch
        >>> from proxytune import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe")
        >>> output = model(torch.tensor([[1, 40, 41]]), output_member_logits=True)
        >>> base, expert, anti_expert = output.member_logits.values()
        >>> torch.allclose(output.logits, base + 1.0 * (expert - anti_expert))
        True
    """

    # Typed as the value that a call asks for: only callers that asked read it.
    logits: Tensor = None  # type: ignore[assignment]
    past_key_values: ProxyTunedCache | None = None
    member_logits: dict[str, Tensor] = None  # type: ignore[assignment]


class ProxyTunedForCausalLM(PreTrainedModel, SteeredGenerationMixin):
    """A base model steered by experts, as a Hugging Face model (2401.08565, eq. 1).

    Make one with :meth:`from_pretrained` (a recipe) or :meth:`from_members` (models, paths or hub ids).

    Example:
        >>> from proxytune import ProxyTunedForCausalLM
        >>> model = ProxyTunedForCausalLM.from_pretrained("my-recipe", alpha=0.8, dtype="float32")
        >>> model.config.alphas
        [0.8]
        >>> model = ProxyTunedForCausalLM.from_members("./base", "./expert", "./anti-expert")
        >>> list(model.seats)
        ['base', 'expert.expert', 'expert.anti_expert']
    """

    config: ProxyTuneConfig
    _loading = Loading()  # the arguments of from_pretrained, which also find the recipe's tokenizer
    config_class = ProxyTuneConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ProxyTuneConfig,
        lanes: Sequence[TransformersLane] | None = None,
        *,
        tokenizers: Mapping[str, Any] | None = None,
        speculate: Any = "auto",
    ) -> None:
        if lanes is None:
            raise RecipeError("a recipe has no weights of its own; use from_pretrained or from_members")
        config = copy.deepcopy(config)  # do not change the caller's
        super().__init__(config)
        self.lanes = cast(Any, nn.ModuleList(lanes))
        self.tokenizers = dict(tokenizers or {})  # member name -> its tokenizer, where one is known
        self.tokenizer = self.tokenizers.get("base")
        self.prompter = Prompter.of(config.members(), self.tokenizers)
        self.experts = config.expert_list
        self.steering = Steering().but(config.combine, config.gate)
        self.expert_names = [expert.name for expert in self.experts]
        # member name -> (lane, block of rows in it)
        self.seats = {
            name: (lane, block)
            for lane, lane_module in enumerate(lanes)
            for block, seat in enumerate(lane_module.seats)
            for name in seat.names
        }
        widths = [lane.n_vocab for lane in lanes]
        self.shared_vocab, self.widest_vocab = min(widths), max(widths)
        self.own_prompts = [reads_its_own(lane) for lane in lanes]
        for lane_module in lanes:
            lane_module.narrow = lane_module.n_vocab < self.widest_vocab
            refuse_unequal_lengths(lane_module)
        self.drafting = choose_drafting([lane.read_bytes for lane in lanes], self.seats, self.expert_names)
        if self.drafting is not None:
            lanes[self.drafting.lane].prepare_drafts()
        costs = costs_by_role(
            self.seats["base"][0],
            self.drafting,
            [lane.cost for lane in lanes],
            [len(lane.seats) for lane in lanes],
            None if self.drafting is None else lanes[self.drafting.lane].head_cost,
        )
        self.costs = replace(costs, apart=APART_BYTES.get(self.device.type, APART_BYTES["cuda"]))
        self.speculate = parse_speculate(speculate)
        self.unlike_in_pieces = unlike_in_pieces(lanes)
        self.cache_implementation = "dynamic"  # used if a call of generate() gives none
        self._is_stateful = any(getattr(lane.model, "_is_stateful", False) for lane in lanes)
        contexts = self.contexts
        self.shortest = min(contexts, key=lambda name: contexts[name] or float("inf"))
        config.max_position_embeddings = contexts[self.shortest]

    # -- the parts ------------------------------------------------------------------------------------------
    def member(self, name: str) -> PreTrainedModel:
        """The model of member ``name`` (``base``, ``NAME.expert``, ``NAME.anti_expert``), without steering.

        Members with the same weights share them in memory. Each member with an adapter gets its own modules on top of
        the shared weights.

        Raises:
            MemberError: if there is no such member.
        """
        return self._lane_of(name).alone(name)

    def context_of(self, name: str) -> int | None:
        """How many tokens member ``name`` can read; None if its config sets no limit.

        Raises:
            MemberError: if there is no such member.
        """
        return self._lane_of(name).context

    def _lane_of(self, name: str) -> TransformersLane:
        if name not in self.seats:
            raise MemberError(f"there is no member {name!r}; there are {', '.join(self.seats)}")
        return self.lanes[self.seats[name][0]]

    @property
    def contexts(self) -> dict[str, int | None]:
        """Member name -> how many tokens it can read."""
        return {name: self.context_of(name) for name in self.seats}

    @property
    def base(self) -> PreTrainedModel:
        return self.member("base")

    @property
    def _base_lane(self) -> TransformersLane:
        return self._lane_of("base")

    @property
    def device(self) -> torch.device:
        return self._base_lane.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self._base_lane.model is None else self._base_lane.model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        return None  # the mixture's head is spread over the members

    @cached_property
    def recipe_tokenizer(self) -> Any:
        """The recipe's own tokenizer, or the base's if the recipe has none; None if neither has one."""
        own = load_recipe_tokenizer(self.config, self._loading)
        return self.tokenizer if own is None else own

    @property
    def speculation_stats(self) -> SpeculationStats:
        """The drafts of the last greedy or sampling call of :meth:`generate` in this thread."""
        return last_call(self)

    @property
    def complete(self) -> bool:
        """Whether every member scores the whole vocabulary. A base behind an API may score only the top tokens."""
        return all(lane.complete for lane in self.lanes)

    def compile_members(self, how: bool | str = True) -> None:
        """Compile the members' decoding, see lanes.kernels.compile_model. It uses static caches."""
        for lane in self.lanes:
            if lane.model is not None:
                compile_model(lane.model, how)
                lane.compiled = True
        self.cache_implementation = "static"

    # -- the hot path ---------------------------------------------------------------------------------------
    @overload
    def forward(self, input_ids: Tensor, *, return_dict: Literal[False], **kwargs: Any) -> tuple[Any, ...]: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = ...,
        position_ids: Tensor | None = ...,
        past_key_values: ProxyTunedCache | None = ...,
        use_cache: bool | None = ...,
        logits_to_keep: int | Tensor = ...,
        labels: Tensor | None = ...,
        alpha: Any = ...,
        combine: str | None = ...,
        gate: Any = ...,
        member_input_ids: Mapping[str, Tensor] | None = ...,
        member_attention_mask: Mapping[str, Tensor] | None = ...,
        prompt_length: int | None = ...,
        output_member_logits: bool = ...,
        *,
        return_dict: Literal[True] | None = ...,
        **kwargs: Any,
    ) -> ProxyTunedOutput: ...

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ProxyTunedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        alpha: Any = None,
        combine: str | None = None,
        gate: Any = None,
        member_input_ids: Mapping[str, Tensor] | None = None,
        member_attention_mask: Mapping[str, Tensor] | None = None,
        prompt_length: int | None = None,
        output_member_logits: bool = False,
        speculate: Any = None,
        seed: Any = None,
        trace_top_k: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ProxyTunedOutput | tuple[Any, ...]:
        """Read columns with every member and mix the logits. To write text, use :meth:`generate`.

        Args:
            input_ids: shape = (n_batch, n_columns), the columns not yet in the cache.
            attention_mask: shape = (n_batch, n_cached + n_columns), 0 at padding.
            position_ids: shape = (n_batch or 1, n_columns), for members that read ``input_ids``.
            past_key_values: made by an earlier call, or by :meth:`new_cache`.
            logits_to_keep: how many of the last positions to compute, 0 for all.
            labels: shape = (n_batch, n_columns); the loss is transformers' causal LM loss on the mixed logits.
            alpha: the strength of steering, as in :meth:`generate`; by default the recipe's.
            combine, gate: how several experts are joined, and where they steer, as in :meth:`generate`; by default the
                recipe's.
            member_input_ids: member name -> its own prompt, shape = (n_batch, its width), left-padded.
            member_attention_mask: member name -> mask of the same shape, 0 at padding; by default all ones.
            prompt_length: how many columns of the whole sequence are prompt; needed if members have prompts of their
                own, and for a gate that counts the answer's tokens.
            output_member_logits: also return each member's own logits.
            speculate, seed, trace_top_k: for :meth:`generate` only; values that ask for something are refused here.

        Returns:
            float32 logits, shape = (n_batch, n_positions, n_vocab of the base). If members have prompts of their own,
            the positions begin with the last prompt token, because before it the members read different texts.

        Raises:
            PromptError: if members have prompts of their own and the call does not give them or ``prompt_length``.
            AlphaError: if alpha is not finite, has the wrong shape or does not fit the rule.
        """
        alpha = take_alpha(kwargs, self.expert_names, alpha)
        self._refuse(kwargs)
        if speculate not in (None, "auto", False):
            raise ProxyTuneError(
                f"speculate={speculate} is for greedy decoding and sampling with a cache; leave it out"
            )
        if trace_top_k is not None:
            raise ProxyTuneError(NO_TRACE)
        if seed is not None:
            raise ProxyTuneError("seed is for sampling by generate(), without beams or an assistant; leave it out")
        n_batch, n_columns = input_ids.shape
        steering = self.steering.but(combine, gate)
        rows = self.alpha_rows(alpha, n_batch, steering.rule)  # first, so that a bad alpha does not change the cache
        if use_cache is None:
            use_cache = not self.training
        cache = past_key_values
        if cache is None:
            cache = ProxyTunedCache(self.lanes, None if use_cache else 0)
        n_cached = cache.n_columns
        schedule, answer_at, opened = steering.schedule, prompt_length, None
        if schedule is not None and answer_at is None:
            raise PromptError(f"the gate {schedule} counts the answer's tokens; say `prompt_length`")
        if n_cached == 0 and self.shared_vocab < self.widest_vocab:
            for name in self.seats:
                self._check_ids(name, input_ids, attention_mask)
        columns, prompt_length = self._columns(
            cache, input_ids, attention_mask, member_input_ids, member_attention_mask, prompt_length
        )
        if any(self.own_prompts):
            if labels is not None:
                raise PromptError(
                    "`labels` need one prompt for all members; mask the prompt in a recipe of raw prompts"
                )
            # The last prompt token predicts the first shared one.
            n_shared = n_columns - max(prompt_length - n_cached, 0) + (n_cached < prompt_length)
            logits_to_keep = comparable(logits_to_keep, n_shared)
        if schedule is not None:
            following = torch.arange(n_columns)[None] + (n_cached + 1 - cast(int, answer_at))
            opened = scheduled(schedule, following[:, kept_positions(logits_to_keep)])

        logits: list[Tensor] = []  # one per lane, (n_seats * n_batch, n_positions, n_vocab)
        if cache.capacity == 0 and (position_ids is not None or self._wants_gradients()):
            for lane, (ids, mask) in zip(self.lanes, columns):
                inputs = self._inputs(lane, ids, mask, position_ids, n_batch)
                logits.append(lane(**inputs, logits_to_keep=logits_to_keep, use_cache=False))
        else:
            if position_ids is not None:
                _refuse_positions(position_ids, attention_mask, n_cached, n_columns)
            cache.begin(n_batch)
            n_last = logits_to_keep if isinstance(logits_to_keep, int) else 0
            read = [state.read(ids, mask, positions=n_last) for state, (ids, mask) in zip(cache.states, columns)]
            for state in cache.states:  # after all have begun: a base behind an API is asked meanwhile
                state.keep()
            logits = self.whole_logits(read, refuse=cache.prompt_scores is None)
            if cache.prompt_scores is not None:
                cache.prompt_scores = read
            if not isinstance(logits_to_keep, int):
                logits = [values[:, logits_to_keep] for values in logits]
            cache.n_columns = n_cached + n_columns
        mixed = self.mix_lanes(logits, rows, steering, opened)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=mixed, labels=labels, vocab_size=mixed.shape[-1], **kwargs)
        asked = self.all_logits(logits) if output_member_logits else None
        output = ProxyTunedOutput(
            loss=loss,
            logits=cast(Any, mixed),
            past_key_values=None if cache.capacity == 0 else cache,
            member_logits=cast(Any, asked),
        )
        return output if return_dict is not False else output.to_tuple()

    if TYPE_CHECKING:
        __call__ = forward

    def _wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _inputs(
        self, lane: TransformersLane, ids: Tensor, mask: Tensor | None, positions: Tensor | None, n_batch: int
    ) -> dict[str, Tensor | None]:
        """The inputs of a lane that is called without a state."""
        if mask is not None and reads_its_own(lane):
            positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        elif positions is not None:
            positions = positions.expand(n_batch, -1)
        if lane.narrow:
            ids = ids.clamp(max=lane.n_vocab - 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        n_rows = len(lane.seats) * n_batch
        return {
            name: None if value is None else stacked(value, n_rows).to(lane.device) for name, value in inputs.items()
        }

    def whole_logits(self, read: Sequence[Scores], *, refuse: bool) -> list[Tensor]:
        """Logits of whole vocabularies; where a lane knows some tokens alone, -inf for the others.

        Raises:
            ProxyTuneError: with ``refuse``, for such a lane.
        """
        whole = []
        for scores, lane in zip(read, self.lanes):
            values = scores.values
            if scores.ids is not None:
                if refuse and not lane.complete:
                    raise ProxyTuneError(
                        "this needs the base's probabilities of all tokens, and its server gives "
                        f"{scores.ids.shape[-1]}; greedy decoding by generate() does without the others"
                    )
                known = known_ids(scores, lane.n_vocab)
                values = bounded(scores, lane.n_vocab).masked_fill(~known, -torch.inf)
            whole.append(values)
        return whole

    def member_logits(self, name: str, lane_logits: Sequence[Tensor | None]) -> Tensor:
        """The rows of one member in its lane's logits: (n_batch, n_positions, n_vocab of the member)."""
        lane, block = self.seats[name]
        logits = cast(Tensor, lane_logits[lane])
        n_batch = logits.shape[0] // len(self.lanes[lane].seats)
        return logits[block * n_batch : (block + 1) * n_batch]

    def mix_lanes(
        self,
        lane_logits: Sequence[Tensor | None],
        alpha: Tensor,
        steering: Steering | None = None,
        opened: Tensor | None = None,
    ) -> Tensor:
        """The mixture of all lanes' logits, float32, (n_batch, n_positions, n_vocab of the base).

        Where some lane has None, because it has not read while the gate is closed, it is the base. ``opened``: how far
        the gate is open, (n_batch, n_positions), if that is known.
        """
        if any(logits is None for logits in lane_logits):
            return mix(self.member_logits("base", lane_logits), [], alpha[:, :0], **self.mixing(steering))
        return self.mixture(self.all_logits(cast("Sequence[Tensor]", lane_logits)), alpha, steering, opened)

    def mixture(
        self,
        logits: Mapping[str, Tensor],
        alpha: Tensor,
        steering: Steering | None = None,
        opened: Tensor | None = None,
    ) -> Tensor:
        """The mixture, (n_batch, n_positions, n_vocab of the base), of logits by member name; alpha by row."""
        return mix(*self.paired(logits), alpha, opened=opened, **self.mixing(steering))

    def mixing(self, steering: Steering | None = None) -> dict[str, Any]:
        """How logits are mixed: the other arguments of :func:`mix`."""
        own = {"plausibility": self.config.plausibility, "vocab_size": self.shared_vocab}
        return {**vars(steering or self.steering), **own}

    def all_logits(self, lane_logits: Sequence[Tensor]) -> dict[str, Tensor]:
        """Member name -> its rows in all lanes' logits."""
        return {name: self.member_logits(name, lane_logits) for name in self.seats}

    def paired(self, logits: Mapping[str, Tensor]) -> Members:
        """The members' logits in the form of :func:`mix`'s arguments."""
        names = self.expert_names
        return logits["base"], [(logits.get(f"{name}.expert"), logits.get(f"{name}.anti_expert")) for name in names]

    def alpha_rows(self, alpha: Any, n_batch: int, rule: Rule | None = None) -> Tensor:
        """``alpha`` in any accepted form as float32, shape = (n_batch, n_experts); it must fit the rule."""
        default = [expert.alpha for expert in self.experts]  # the config would be parsed again at every token
        rows = alpha_rows(alpha, self.expert_names, default, n_batch)
        check_rule(rule or self.steering.rule, self.experts, rows)
        return torch.tensor(rows, dtype=torch.float32).reshape(n_batch, len(default))

    def _columns(
        self,
        cache: ProxyTunedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        member_input_ids: Mapping[str, Tensor] | None,
        member_attention_mask: Mapping[str, Tensor] | None,
        prompt_length: int | None,
    ) -> tuple[list[tuple[Tensor, Tensor | None]], int]:
        """The new ids and their mask for each lane, and the column at which the continuation of own prompts begins."""
        if not any(self.own_prompts):
            if member_input_ids:
                raise PromptError("`member_input_ids` were given, but every member of the recipe reads the raw prompt")
        elif cache.n_columns == 0:
            columns = first_columns(
                self.lanes, input_ids, attention_mask, member_input_ids, member_attention_mask, prompt_length
            )
            cache.prompt_length = cast(int, prompt_length)
            return columns, cache.prompt_length
        elif member_input_ids is not None and cache.n_columns == cache.prompt_length - 1:
            return last_columns(self.lanes, input_ids, member_input_ids), cache.prompt_length
        elif prompt_length not in (None, cache.prompt_length):
            raise PromptError(
                "members have prompts of their own, so a cache cannot be continued with a longer prompt; start without "
                "`past_key_values`"
            )
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return [(input_ids, mask)] * len(self.lanes), cache.prompt_length

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Refuse options that would have no effect."""
        refuse_of_one_member(kwargs)
        known = (*PASSED_ALONG, *OF_ONE_MEMBER)
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise unknown_arguments(self.forward, unknown)

    def new_cache(self, capacity: int | None = None) -> ProxyTunedCache:
        """An empty cache for all members, to pass as ``past_key_values``. It grows; with ``capacity`` it is static and
        holds that many columns."""
        return ProxyTunedCache(self.lanes, capacity)

    # -- making one -----------------------------------------------------------------------------------------
    @classmethod
    def from_members(
        cls,
        base: PreTrainedModel | Member | str,
        expert: PreTrainedModel | Member | str | None = None,
        anti_expert: PreTrainedModel | Member | str | None = None,
        alpha: float = 1.0,
        *,
        experts: Sequence[Expert | Mapping[str, Any]] | None = None,
        combine: str = "sum",
        gate: Any = None,
        plausibility: float | None = None,
        renamed_tokens: Mapping[str, Sequence[str]] | None = None,
        tokenizer: Any = None,
        tokenizers: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> ProxyTunedForCausalLM:
        """Combine models into a steered model. Each may be in memory, on disk or on the hub.

        Args:
            base, expert, anti_expert: a transformers model (or PeftModel), a :class:`Member`, a path or a hub id.
            alpha: the strength of steering.
            experts: several experts, instead of ``expert``, ``anti_expert`` and ``alpha``. Each is a mapping with
                ``name``, ``expert``, ``anti_expert`` and ``alpha``; ``expert_prompt`` and ``anti_expert_prompt`` say
                what the two read.
            combine, gate, plausibility, renamed_tokens: see :class:`ProxyTuneConfig`.
            tokenizer, tokenizers: the base's tokenizer, and member name -> tokenizer for members in memory. They are
                needed to compare vocabularies and to make prompts for members.
            **kwargs: how to load members that are not in memory, as in :meth:`from_pretrained` (``dtype``,
                ``device_map``, ...).
        """
        if experts is None:
            experts = [{"expert": expert, "anti_expert": anti_expert, "alpha": alpha}]
        elif expert is not None or anti_expert is not None:
            raise RecipeError("give either `expert`/`anti_expert` or the list `experts`, not both")
        own = {"combine": combine, "gate": gate, "plausibility": plausibility, "renamed_tokens": renamed_tokens}
        config, given = config_of_members(base, experts, own)
        return cls._load(config, given, tokenizer, dict(tokenizers or {}), kwargs, cls.from_members)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: ProxyTuneConfig | None = None,
        alpha: Any = None,
        **kwargs: Any,
    ) -> ProxyTunedForCausalLM:
        """Load a recipe: a directory, a hub id, or ``"demo"``.

        Args:
            alpha: the strength of steering instead of the recipe's: a number for all experts, a list with one per
                expert, or a mapping by name. ``**{"alpha.NAME": 0.5}`` sets it for one expert.
            dtype, device_map, quantization_config, attn_implementation: for members that set none in the recipe.
            member_trust_remote_code: run code from the *members'* repositories. ``trust_remote_code`` is different: it
                lets a recipe be loaded without importing proxytune first, and is not passed on to the members.
            share: False loads a copy of the weights for each LoRA member: more memory, to compare with.
            speculate: the default of ``speculate`` in :meth:`generate`; ``"auto"`` unless given.
            pack: rearrange the weights for the CPU: several times faster there, for float32 and bfloat16. Loading takes
                longer.
            compile: compile the members with ``torch.compile``: True, or one of its modes. The first calls then take
                minutes.

        Raises:
            RecipeError: if there is no such recipe.
            MemberError: if a member cannot be loaded.
            VocabularyError: if members have different vocabularies.
            AlphaError: if alpha does not fit the experts.
        """
        if model_args:
            raise TypeError(f"from_pretrained() takes one argument by position, the recipe, not {model_args[0]!r} too")
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if config is None:
            config = load_recipe(pretrained_model_name_or_path, **hub)
        elif not isinstance(config, ProxyTuneConfig):
            raise RecipeError(f"`config` is a ProxyTuneConfig, not a {type(config).__name__}")
        config = copy.deepcopy(config)  # the caller's is left as it is
        config = read_from(config, hub.get("subfolder"), hub.get("revision"))
        alpha = take_alpha(kwargs, config.expert_names, alpha)
        if alpha is not None:
            config = config.with_alpha(alpha)
        return cls._load(config, {}, None, {}, kwargs)

    @classmethod
    def _load(
        cls,
        config: ProxyTuneConfig,
        given: dict[str, Any],
        tokenizer: Any,
        tokenizers: dict[str, Any],
        kwargs: dict[str, Any],
        called: Callable[..., Any] | None = None,
    ) -> ProxyTunedForCausalLM:
        speculate = parse_speculate(kwargs.pop("speculate", "auto"))
        compiled = kwargs.pop("compile", False)
        loading = loading_of_call(called or cls.from_pretrained, config, kwargs)
        tokenizers["base"] = tokenizers.get("base", tokenizer)
        lanes = load_parts(config, loading, given, tokenizers)
        model = cls(config, lanes, tokenizers=tokenizers, speculate=speculate)
        model._loading = loading
        elsewhere = model._base_lane.model is None
        own = base_generation_config(config, loading, base="base" not in given and not elsewhere)
        ends = {"eos_token_id": model.tokenizer.eos_token_id} if elsewhere else {}
        generation = own or (GenerationConfig(**ends) if elsewhere else model._base_lane.model.generation_config)
        model.generation_config, notes = adapted(generation, model._base_lane.n_vocab, "the generation config")
        for note in notes:
            logger.warning(note)
        if compiled not in (False, None):
            model.compile_members(compiled)
        return model.eval()

    @classmethod
    def _from_config(cls, config: ProxyTuneConfig, **kwargs: Any) -> ProxyTunedForCausalLM:
        raise RecipeError("a recipe has no weights of its own; use from_pretrained or from_members")

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        bundle: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        **others: Any,
    ) -> None:
        """Write the recipe to a directory. Members that were in memory or were trained here are saved in
        ``directory/members``; the others stay where they are.

        Args:
            is_main_process: if False, nothing is written.
            state_dict: trainers pass it; it must hold the weights that the model has.
            push_to_hub: also upload it, to ``repo_id`` or under the directory's name; other arguments as in
                :meth:`push_to_hub`.
            bundle: save every member in the directory, so that it works on any machine. It is then as large as all
                members.

        Raises:
            ProxyTuneError: for arguments of transformers that a recipe does not support.
        """
        for name in others.keys() & SAVED_AS_EVER.keys():
            if (value := others.pop(name)) != SAVED_AS_EVER[name]:
                raise ProxyTuneError(f"a recipe is not saved with {name}={value!r}; leave it out")
        if unknown := others.keys() - PUSHED_ALONG:
            raise unknown_arguments(self.save_pretrained, unknown, PUSHED_ALONG)
        if not push_to_hub and (others or repo_id is not None):
            raise ProxyTuneError(f"{next(iter(others), 'repo_id')} is for push_to_hub=True; add that, or leave it out")
        if state_dict is not None and not _same_weights(state_dict, self.state_dict()):
            raise ProxyTuneError(
                "state_dict= holds other weights than the model; load them (load_state_dict) to save them"
            )
        if not is_main_process:
            return
        directory = Path(save_directory)
        save_model(self, directory, bundle=bundle, max_shard_size=max_shard_size)
        if push_to_hub:
            self.push_to_hub(repo_id or directory.name, bundle=bundle, token=token, **others)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        bundle: bool = False,
        commit_message: str = "Upload recipe",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the recipe to the hub with a model card that names its members and their licences. Returns the address
        of the commit."""
        place: Any = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        return push_model(self, repo_id, bundle=bundle, commit_message=commit_message, **place)


def _same_weights(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return given.keys() == own.keys() and all(
        given[name].data_ptr() == weight.data_ptr() or torch.equal(given[name].to(weight), weight)
        for name, weight in own.items()
    )


def _refuse_positions(position_ids: Tensor, attention_mask: Tensor | None, n_cached: int, n_columns: int) -> None:
    """Refuse other positions than the default. With a cache, a token's position is the number of tokens before it, as
    in ``generate``."""
    mask = torch.ones(1, n_cached + n_columns) if attention_mask is None else attention_mask
    mask = mask.to(position_ids.device).long()
    expected = (mask.cumsum(dim=1) - 1)[:, -n_columns:]
    if bool(((position_ids - expected) * mask[:, -n_columns:]).any()):
        raise ProxyTuneError(
            "position_ids count a row's tokens, as the mask does, where a cache is kept; others need use_cache=False"
        )


AutoModelForCausalLM.register(ProxyTuneConfig, ProxyTunedForCausalLM, exist_ok=True)
