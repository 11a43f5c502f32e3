"""The arms: the same prompts answered by the base, the experts alone, the mixture and the controls.

All but ``tuned`` are made from one loading of the recipe's members. ``base_few_shot`` and its like are the base after
solved examples. ``steering_vector`` is the base with changed hidden states. ``mean_logits`` is the mean of M and M+,
and in ``weighted_mean`` M+ has a weight: a mixture like any other, whose anti-expert is the base.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from proxytune.answers.generation import Encoded, with_room
from proxytune.answers.text import alone as alone_model
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.evaluation import ARMS, KINDS, MEANS, shots_of
from proxytune.evaluation.vectors import read_vector, with_vector
from proxytune.lanes.kernels import pack
from proxytune.lanes.loading import load_member
from proxytune.lanes.remote import RemoteLane
from proxytune.model import ProxyTunedForCausalLM
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, load_config, load_recipe_tokenizer, load_tokenizer, loading_of
from proxytune.recipe.options import LoadingOptions
from proxytune.recipe.parts import ApiBase, Prompt
from proxytune.recipe.prompts import Prompter

if TYPE_CHECKING:
    from proxytune.evaluation.answering import TaskPlan

__all__ = [
    "AS_IT_IS",
    "Arm",
    "Arms",
    "Pair",
    "Reader",
    "alone",
    "asks_base",
    "expand_arms",
    "impossible",
    "tuned_prompt",
]

AS_IT_IS, RAW = LoadingOptions(), Prompt()


@dataclass(frozen=True)
class Reader:
    """How the members of an arm read a prompt, and how long it may be. It needs no weights.

    Attributes:
        name: the arm's name. tokenizer: the tokenizer for members that read the raw text.
        own: member name -> (its prompt, its tokenizer), for members with prompts of their own; "" is a model alone.
        contexts: member name -> how many tokens it can read, None for any number.
        reads_all: whether the last token of a scored text is read too, as vLLM does, and not only predicted.
    """

    name: str
    tokenizer: Any
    own: Mapping[str, tuple[Prompt, Any]]
    contexts: Mapping[str, int | None]
    reads_all: bool = False

    def encode(self, plan: TaskPlan, context: str) -> Encoded:
        """The ids that each member reads as the context of an answer."""
        own = self._own_prompts(plan, context)
        ids = own.pop("") if "" in own else self._ids(context)
        return with_room(self.contexts, ids, own)

    def encode_pairs(self, plan: TaskPlan, context: str, continuations: Sequence[str]) -> list[Pair]:
        """The ids of a context and each of its continuations, as lm_eval's HFLM encodes them.

        White space at the end of the context belongs to the continuation. An empty context becomes the token that
        begins a text. Texts that are longer than the model's context lose their beginning. A member's own prompt is
        made from the context without that white space, and is never cut.

        Raises:
            ProxyTuneError: for a continuation without a token, and for texts that do not fit a member's context.
        """
        pairs = []
        raw_limits = [limit for name, limit in self.contexts.items() if limit is not None and name not in self.own]
        limit = min(raw_limits, default=None)  # for members that read the raw text
        for raw, scored in _encoded_as_lm_eval(self.tokenizer, context, continuations):
            own = self._own_prompts(plan, context.rstrip())
            n_predicted = 0 if self.reads_all else 1  # the last token is predicted and never read
            cut = 0 if "" in own or limit is None else max(0, len(raw) + len(scored) - (limit + n_predicted))
            if cut >= len(raw):
                raise ProxyTuneError(f"a continuation has {len(scored)} tokens, but the model can read only {limit}")
            encoded = with_room(self.contexts, own.pop("", raw[cut:]), own)
            if encoded.room is not None and len(scored) > encoded.room:
                raise ProxyTuneError(
                    f"a continuation has {len(scored)} tokens, but after its prompt there is room for {encoded.room}"
                )
            pairs.append(Pair(encoded, scored, cut))
        return pairs

    def _own_prompts(self, plan: TaskPlan, text: str) -> dict[str, list[int]]:
        """Member name -> the ids of its own prompt, for members that have one."""
        prompts = {name: (plan.chat_prompt(prompt, of), of) for name, (prompt, of) in self.own.items()}
        messages = [{"role": "user", "content": text}]
        return Prompter(self.tokenizer, prompts).from_messages(messages, self._ids(text), self._ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


@dataclass(frozen=True)
class Arm:
    """A model, its prompt, and how its logits are used.

    Attributes:
        model: a composite: the recipe's, or one without experts, see :func:`alone`.
        alphas: one value per expert.
        prompt: the prompt of a model alone; a recipe's members have their own.
        begun: the ids that its last prompts began with, such as solved examples -> a cache that has read them.
    """

    name: str
    model: ProxyTunedForCausalLM
    tokenizer: Any
    alphas: tuple[float, ...] = ()
    prompt: Prompt = RAW
    begun: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def remote(self) -> bool:
        """Whether its base is behind an API."""
        return isinstance(self.model.config.base_member, ApiBase)

    @property
    def reader(self) -> Reader:
        own = {} if self.prompt.kind == "raw" else {"": (self.prompt, self.tokenizer)}
        return Reader(self.name, self.tokenizer, self.model.prompter.own | own, self.model.contexts)


@dataclass(frozen=True)
class Pair:
    """A context and a continuation of it to score.

    Attributes:
        context: the prompt before the continuation. continuation: its ids, at least one.
        cut: how many tokens the raw context lost at its beginning.
    """

    context: Encoded
    continuation: list[int]
    cut: int = 0


def _encoded_as_lm_eval(
    tokenizer: Any, context: str, continuations: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The ids of a context and of each continuation, neither of them empty."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.models.huggingface import HFLM

    class Encoder(HFLM):  # type: ignore[misc]
        """lm_eval's own encoding of pairs, without a model: ``loglikelihood`` gives the ids to be scored."""

        def __init__(self) -> None:
            LM.__init__(self)
            self.tokenizer = tokenizer
            self.backend, self.add_bos_token, self.custom_prefix_token_id = "causal", None, None

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            return [(context, continuation) for _, context, continuation in requests]

    encoder = Encoder()
    if encoder.prefix_token_id is None:
        raise ProxyTuneError("the tokenizer has neither a bos_token nor an eos_token, one of which lm_eval needs")
    if not all(continuations):
        raise ProxyTuneError("a continuation is empty")
    requests = [Instance("loglikelihood", {}, (context, text), at) for at, text in enumerate(continuations)]
    pairs = TemplateLM.loglikelihood(encoder, requests, disable_tqdm=True)
    if not all(scored for _, scored in pairs):
        raise ProxyTuneError("a continuation adds no token to its context")
    # A context of only white space has moved into the continuation; lm_eval has no rule for the rest.
    return [(list(ids) or [encoder.prefix_token_id], list(scored)) for ids, scored in pairs]


