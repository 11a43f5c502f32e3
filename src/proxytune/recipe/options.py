"""The options of making a recipe and of loading one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from proxytune.errors import ProxyTuneError, RecipeError
from proxytune.options import option
from proxytune.recipe.gates import FORMS, gate_text
from proxytune.recipe.presets import PRESETS
from proxytune.recipe.rules import RULES, rule_of
from proxytune.recipe.source import resolve

__all__ = ["DTYPES", "TRUST", "WAYS", "ComposeOptions", "LoadingOptions", "MemberChoice", "Way", "device_map"]

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
class LoadingOptions:
    """How a recipe's members are loaded, and whether they draft."""

    dtype: str | None = option(
        None,
        "Dtype of members that set none in the recipe; by default that of their checkpoint.",
        metavar="float32|float16|bfloat16|auto",
        panel="Loading",
    )
    device_map: str | int | None = option(
        None,
        "Device of members that set none in the recipe: auto, cpu, cuda:1.",
        metavar="auto|DEVICE",
        panel="Loading",
        parse=device_map,
    )
    trust_remote_code: bool = option(False, TRUST, panel="Loading")
    speculate: str | bool | int = option(
        "auto",
        "Drafting: an expert proposes N tokens, and the base verifies them in one pass. auto drafts where it pays, "
        "off never drafts. Answers stay the same, sampled ones too.",
        metavar="auto|off|N",
        panel="Speed",
        parse=_drafts,
    )
    way: str | None = option(
        None,
        "How to ask a base behind an API: verify (score drafts in one request), push (its server chooses), ask (again "
        "if a choice is open), pull (only the top tokens), or auto: verify if its server can score drafts, else ask.",
        metavar="auto|verify|push|ask|pull",
        panel="Base behind an API",
    )
    max_calls: int | None = option(
        None, "Maximum number of requests; stop before exceeding it.", metavar="N", min=1, panel="Base behind an API"
    )
    max_tokens: int | None = option(
        None,
        "Maximum number of tokens in prompts and answers; stop before exceeding it.",
        metavar="N",
        min=1,
        panel="Base behind an API",
    )
    sample_named: bool = option(
        False,
        "Sample from the tokens that the base's server names alone. Each token then has a bound on how far that is "
        "from the steered distribution.",
        panel="Base behind an API",
    )
    pack: bool = option(
        False,
        "Rearrange the weights for the CPU when loading: several times faster there, for float32 and bfloat16.",
        panel="Speed",
    )

    def __post_init__(self) -> None:
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

    model: str | None = option(None, flag="", metavar="MODEL", panel="Members")
    revision: str | None = option(None, "Branch, tag or commit of the MEMBER.", metavar="REVISION", panel="Members")
    prompt: str | None = option(
        None,
        "What the MEMBER reads: the raw prompt, its chat template, or TEXT with {prompt} in it.",
        metavar="raw|chat|TEXT",
        panel="Prompts",
    )
    dtype: str | None = option(None, "Dtype of the MEMBER: float32, bfloat16 …", metavar="DTYPE", panel="Loading")
    device_map: str | int | None = option(
        None, "Device of the MEMBER: auto, cuda:1.", metavar="DEVICE", panel="Loading", parse=device_map
    )


