"""The recipe: which models take part, what each one reads, and how strongly each expert steers.

A recipe is a Hugging Face model directory whose ``config.json`` has ``"model_type": "proxytune"``:

    {"model_type": "proxytune",
     "base": {"model": "meta-llama/Llama-2-13b-hf"},
     "experts": [{"name": "chat",
                  "expert": {"model": "meta-llama/Llama-2-7b-chat-hf", "prompt": "chat"},
                  "anti_expert": {"model": "meta-llama/Llama-2-7b-hf"},
                  "alpha": 1.0}]}

:class:`ProxyTuneConfig` is that file as a transformers config; its parts are in :mod:`proxytune.recipe.parts`. Nothing
here loads a weight.
"""

from __future__ import annotations

import copy
import importlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from proxytune.errors import RecipeError
from proxytune.recipe.alpha import resolve_alpha
from proxytune.recipe.gates import gate_of
from proxytune.recipe.parts import RECIPE_FIELDS, ApiBase, Expert, Member, parse_base, parse_experts, unknown_field
from proxytune.recipe.place import MODEL_TYPE
from proxytune.recipe.rules import Rule, check_rule, rule_of
from proxytune.recipe.source import Source, resolve

__all__ = ["ProxyTuneConfig"]

# Fields that transformers and this package write into a recipe's config.json, besides the recipe's own.
WRITTEN_BY_TRANSFORMERS = {
    *("attn_implementation", "auto_map", "experts_implementation", "max_position_embeddings", "model_type"),
    *("name_or_path", "output_attentions", "tie_word_embeddings"),
}


