"""The parts of a recipe: members, what each one reads, and experts; frozen, validated, and read from JSON.

Nothing here imports torch or transformers, so that a command can refuse a recipe or an alpha without delay.
"""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from proxytune.errors import RecipeError
from proxytune.recipe.alpha import finite_alpha
from proxytune.recipe.options import DTYPES

__all__ = [
    "RECIPE_FIELDS",
    "ApiBase",
    "Expert",
    "Member",
    "Prompt",
    "parse_base",
    "parse_experts",
    "refuse_negative",
    "unknown_field",
]

SERVERS = ("auto", "openai", "vllm", "llama.cpp")
API_FIELDS = ("api", "model", "tokenizer", "top_logprobs", "key", "server")
PROMPT_KINDS = ("raw", "chat", "template", "negative")
RECIPE_FIELDS = ("base", "experts", "combine", "gate", "plausibility", "renamed_tokens", "description", "examples")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def refuse_negative(text: Any) -> None:
    """Raise :class:`RecipeError` unless ``text`` is a negative prompt: a text that contains ``{prompt}`` at most
    once."""
    if not isinstance(text, str):
        raise RecipeError(f"a negative prompt must be a text, not {text!r}")
    if not text.strip():
        raise RecipeError("the negative prompt is empty; give a text, or leave it out")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError("the negative prompt has half of a surrogate pair, which no text has; leave it out")
    if text.count("{prompt}") > 1:
        raise RecipeError("a negative prompt may contain {prompt} once")


def _refuse_types(part: Prompt | Member, what: str, kinds: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(getattr(part, name), kinds):
            raise RecipeError(f"`{name}` of {what} cannot be {getattr(part, name)!r}")


@dataclass(frozen=True)
class Prompt:
    """What one member reads in place of the raw prompt. All members share the continuation.

    - ``raw``: the ids that the caller gave, unchanged.
    - ``chat``: the member's own chat template, with ``system`` as the system prompt and the prompt as the user's turn.
      ``user_prefix`` is put before the prompt (the paper's chat models read ``Complete the following:`` before a
      ToxiGen prompt).
    - ``template``: any text with one ``{prompt}`` in it.
    - ``negative``: a negative prompt for classifier-free guidance (2306.17806). The member reads the text of
      ``template``, which may contain ``{prompt}``. A call can replace it. Without a template and without one from the
      call, the member reads the raw prompt.

    ``examples`` are pairs of a prompt and its answer. They are put before the prompt: as turns of the conversation if
    the kind is ``chat``, otherwise as plain text, with a blank line after each.

    ``response_prefix`` is put where the answer begins. If the raw prompt ends with it, it is moved there (the paper
    moves ``Answer:`` to after ``[/INST]``). So all members continue from the same words.

    Example:
        >>> from proxytune import Prompt
        >>> Prompt("chat", system="Answer briefly.", response_prefix="Answer:").to_json()
        {'kind': 'chat', 'system': 'Answer briefly.', 'response_prefix': 'Answer:'}
        >>> Prompt.parse("Complete: {prompt}").kind
        'template'
    """

    kind: Literal["raw", "chat", "template", "negative"] = "raw"
    system: str | None = None
    response_prefix: str = ""
    template: str | None = None
    user_prefix: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in PROMPT_KINDS:
            kinds = ", ".join(PROMPT_KINDS)
            raise RecipeError(f"prompt kind {self.kind!r} is not one of {kinds}, and as a template it lacks {{prompt}}")
        _refuse_types(self, "a prompt", str, ("response_prefix", "user_prefix"))
        _refuse_types(self, "a prompt", (str, type(None)), ("system", "template"))
        if self.kind == "negative":
            if self.template is not None:
                refuse_negative(self.template)
            if self.response_prefix or self.examples:
                raise RecipeError(
                    "a negative prompt has no `response_prefix` and no `examples`; write them into its text"
                )
        elif (self.template is not None) != (self.kind == "template"):
            raise RecipeError("a prompt has a `template` if and only if its kind is `template` or `negative`")
        elif self.template is not None and self.template.count("{prompt}") != 1:
            raise RecipeError(f"the prompt template {self.template!r} must contain {{prompt}} exactly once")
        if self.system is not None and self.kind != "chat":
            raise RecipeError("a `system` prompt needs the prompt kind `chat`")
        if self.user_prefix and self.kind != "chat":
            raise RecipeError("a `user_prefix` needs the prompt kind `chat`")
        if self.response_prefix and self.kind == "raw":
            raise RecipeError("a `response_prefix` needs the prompt kind `chat` or `template`")
        if self.examples and self.kind == "raw":
            raise RecipeError("`examples` need the prompt kind `chat` or `template`")
        pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in self.examples]
        if not all(isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_text, pair)) for pair in pairs):
            raise RecipeError("`examples` of a prompt are pairs of two texts: a prompt and its answer")
        object.__setattr__(self, "examples", tuple(pairs))  # JSON gives lists, which cannot be hashed

    @property
    def in_words(self) -> str:
        """The prompt in words; long texts are cut."""
        parts = {f"{self.kind} prompt": self.template, "system": self.system, "questions begin with": self.user_prefix}
        parts["answers begin with"] = self.response_prefix
        said = [f"{name} {textwrap.shorten(text, 60)!r}" for name, text in parts.items() if text]
        if self.template is None:
            said.insert(0, f"{self.kind} prompt")
        return ", ".join([*said, *([f"{len(self.examples)} examples"] if self.examples else [])])

    @property
    def needs_text(self) -> bool:
        """Whether making it needs the text of the raw prompt, and not only its ids."""
        return self.kind in ("chat", "template") or (self.template is not None and "{prompt}" in self.template)

    @classmethod
    def parse(cls, value: Prompt | str | Mapping[str, Any] | None) -> Prompt:
        """Read ``"raw"``, ``"chat"``, a template string with ``{prompt}``, or an object of the fields."""
        if isinstance(value, Prompt):
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls(kind="template", template=value) if "{prompt}" in value else cls(kind=value)  # type: ignore[arg-type]
        if not isinstance(value, Mapping):
            raise RecipeError(f"a prompt must be {', '.join(PROMPT_KINDS)}, or an object of its fields, not {value!r}")
        return cls(**_known_fields(cls, value, "a prompt"))

    def to_json(self) -> str | dict[str, Any]:
        value = _to_json(self)
        return self.kind if set(value) == {"kind"} else value