class Arms:
    """Makes the arms of a recipe, each set of weights loaded once.

    Args:
        names: the arms to make. Without ``proxy_tuned`` only members that some arm needs are loaded.
        loading: how members are loaded, and whether the mixture drafts.
        alphas: one value per expert, instead of the recipe's.
        tuned: a path or hub id of the directly tuned model.
        mean_weight: each expert's weight in ``weighted_mean``; the base's is 1.
        vector: the file of the steering vector, and its strength.
    """

    def __init__(
        self,
        config: ProxyTuneConfig,
        names: Sequence[str],
        loading: LoadingOptions = AS_IT_IS,
        *,
        alphas: Sequence[float] | None = None,
        tuned: str | None = None,
        mean_weight: float | None = None,
        vector: tuple[str, float] | None = None,
    ) -> None:
        self.config, self.names, self.loading, self.tuned = config, list(names), loading, tuned
        self.mean_weight, self.vector = mean_weight, vector
        self.alphas = tuple(config.alphas if alphas is None else alphas)
        self._loading = Loading.of(loading)
        self.members = dict(config.members())
        self.steered: ProxyTunedForCausalLM | None = None
        self.mean: ProxyTunedForCausalLM | None = None  # base and experts, the base in place of the anti-experts
        self.remote: ProxyTunedForCausalLM | None = None  # the base alone, if it is behind an API
        self.alone: dict[str, Any] = {}  # member name -> lane, if the recipe is not loaded completely
        self.tokenizers: dict[str, Any] = {}

    def make(self, name: str) -> Arm:
        """One arm, ready to answer. For ``tuned`` everything else is released."""
        if name == "tuned":
            self.close()
            return self._tuned()
        if name in MEANS:
            return self._mean(name)
        if name == "proxy_tuned":
            return Arm(name, self._whole(), self.tokenizer, self.alphas)
        member = self.member(name)
        if isinstance(self.members[member], ApiBase):
            return Arm(name, self._remote(), self.tokenizer)
        model = self._lane(member).alone(member)
        if name == "steering_vector":
            assert self.vector is not None
            file, strength = self.vector
            model = with_vector(model, read_vector(Path(file)), strength)
        return alone(name, model, self._tokenizer(member), self.members[member].prompt)

    def reader(self, name: str) -> Reader:
        """How an arm will read, from only configs and tokenizers; it loads no weights.

        Raises:
            ProxyTuneError: if a config or a tokenizer cannot be loaded.
        """
        if name == "tuned":
            assert self.tuned is not None
            with loading_of("the tuned model", self.tuned):
                config: Any = AutoConfig.from_pretrained(self.tuned, trust_remote_code=self.loading.trust_remote_code)
            tokenizer, prompt, limit = self._tuned_tokenizer(), tuned_prompt(self.config), _context(config)
        elif name == "proxy_tuned" or name in MEANS:
            whole = name == "proxy_tuned"
            sources = {each: each for each in self.members} if whole else self._sources_of_mean()
            prompts = {each: (self.members[of].prompt, self._tokenizer(of)) for each, of in sources.items()}
            own = {each: pair for each, pair in prompts.items() if pair[0].kind != "raw"}
            return Reader(name, self.tokenizer, own, {each: self._context(of) for each, of in sources.items()})
        else:
            member = self.member(name)
            tokenizer, prompt, limit = self._tokenizer(member), self.members[member].prompt, self._context(member)
        return Reader(name, tokenizer, {} if prompt.kind == "raw" else {"": (prompt, tokenizer)}, {"base": limit})

    def refuse(self, reader: Reader, plan: TaskPlan) -> None:
        """Refuse a task that an arm cannot answer, however short its prompts are. transformers can answer all.

        Raises:
            ProxyTuneError: says why.
        """

    def close(self) -> None:
        """Release every model."""
        self.steered, self.mean, self.remote, self.alone = None, None, None, {}
        gc.collect()

    @property
    def tokenizer(self) -> Any:
        """The recipe's tokenizer or, if it has none, the base's."""
        return self._tokenizer("base")

    def member(self, arm: str) -> str:
        """The member of an arm that is one member alone."""
        wanted = "base" if shots_of(arm) != "raw" or arm == "steering_vector" else arm
        return next(each for each in self.members if each == wanted or each.endswith(f".{wanted}"))

    def _context(self, member: str) -> int | None:
        if isinstance(self.members[member], ApiBase):
            return None
        return _context(load_config(self.config, member, self.members[member], self._loading))

    # -- the models -----------------------------------------------------------------------------------------
    def _whole(self) -> ProxyTunedForCausalLM:
        if self.steered is None:
            self.close()
            self.steered = ProxyTunedForCausalLM.from_pretrained(
                str(self.config.name_or_path), config=self.config, **self.loading.of_model()
            )
        return self.steered

    def _remote(self) -> ProxyTunedForCausalLM:
        """A base behind an API alone. It is asked for one token in each request, and never twice."""
        if self.remote is None:
            config, loading = copy.deepcopy(self.config), replace(self.loading, way="pull", speculate=False)
            config.experts, config.combine, config.gate, config.plausibility = [], "sum", None, None
            if self.steered is None and "proxy_tuned" not in self.names:
                self.remote = ProxyTunedForCausalLM.from_pretrained(
                    str(config.name_or_path), config=config, **loading.of_model()
                )
            else:  # the server that the whole recipe asks, within one budget
                whole = self._whole()
                lane: Any = whole.lanes[whole.seats["base"][0]]
                alone = RemoteLane(lane.source, lane.endpoint, lane.n_vocab, "pull")
                self.remote = ProxyTunedForCausalLM(
                    config, [cast(Any, alone)], tokenizers={"base": self.tokenizer}, speculate=False
                ).eval()
                self.remote.generation_config = whole.generation_config
        return self.remote

    def _lane(self, member: str) -> Any:
        """The lane of a member: in the whole recipe if that is or will be loaded, otherwise its own."""
        if self.steered is not None or "proxy_tuned" in self.names:
            steered = self._whole()
            return steered.lanes[steered.seats[member][0]]
        if member not in self.alone:
            self.alone[member] = load_member(self.config, member, self.members[member], self._loading)
        return self.alone[member]

    def _mean(self, arm: str) -> Arm:
        """The mean (base + sum of w * expert) / (1 + sum of w), which is base + sum of alpha * (expert - base)."""
        weight = 1.0 if arm == "mean_logits" else self.mean_weight
        assert weight is not None
        n_experts = sum(expert.expert is not None for expert in self.config.expert_list)
        self.mean = self.mean or self._against_base()
        return Arm(arm, self.mean, self.tokenizer, (weight / (1 + n_experts * weight),) * n_experts)

    def _against_base(self) -> ProxyTunedForCausalLM:
        """The recipe's experts with the base as their anti-expert; it shares the base's row."""
        base = self.members["base"]
        experts = [replace(e, anti_expert=base, alpha=1.0) for e in self.config.expert_list if e.expert is not None]
        config = self.config.with_members(lambda _, member: member)
        config.experts, config.combine = [e.to_json() for e in experts], "sum"
        config.gate = config.plausibility = None
        sources = self._sources_of_mean()
        given = {name: self._lane(of).alone(of) for name, of in sources.items()}
        tokenizers = {name: self._tokenizer(of) for name, of in sources.items()}
        options = {**self.loading.of_model(), "speculate": False}
        return ProxyTunedForCausalLM._load(config, given, self.tokenizer, tokenizers, options)

    def _sources_of_mean(self) -> dict[str, str]:
        """Member of a mean -> the recipe's member that it is."""
        sources = {"base": "base"}
        for name in self.members:
            if name.endswith(".expert"):
                sources |= {name: name, f"{name.removesuffix('.expert')}.anti_expert": "base"}
        return sources

    def _tuned(self) -> Arm:
        assert self.tuned is not None
        asked, trust = self.loading.of_model(), self.loading.trust_remote_code
        options = {name: asked[name] for name in ("dtype", "device_map") if asked[name]}
        with loading_of("the tuned model", self.tuned):
            model: Any = AutoModelForCausalLM.from_pretrained(self.tuned, trust_remote_code=trust, **options).eval()
        tokenizer = self._tuned_tokenizer()
        if self.loading.pack:
            pack(model)
        return alone("tuned", model, tokenizer, tuned_prompt(self.config))

    def _tuned_tokenizer(self) -> Any:
        with loading_of("the tuned model", self.tuned):
            return AutoTokenizer.from_pretrained(self.tuned, trust_remote_code=self.loading.trust_remote_code)

    def _tokenizer(self, member: str) -> Any:
        if member not in self.tokenizers:
            found = load_recipe_tokenizer(self.config, self._loading) if member == "base" else None
            if found is None and self.steered is not None:
                found = self.steered.tokenizers.get(member)
            if found is None:
                found = load_tokenizer(self.config, member, self.members[member], self._loading)
            if found is None and member == "base":
                raise MemberError("neither the recipe nor its base has a tokenizer; copy the base's into the recipe")
            self.tokenizers[member] = self.tokenizer if found is None else found
        return self.tokenizers[member]