@dataclass(frozen=True)
class ComposeOptions:
    """What a recipe is made of."""

    preset: str | None = option(
        None,
        f"A trio to start from, whose parts other options replace (none was run by us): {', '.join(PRESETS)}.",
        metavar="NAME",
        panel="Members",
    )
    alpha: float | None = option(
        None, "Strength of steering; 1 by default.", flag="--alpha -a", metavar="NUMBER", panel="Mixing"
    )
    name: str | None = option(None, "Name of the expert; `expert` by default.", metavar="NAME", panel="Mixing")
    base: MemberChoice = option(MemberChoice(), "The large model to steer.")
    api: str | None = option(
        None,
        "A base that a server runs: the URL of its OpenAI-compatible API, up to /v1. In place of --base.",
        flag="--base-api",
        metavar="URL",
        panel="Base behind an API",
    )
    api_model: str | None = option(
        None, "Name of the base at that server.", flag="--base-model", metavar="NAME", panel="Base behind an API"
    )
    api_tokenizer: str | None = option(
        None,
        "Tokenizer of the server's model: a hub id or a directory.",
        flag="--base-tokenizer",
        metavar="MODEL",
        panel="Base behind an API",
    )
    api_key: str | None = option(
        None,
        "NAME of the environment variable that holds the API key. The key itself is never written.",
        flag="--base-key",
        metavar="NAME",
        panel="Base behind an API",
    )
    api_top_logprobs: int | None = option(
        None,
        "Most probable tokens that each request asks for; 20 by default.",
        flag="--base-top-logprobs",
        metavar="N",
        min=1,
        panel="Base behind an API",
    )
    api_server: str | None = option(
        None,
        "Program that answers; by default this is found out by trying.",
        flag="--base-server",
        metavar="auto|openai|vllm|llama.cpp",
        panel="Base behind an API",
    )
    expert: MemberChoice = option(MemberChoice(), "The small model after finetuning: steer towards it.")
    anti_expert: MemberChoice = option(MemberChoice(), "The small model before finetuning: steer away from it.")
    small: str | None = option(
        None,
        "An expert without training: this model is both expert and anti-expert, and only the expert reads what "
        "--expert-system, --expert-prompt or --expert-examples say.",
        metavar="MODEL",
        panel="Members",
    )
    expert_system: str | None = option(
        None, "System prompt of the expert alone, whose prompt is then chat.", metavar="TEXT", panel="Prompts"
    )
    expert_examples: Path | None = option(
        None,
        'Solved examples that the expert alone reads before the prompt: JSON lines {"prompt": ..., "completion": ...}.',
        metavar="FILE",
        panel="Prompts",
    )
    negative_prompt: str | None = option(
        None,
        "Steer the base away from what it would write after this text, which may contain {prompt} "
        "(classifier-free guidance).",
        metavar="TEXT",
        panel="Prompts",
    )
    guidance: float | None = option(
        None,
        "How strongly: logits = negative + G * (base - negative); 1 is the base, 1.5 the default. Alone: each call "
        "gives its negative prompt.",
        metavar="G",
        panel="Mixing",
    )
    add_expert: tuple[str, ...] = option(
        (),
        "Add one more expert. Fields: anti, alpha, adapter, and prompt, dtype, revision (anti-… for the anti-expert)."
        " Without EXPERT the adapter is on the anti-expert. Repeatable.",
        metavar="NAME=EXPERT[,FIELD=VALUE…]",
        panel="Members",
        many=True,
        parse=tuple,
    )
    expert_adapter: str | None = option(
        None, "LoRA adapter on the expert or, without one, on the anti-expert.", metavar="PATH", panel="Members"
    )
    system: str | None = option(
        None, "System prompt for the members whose prompt is chat.", metavar="TEXT", panel="Prompts"
    )
    response_prefix: str | None = option(
        None,
        "First words of every answer, such as 'Answer:'; they are moved to after the members' own prompts.",
        metavar="TEXT",
        panel="Prompts",
    )
    description: str | None = option(
        None, "What the recipe is for. chat, check and the model card show it.", metavar="TEXT", panel="About"
    )
    examples: tuple[str, ...] = option(
        (),
        "A prompt to try. chat and check show it. Repeatable.",
        flag="--example",
        metavar="TEXT",
        panel="About",
        many=True,
        parse=tuple,
    )
    combine: str | None = option(
        None,
        "Rule by which several experts are joined; sum by default.",
        metavar="|".join(RULES),
        panel="Mixing",
        parse=rule_of,
    )
    gate: str | None = option(
        None,
        "Where to steer: by the base's probabilities (unsure, entropy, kl, bet) or by the place in the answer (warmup, "
        "decay, cycle, between). Everywhere by default.",
        metavar=FORMS,
        panel="Mixing",
        parse=gate_text,
    )
    plausibility: float | None = option(
        None, "Choose only tokens with p_base >= P * max p_base.", metavar="P", panel="Mixing"
    )
    renamed_tokens: str | None = option(
        None,
        "Ids whose token has another name in some member, as the message about vocabularies shows them.",
        metavar="JSON",
        panel="Members",
    )

    def __post_init__(self) -> None:
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