@dataclass(frozen=True)
class Member:
    """One model of the recipe.

    ``model`` is a hub id, a local directory, or a ``.gguf`` file. ``None`` means a model in memory that is not on disk
    yet. ``adapter`` is the directory or hub id of a LoRA adapter (PEFT) on top of it.

    Example:
        >>> from proxytune import Member
        >>> Member("meta-llama/Llama-2-13b-hf", dtype="bfloat16", device_map="auto").to_json()
        {'model': 'meta-llama/Llama-2-13b-hf', 'dtype': 'bfloat16', 'device_map': 'auto'}
    """

    model: str | None
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | int | None = None
    quantization_config: dict[str, Any] | None = None
    prompt: Prompt = Prompt()

    def __post_init__(self) -> None:
        if self.model is not None and not (isinstance(self.model, str) and self.model.strip()):
            raise RecipeError(f"a member's `model` must be a hub id or a path, not {self.model!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RecipeError(f"dtype {self.dtype!r} of member {self.model!r} is not one of {', '.join(DTYPES)}")
        what = f"member {self.model!r}"
        _refuse_types(self, what, (str, type(None)), ("revision", "gguf_file", "adapter", "adapter_revision"))
        _refuse_types(self, what, (str, int, Mapping, type(None)), ("device_map",))
        _refuse_types(self, what, (Mapping, type(None)), ("quantization_config",))

    @classmethod
    def parse(cls, value: Member | str | Mapping[str, Any]) -> Member:
        """Read a hub id or path, or an object of the fields."""
        if isinstance(value, Member):
            return value
        if isinstance(value, (str, os.PathLike)):
            return cls(model=os.fspath(value))
        if isinstance(value, Mapping) and "api" in value:
            raise RecipeError("only the base may run behind an API; an expert needs a model on this machine")
        if not isinstance(value, Mapping) or "model" not in value:
            raise RecipeError(f"a member must be a string or an object with `model`, not {value!r}")
        known = _known_fields(cls, value, f"member {value['model']!r}")
        return cls(**{**known, "prompt": Prompt.parse(known.get("prompt"))})

    def to_json(self) -> dict[str, Any]:
        return _to_json(self)


@dataclass(frozen=True)
class ApiBase(Member):
    """A base that runs on a server, which is asked over its API. It reads the raw prompt.

    ``model`` is its name at the server. The server speaks OpenAI's completions route.

    Attributes:
        api: the URL, including ``/v1``.
        tokenizer: a hub id or a directory: the tokenizer of the server's model.
        top_logprobs: how many of the most probable tokens each request asks for.
        key: the *name* of the environment variable that holds the API key; None: no key is sent.
        server: the server's program, for fields that only it knows; ``auto`` finds out by trying.

    Example:
        >>> from proxytune.recipe.parts import ApiBase
        >>> base = ApiBase("big", api="https://host/v1", tokenizer="owner/big", key="BIG_KEY")
        >>> base.to_json()
        {'model': 'big', 'api': 'https://host/v1', 'tokenizer': 'owner/big', 'key': 'BIG_KEY'}
    """

    api: str = ""
    tokenizer: str = ""
    top_logprobs: int = 20
    key: str | None = None
    server: str = "auto"

    def __post_init__(self) -> None:
        for name in ("api", "model", "tokenizer"):
            if not _is_text(getattr(self, name)):
                raise RecipeError(f"a base behind an API needs `{name}`, a text, not {getattr(self, name)!r}")
        try:
            url = urlsplit(self.api)
        except ValueError as error:
            raise RecipeError("`api` of the base is no URL") from error
        if url.username or url.password or url.query or url.fragment:
            raise RecipeError(
                "`api` of the base must be a plain URL without user, password or query; put the key into an "
                "environment variable and name that as `key`"
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise RecipeError(f"`api` of the base must begin with http:// or https://, not {self.api!r}")
        n = self.top_logprobs
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise RecipeError(f"`top_logprobs` of the base must be a whole number of at least 1, not {n!r}")
        if self.key is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", str(self.key)):  # keys have small letters
            raise RecipeError(
                "`key` of the base must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "never the key itself"
            )
        if self.server not in SERVERS:
            raise RecipeError(f"`server` of the base is one of {', '.join(SERVERS)}, not {self.server!r}")

    @classmethod
    def parse(cls, value: Any) -> ApiBase:
        """Read an object of the fields."""
        if isinstance(value, ApiBase):
            return value
        for key in value:
            if key not in API_FIELDS:
                raise RecipeError(
                    f"a base behind an API has an unknown field {key!r}; known are {', '.join(API_FIELDS)}"
                )
        if "model" not in value:
            raise RecipeError("a base behind an API needs `model`, its name at the server")
        return cls(**value)


def parse_base(value: Any) -> Member:
    """The ``base`` of a recipe: a :class:`Member`, or an :class:`ApiBase` if it has an ``api``."""
    return ApiBase.parse(value) if isinstance(value, Mapping) and "api" in value else Member.parse(value)


@dataclass(frozen=True)
class Expert:
    """One steering term, ``alpha * (expert - anti_expert)`` (2401.08565, eq. 1; DExperts 2105.03023, eq. 2).

    Either side may be missing. Without an anti-expert the term is ``alpha * expert``. Without an expert it is
    ``-alpha * anti_expert`` (contrastive decoding). A negative alpha steers away from the expert.

    Example:
        >>> from proxytune import Expert, Member
        >>> chat = Expert("chat", Member("Llama-2-7b-chat-hf"), Member("Llama-2-7b-hf"), alpha=0.8)
        >>> chat.to_json()["anti_expert"]
        {'model': 'Llama-2-7b-hf'}
    """

    name: str
    expert: Member | None = None
    anti_expert: Member | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or any(c in self.name for c in " =,."):
            raise RecipeError(f"an expert's name must be a word without spaces, '=', ',' or '.', not {self.name!r}")
        if self.expert is None and self.anti_expert is None:
            raise RecipeError(f"expert {self.name!r} names neither an `expert` nor an `anti_expert`; give one")
        finite_alpha(self.alpha, f"alpha of expert {self.name!r}")

    @classmethod
    def parse(cls, value: Expert | Mapping[str, Any], index: int = 0) -> Expert:
        if isinstance(value, Expert):
            return value
        if not isinstance(value, Mapping):
            raise RecipeError(f"experts[{index}] must be an object with `expert` and/or `anti_expert`, not {value!r}")
        known = _known_fields(cls, value, f"experts[{index}]")
        for side in ("expert", "anti_expert"):
            if known.get(side) is not None:
                known[side] = Member.parse(known[side])
        known.setdefault("name", "expert" if index == 0 else f"expert{index + 1}")
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        return _to_json(self)


def parse_experts(value: Any) -> list[Expert]:
    """The ``experts`` of a recipe, in order.

    Raises:
        RecipeError: where it is not a list of at least one expert, or two have the same name.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise RecipeError("the recipe's `experts` must be a list of at least one expert")
    experts = [Expert.parse(each, index) for index, each in enumerate(value)]
    names = [expert.name for expert in experts]
    if len(set(names)) != len(names):
        raise RecipeError(f"two experts have the same name: {', '.join(names)}; names must differ")
    return experts


# -- helpers --------------------------------------------------------------------------------------------------
def _known_fields(cls: type, value: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = [f.name for f in fields(cls)]
    for key in value:
        if key not in known:
            raise RecipeError(unknown_field(what, key, known))
    return dict(value)


MEMBER_WORDS = (*(f.name for f in fields(Member)), "torch_dtype")


def unknown_field(what: str, key: Any, known: Sequence[str]) -> str:
    """Why a field has no place there, and where it belongs."""
    said = f"{what} has an unknown field {key!r}"
    for place, names in (
        ("the recipe's top level", RECIPE_FIELDS),
        ("an entry of `experts`", [f.name for f in fields(Expert)]),
        ("a member: `base`, or the `expert` or `anti_expert` of an entry of `experts`", MEMBER_WORDS),
        ("the `prompt` of a member", [f.name for f in fields(Prompt)]),
    ):
        if key in names:
            return f"{said}; it belongs to {place}"
    listed = f"known are {', '.join(known)}"
    if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.75):
        return f"{said}; did you mean {near[0]!r}? {listed}"
    from transformers import GenerationConfig  # takes seconds, so last

    if key in vars(GenerationConfig()):
        return f"{said}; it belongs to the recipe's generation_config.json"
    return f"{said}; {listed}"


def _to_json(part: Prompt | Member | Expert) -> dict[str, Any]:
    """The fields that are not at their defaults, and those that are always said."""
    said = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name in ("kind", "alpha") or value != f.default:
            said[f.name] = value.to_json() if isinstance(value, (Prompt, Member)) else value
    if isinstance(part, Prompt) and part.examples:
        said["examples"] = [list(pair) for pair in part.examples]
    return said