def _context(config: Any) -> int | None:
    """How many tokens a model can read, from its config; None if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def alone(name: str, model: Any, tokenizer: Any, prompt: Prompt = RAW) -> Arm:
    """An arm with one model: a composite without experts."""
    return Arm(name, alone_model(model, tokenizer), tokenizer, prompt=prompt)


def tuned_prompt(config: ProxyTuneConfig) -> Prompt:
    """The prompt of the directly tuned model: the prompt that all experts have, otherwise an error."""
    prompts = {name: member.prompt for name, member in config.members() if name.endswith(".expert")}
    first = next(iter(prompts.values()), Prompt())
    if other := next((name for name, prompt in prompts.items() if prompt != first), None):
        raise ProxyTuneError(
            f"the tuned model reads the expert's prompt, but {next(iter(prompts))} and {other} have different prompts; "
            "evaluate it with a recipe whose experts have one, or leave --tuned out"
        )
    return first


def expand_arms(names: Sequence[str], config: ProxyTuneConfig) -> list[str]:
    """The arms by the names that files have: with several experts, ``expert`` stands for each of them."""
    members = [name for name, _ in config.members()]
    several = len(config.expert_list) > 1
    found: list[str] = []
    for name in names:
        if name not in ARMS and not (several and name in members):
            raise ProxyTuneError(f"there is no arm {name!r}; the arms are {', '.join(ARMS)}")
        if (reason := impossible(name, config)) is not None:
            raise ProxyTuneError(f"{reason}; leave the arm {name} out")
        sides = [member for member in members if several and member.endswith(f".{name}")]
        found += sides or [name]
    return list(dict.fromkeys(found))


def impossible(arm: str, config: ProxyTuneConfig) -> str | None:
    """Why a recipe cannot have an arm, or None."""
    side = KINDS[arm].side if arm in KINDS else None
    if side is not None and not any(name.endswith(f".{side}") for name, _ in config.members()):
        return f"the recipe has no {ARMS[side]}"
    if isinstance(config.base_member, ApiBase) and (arm in MEANS or arm == "steering_vector"):
        what = "a mean of base and expert" if arm in MEANS else "a steering vector"
        return f"{what} needs the base's weights on this machine, and they are behind an API"
    return None


def asks_base(arm: str) -> bool:
    """Whether an arm asks the base for tokens."""
    return arm != "tuned" and not arm.endswith("expert")