class ProxyTuneConfig(PreTrainedConfig):
    """A recipe as a transformers config.

    Args:
        base: the model to steer (:class:`Member`, or its JSON form).
        experts: a list with one :class:`Expert` (or its JSON form) per steering term, in order.
        combine: the rule by which several experts are joined: ``"sum"`` (the default), ``"mean"``, ``"convex"``,
            ``"dynamic"``, ``"union"`` or ``"intersection"``; see :mod:`proxytune.decoding.mixing`.
        gate: at which tokens to steer, ``{"unsure": 0.9}`` for example; see :class:`proxytune.recipe.gates.Gate`. By
            default all.
        plausibility: only tokens with ``p_base(x) >= plausibility * max p_base`` may be chosen
            (2210.15097, eq. 3); in (0, 1], or None for no mask.
        renamed_tokens: id -> the names of its token in different members, ``{"151643": ["<|endoftext|>",
            "<|end_of_text|>"]}``. Loading accepts these differences between vocabularies, and no others.
        description: what the recipe is for, in a sentence or two. It does not change the output.
        examples: prompts to try, a list of texts. They do not change the output.
        text_config: a copy of the base's config, so that tools can read it without loading the base. If it is missing,
            it is read from the base, if the base is on this machine.

    Raises:
        RecipeError: for an unknown field or a bad value. AlphaError: for an alpha that is not finite.

    Example:
        >>> from proxytune import ProxyTuneConfig
        >>> pair = {"name": "chat", "expert": "./expert", "anti_expert": "./anti-expert"}
        >>> config = ProxyTuneConfig(base="./base", experts=[pair], plausibility=0.1)
        >>> [name for name, _ in config.members()]
        ['base', 'chat.expert', 'chat.anti_expert']
        >>> config.with_alpha({"chat": 0.5}).alphas
        [0.5]
    """

    model_type: ClassVar[str] = MODEL_TYPE
    # Composition, not inheritance: tools that look for the text model (vLLM, generation) ask get_text_config().
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init: ClassVar[bool] = True

    base: Any = None
    experts: Any = None
    combine: str = "sum"
    gate: Any = None
    plausibility: float | None = None
    renamed_tokens: Any = None
    description: str | None = None
    examples: Any = None
    text_config: Any = None
    vocab_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs.keys() - {"torch_dtype"}:  # arguments of AutoConfig for every model
            # An unknown field is a mistake. Names that begin with an underscore belong to other tools.
            if key not in WRITTEN_BY_TRANSFORMERS and not key.startswith("_"):
                raise RecipeError(unknown_field("the recipe", key, RECIPE_FIELDS))
        if self.base is None:
            raise RecipeError("the recipe names no `base`; name the model to steer")
        base = parse_base(self.base)
        experts = parse_experts(self.experts)
        gate = gate_of(self.gate)
        self.gate = None if gate is None else gate.to_json()
        check_rule(rule_of(self.combine), experts, [[expert.alpha for expert in experts]])
        if self.plausibility is not None and not (
            isinstance(self.plausibility, (int, float))
            and not isinstance(self.plausibility, bool)
            and 0.0 < self.plausibility <= 1.0
        ):
            raise RecipeError(f"plausibility must lie in (0, 1], not {self.plausibility!r}")
        self.renamed_tokens = _renamed_tokens(self.renamed_tokens)
        self.description = None if self.description is None else _shown_text(self.description, "`description`")
        self.examples = _examples(self.examples)
        # The JSON form is kept, since a config serialises its attributes.
        self.base = base.to_json()
        self.experts = [expert.to_json() for expert in experts]
        if isinstance(self.text_config, Mapping):
            self.text_config = _config_from_dict(dict(self.text_config))
        elif self.text_config is None and (read_from := kwargs.get("name_or_path")):
            self.text_config = _config_at_hand(base, str(read_from))
        if self.text_config is not None:
            self.vocab_size = self.text_config.get_text_config().vocab_size
            self.tie_word_embeddings = False
        # `transformers serve` looks the first one up in transformers itself; vLLM takes the one it knows.
        self.architectures = self.architectures or ["AutoModelForCausalLM", "ProxyTunedForCausalLM"]
        super().__post_init__(**kwargs)
        # A recipe may be passed to AutoModelForCausalLM. Its model class registers itself; importing it takes seconds.
        importlib.import_module("proxytune.model")

    # -- the parsed view ------------------------------------------------------------------------------------
    @property
    def base_member(self) -> Member:
        return parse_base(self.base)

    @property
    def expert_list(self) -> list[Expert]:
        return [Expert.parse(value, index) for index, value in enumerate(self.experts)]

    @property
    def expert_names(self) -> list[str]:
        """The experts' names, in order."""
        return [expert.name for expert in self.expert_list]

    @property
    def alphas(self) -> list[float]:
        """The recipe's alpha for each expert, in order. (Not called ``alpha``: ``AutoConfig.from_pretrained``
        would swallow ``alpha=`` into an attribute of that name, and the model would never see it.)"""
        return [expert.alpha for expert in self.expert_list]

    def alphas_of(self, alpha: Any) -> tuple[float, ...]:
        """One alpha per expert, from any accepted form; the recipe's own where it says none."""
        return resolve_alpha(alpha, self.expert_names, self.alphas)

    def members(self) -> Iterator[tuple[str, Member]]:
        """Every member with the name that messages and outputs use: ``base``, ``NAME.expert``, ``NAME.anti_expert``."""
        yield "base", self.base_member
        for expert in self.expert_list:
            if expert.expert is not None:
                yield f"{expert.name}.expert", expert.expert
            if expert.anti_expert is not None:
                yield f"{expert.name}.anti_expert", expert.anti_expert

    def locate(self, path: str, revision: str | None = None) -> Source:
        """Find a member's ``path``, which may be relative to where this recipe was read; see :func:`resolve`."""
        return resolve(path, self.name_or_path, revision, getattr(self, "_commit_hash", None))

    def with_members(self, change: Any) -> ProxyTuneConfig:
        """A copy in which ``change(name, member)`` replaces each member."""
        experts = [
            replace(
                expert,
                expert=expert.expert and change(f"{expert.name}.expert", expert.expert),
                anti_expert=expert.anti_expert and change(f"{expert.name}.anti_expert", expert.anti_expert),
            )
            for expert in self.expert_list
        ]
        copied = copy.deepcopy(self)
        copied.base = change("base", self.base_member).to_json()
        copied.experts = [expert.to_json() for expert in experts]
        return copied

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a recipe's JSON; ``kwargs`` are the caller's, as for any config."""
        for key in ("dtype", "torch_dtype"):  # fields of any config, and of a caller; in a recipe nothing reads them
            if config_dict.get(key) is not None:
                raise RecipeError(unknown_field("the recipe", key, RECIPE_FIELDS))
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without attributes that other tools have set and a recipe must not contain."""
        known = {*WRITTEN_BY_TRANSFORMERS, *(f.name for f in fields(self))} - {"dtype"}
        return {key: value for key, value in super().to_dict().items() if key in known or key.startswith("_")}

    def with_mixing(self, rule: Rule | None, gate: Any = None) -> ProxyTuneConfig:
        """A copy with another rule and gate, unless they are None. A call checks that the rule fits its alphas."""
        copied = self.with_members(lambda _, member: member)
        copied.combine = rule or self.combine
        if gate is not None:
            own = gate_of(gate)
            copied.gate = None if own is None else own.to_json()
        return copied

    def with_alpha(self, alpha: Mapping[str, float] | list[float] | tuple[float, ...] | float) -> ProxyTuneConfig:
        """A copy with other alphas: a number for all experts, a list in order, or a mapping by name."""
        copied = self.with_members(lambda _, member: member)
        pairs = zip(self.expert_list, self.alphas_of(alpha))
        copied.experts = [replace(expert, alpha=value).to_json() for expert, value in pairs]
        return copied


