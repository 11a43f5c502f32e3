"""The options of making a recipe and of loading one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import ProxyTuneError, RecipeError
from proxytune.options import Options, option
from proxytune.recipe.gates import FORMS, gate_text
from proxytune.recipe.presets import PRESETS
from proxytune.recipe.rules import RULES, rule_of
from proxytune.recipe.source import resolve

__all__ = ["DTYPES", "TRUST", "WAYS", "ComposeOptions", "LoadingOptions", "MemberChoice", "Way", "device_map"]

# The headings of the options in the help.
_loading, _speed, _api, _members, _prompts, _mixing, _about = (
    partial(option, panel=panel)
    for panel in ("Loading", "Speed", "Base behind an API", "Members", "Prompts", "Mixing", "About")
)

TRUST = "Run code that comes with the members."
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
Way = Literal["verify", "push", "ask", "pull"]  # to ask a base behind an API
WAYS: tuple[Way, ...] = get_args(Way)


def device_map(text: str) -> str | int:
    """``auto``, ``cpu``, ``cuda:1``, or a number of a device."""
    return int(text) if text.isdigit() else text


def _drafts(text: str) -> str | bool | int:
    """What ``--speculate`` says, as ``generate`` takes it."""
    if text not in ("auto", "off") and not text.isdecimal():
        raise ProxyTuneError(f"--speculate {text!r} is not auto, off or a number of drafts")
    return int(text) if text.isdecimal() else (text if text == "auto" else False)


@dataclass(frozen=True)
class LoadingOptions(Options):
    """How a recipe's members are loaded, and whether they draft."""

    dtype: str | None = _loading(
        None,
        "Dtype of members that set none in the recipe; by default that of their checkpoint.",
        metavar="float32|float16|bfloat16|auto",
    )
    device_map: str | int | None = _loading(
        None,
        "Device of members that set none in the recipe: auto, cpu, cuda:1.",
        metavar="auto|DEVICE",
        parse=device_map,
    )
    trust_remote_code: bool = _loading(False, TRUST)
    speculate: str | bool | int = _speed(
        "auto",
        "Drafting: an expert proposes N tokens, and the base verifies them in one pass. auto drafts where it pays, "
        "off never drafts. Answers stay the same, sampled ones too.",
        metavar="auto|off|N",
        parse=_drafts,
    )
    way: str | None = _api(
        None,
        "How to ask a base behind an API: verify (score drafts in one request), push (its server chooses), ask (again "
        "if a choice is open), pull (only the top tokens), or auto: verify if its server can score drafts, else ask.",
        metavar="auto|verify|push|ask|pull",
    )
    max_calls: int | None = _api(None, "Maximum number of requests; stop before exceeding it.", metavar="N", min=1)
    max_tokens: int | None = _api(
        None, "Maximum number of tokens in prompts and answers; stop before exceeding it.", metavar="N", min=1
    )
    sample_named: bool = _api(
        False,
        "Sample from the tokens that the base's server names alone. Each token then has a bound on how far that is "
        "from the steered distribution.",
    )
    pack: bool = _speed(
        False, "Rearrange the weights for the CPU when loading: several times faster there, for float32 and bfloat16."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ProxyTuneError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.way not in (None, "auto", *WAYS):
            raise ProxyTuneError(f"there is no way {self.way!r}; there are auto, {', '.join(WAYS)}")

    def of_model(self) -> dict[str, Any]:
        """As :meth:`proxytune.ProxyTunedForCausalLM.from_pretrained` takes them."""
        asked = dict(vars(self))
        asked["member_trust_remote_code"] = asked.pop("trust_remote_code")  # the plain name is for the recipe itself
        return asked


@dataclass(frozen=True)
class MemberChoice:
    """What is said of one member."""

    model: str | None = _members(None, flag="", metavar="MODEL")
    revision: str | None = _members(None, "Branch, tag or commit of the MEMBER.", metavar="REVISION")
    prompt: str | None = _prompts(
        None,
        "What the MEMBER reads: the raw prompt, its chat template, or TEXT with {prompt} in it.",
        metavar="raw|chat|TEXT",
    )
    dtype: str | None = _loading(None, "Dtype of the MEMBER: float32, bfloat16 …", metavar="DTYPE")
    device_map: str | int | None = _loading(
        None, "Device of the MEMBER: auto, cuda:1.", metavar="DEVICE", parse=device_map
    )


@dataclass(frozen=True)
class ComposeOptions(Options):
    """What a recipe is made of."""

    preset: str | None = _members(
        None,
        f"A trio to start from, whose parts other options replace (none was run by us): {', '.join(PRESETS)}.",
        metavar="NAME",
    )
    alpha: float | None = _mixing(None, "Strength of steering; 1 by default.", flag="--alpha -a", metavar="NUMBER")
    name: str | None = _mixing(None, "Name of the expert; `expert` by default.", metavar="NAME")
    base: MemberChoice = option(MemberChoice(), "The large model to steer.")
    api: str | None = _api(
        None,
        "A base that a server runs: the URL of its OpenAI-compatible API, up to /v1. In place of --base.",
        flag="--base-api",
        metavar="URL",
    )
    api_model: str | None = _api(None, "Name of the base at that server.", flag="--base-model", metavar="NAME")
    api_tokenizer: str | None = _api(
        None, "Tokenizer of the server's model: a hub id or a directory.", flag="--base-tokenizer", metavar="MODEL"
    )
    api_key: str | None = _api(
        None,
        "NAME of the environment variable that holds the API key. The key itself is never written.",
        flag="--base-key",
        metavar="NAME",
    )
    api_top_logprobs: int | None = _api(
        None,
        "Most probable tokens that each request asks for; 20 by default.",
        flag="--base-top-logprobs",
        metavar="N",
        min=1,
    )
    api_server: str | None = _api(
        None,
        "Program that answers; by default this is found out by trying.",
        flag="--base-server",
        metavar="auto|openai|vllm|llama.cpp",
    )
    expert: MemberChoice = option(MemberChoice(), "The small model after finetuning: steer towards it.")
    anti_expert: MemberChoice = option(MemberChoice(), "The small model before finetuning: steer away from it.")
    small: str | None = _members(
        None,
        "An expert without training: this model is both expert and anti-expert, and only the expert reads what "
        "--expert-system, --expert-prompt or --expert-examples say.",
        metavar="MODEL",
    )
    expert_system: str | None = _prompts(
        None, "System prompt of the expert alone, whose prompt is then chat.", metavar="TEXT"
    )
    expert_examples: Path | None = _prompts(
        None,
        'Solved examples that the expert alone reads before the prompt: JSON lines {"prompt": ..., "completion": ...}.',
        metavar="FILE",
    )
    negative_prompt: str | None = _prompts(
        None,
        "Steer the base away from what it would write after this text, which may contain {prompt} "
        "(classifier-free guidance).",
        metavar="TEXT",
    )
    guidance: float | None = _mixing(
        None,
        "How strongly: logits = negative + G * (base - negative); 1 is the base, 1.5 the default. Alone: each call "
        "gives its negative prompt.",
        metavar="G",
    )
    add_expert: tuple[str, ...] = _members(
        (),
        "Add one more expert. Fields: anti, alpha, adapter, and prompt, dtype, revision (anti-… for the anti-expert)."
        " Without EXPERT the adapter is on the anti-expert. Repeatable.",
        metavar="NAME=EXPERT[,FIELD=VALUE…]",
        many=True,
        parse=tuple,
    )
    expert_adapter: str | None = _members(
        None, "LoRA adapter on the expert or, without one, on the anti-expert.", metavar="PATH"
    )
    system: str | None = _prompts(
        None, "System prompt for the members whose prompt is chat; --expert-system replaces it.", metavar="TEXT"
    )
    response_prefix: str | None = _prompts(
        None,
        "First words of every answer, such as 'Answer:'; they are moved to after the members' own prompts.",
        metavar="TEXT",
    )
    description: str | None = _about(
        None, "What the recipe is for. chat, check and the model card show it.", metavar="TEXT"
    )
    examples: tuple[str, ...] = _about(
        (),
        "A prompt to try. chat and check show it. Repeatable.",
        flag="--example",
        metavar="TEXT",
        many=True,
        parse=tuple,
    )
    combine: str | None = _mixing(
        None, "Rule by which several experts are joined; sum by default.", metavar="|".join(RULES), parse=rule_of
    )
    gate: str | None = _mixing(
        None,
        "Where to steer: by the base's probabilities (unsure, entropy, kl, bet) or by the place in the answer (warmup, "
        "decay, cycle, between). Everywhere by default.",
        metavar=FORMS,
        parse=gate_text,
    )
    plausibility: float | None = _mixing(None, "Choose only tokens with p_base >= P * max p_base.", metavar="P")
    renamed_tokens: str | None = _members(
        None,
        "Ids whose token has another name in some member, as the message about vocabularies shows them.",
        metavar="JSON",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None and self.preset not in PRESETS:
            raise RecipeError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        self._check_api()
        if self.preset is None and self.base.model is None and self.api is None:
            raise RecipeError("no base is given; name the model to steer with --base, or use --preset")
        if self.small is not None:
            given = {"--expert": self.expert.model, "--anti-expert": self.anti_expert.model}
            given |= {"--expert-adapter": self.expert_adapter, "--preset": self.preset}
            if other := next((name for name, value in given.items() if value is not None), None):
                raise RecipeError(f"--small is both expert and anti-expert; leave {other} out")
            if self.expert_system is None and self.expert_examples is None and self.expert.prompt is None:
                raise RecipeError(
                    "--small makes expert and anti-expert of one model, so the expert needs a prompt of its own; add "
                    "--expert-system, --expert-prompt or --expert-examples"
                )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise RecipeError(f"--guidance must be a finite number, not {self.guidance}")
        for model in (self.base.model, self.expert.model, self.anti_expert.model, self.small, self.api_tokenizer):
            if model is not None:
                resolve(model, None)

    def _check_api(self) -> None:
        """A base behind an API is named whole, and nothing else is said of a base."""
        of_api = {f.metadata["flag"]: getattr(self, f.name) for f in fields(self) if f.name.startswith("api")}
        if self.api is None:
            if given := next((flag for flag, value in of_api.items() if value is not None), None):
                raise RecipeError(f"{given} is for a base behind an API; give its URL with --base-api")
            return
        for flag in ("--base-model", "--base-tokenizer"):
            if of_api[flag] is None:
                raise RecipeError(f"a base behind an API needs {flag} too")
        if self.base != MemberChoice():
            raise RecipeError("--base-api says where the base runs; leave --base and its dtype, device and prompt out")
        if self.negative_prompt is not None or self.guidance is not None:
            raise RecipeError("a negative prompt needs a base on this machine; leave --base-api out")