AutoConfig.register(ProxyTuneConfig.model_type, ProxyTuneConfig, exist_ok=True)


# -- helpers --------------------------------------------------------------------------------------------------
def _renamed_tokens(value: Any) -> dict[str, list[str]] | None:
    """Names of tokens by id, as JSON has them."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RecipeError(f"`renamed_tokens` must be an object of ids and the names of their tokens, not {value!r}")
    for index, names in value.items():
        named = isinstance(names, (list, tuple)) and len(names) > 1 and all(isinstance(name, str) for name in names)
        if not (str(index).isdecimal() and named):
            raise RecipeError(f"`renamed_tokens` must list two or more names for an id, not {index!r}: {names!r}")
    return {str(index): list(names) for index, names in value.items()}


def _examples(value: Any) -> list[str] | None:
    """Prompts to try, as JSON has them."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"`examples` must be a list of prompts, not {value!r}")
    return [_shown_text(prompt, f"`examples`[{index}]") for index, prompt in enumerate(value)]


def _shown_text(value: Any, what: str) -> str:
    """Check a text that is printed unchanged: an unknown recipe must not control the terminal."""
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{what} must be a text that is not empty, not {value!r}")
    if any(unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t" for each in value):
        raise RecipeError(f"{what} has a control character: {value!r}; remove it")
    return value


def _config_at_hand(base: Member, recipe: str) -> PreTrainedConfig | None:
    """The base's own config if it can be read without the network and without its code, or None."""
    if isinstance(base, ApiBase) or base.model is None or base.gguf_file is not None or base.model.endswith(".gguf"):
        return None
    try:
        source = resolve(base.model, recipe, base.revision)
        place = {"revision": source.revision, "subfolder": source.subfolder}
        found = AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True, **place)
    except (OSError, ValueError):  # RecipeError too: errors of the base are reported when it is loaded
        return None
    found.name_or_path = ""  # the recipe must not contain paths of this machine
    return found  # type: ignore[no-any-return]


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    model_type = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError:  # a base whose config is remote code: keep what it says, without running it
        return PreTrainedConfig(**values)
