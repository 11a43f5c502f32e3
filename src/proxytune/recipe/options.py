"""The options of making a recipe and of loading one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxytune.errors import ProxyTuneError, RecipeError
from proxytune.options import option
from proxytune.recipe.presets import PRESETS
from proxytune.recipe.source import resolve

__all__ = ["DTYPES", "TRUST", "ComposeOptions", "LoadingOptions", "MemberChoice", "device_map"]

TRUST = "Run code that the members bring along."
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


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
        "Dtype of members whose entry in the recipe sets none; the checkpoint's by default.",
        metavar="float32|float16|bfloat16|auto",
        panel="Loading",
    )
    device_map: str | int | None = option(
        None,
        "Where members go whose entry sets none: auto, cpu, cuda:1.",
        metavar="auto|DEVICE",
        panel="Loading",
        parse=device_map,
    )
    trust_remote_code: bool = option(False, TRUST, panel="Loading")
    speculate: str | bool | int = option(
        "auto",
        "Let an expert draft N tokens ahead, which the base then verifies at once: where it pays, never, or always. "
        "Answers stay the same, sampled ones too.",
        metavar="auto|off|N",
        panel="Speed",
        parse=_drafts,
    )
    pack: bool = option(
        False,
        "Lay the weights out for the CPU first: several times faster there, for float32 and bfloat16.",
        panel="Speed",
    )

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ProxyTuneError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def of_model(self) -> dict[str, Any]:
        """As :meth:`proxytune.ProxyTunedForCausalLM.from_pretrained` takes them."""
        return {
            "dtype": self.dtype,
            "device_map": self.device_map,
            "member_trust_remote_code": self.trust_remote_code,
            "speculate": self.speculate,
            "pack": self.pack,
        }


@dataclass(frozen=True)
class MemberChoice:
    """What is said of one member."""

    model: str | None = option(None, flag="", metavar="MODEL", panel="Members")
    revision: str | None = option(None, "The MEMBER's branch, tag or commit.", metavar="REVISION", panel="Members")
    prompt: str | None = option(
        None, "What the MEMBER is shown; TEXT holds {prompt}.", metavar="raw|chat|TEXT", panel="Prompts"
    )
    dtype: str | None = option(None, "The MEMBER's: float32, bfloat16 …", metavar="DTYPE", panel="Loading")
    device_map: str | int | None = option(
        None, "Where the MEMBER goes: auto, cuda:1.", metavar="DEVICE", panel="Loading", parse=device_map
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
    alpha: float | None = option(None, "Strength; 1 by default.", flag="--alpha -a", metavar="NUMBER", panel="Mixing")
    name: str | None = option(None, "The expert's name; `expert` by default.", metavar="NAME", panel="Mixing")
    base: MemberChoice = option(MemberChoice(), "The model that is steered.")
    expert: MemberChoice = option(MemberChoice(), "The model it is steered towards.")
    anti_expert: MemberChoice = option(MemberChoice(), "What the expert was before it was tuned.")
    add_expert: tuple[str, ...] = option(
        (),
        "One more expert; fields: anti, alpha, adapter, and prompt, dtype, revision (anti-… for the anti-expert). With "
        "no EXPERT the adapter is on the anti-expert. Repeatable.",
        metavar="NAME=EXPERT[,FIELD=VALUE…]",
        panel="Members",
        many=True,
        parse=tuple,
    )
    expert_adapter: str | None = option(
        None, "LoRA adapter on the expert, or, without one, on the anti-expert.", metavar="PATH", panel="Members"
    )
    system: str | None = option(
        None, "System prompt of the members whose prompt is chat.", metavar="TEXT", panel="Prompts"
    )
    response_prefix: str | None = option(
        None,
        "Words that answers begin with, such as 'Answer:', moved behind the members' own prompts.",
        metavar="TEXT",
        panel="Prompts",
    )
    description: str | None = option(
        None, "What the recipe is for; shown by chat and check, and in the model card.", metavar="TEXT", panel="About"
    )
    examples: tuple[str, ...] = option(
        (),
        "A prompt to try it with, shown by chat and check. Repeatable.",
        flag="--example",
        metavar="TEXT",
        panel="About",
        many=True,
        parse=tuple,
    )
    plausibility: float | None = option(
        None, "Choose only tokens with p_base >= P * max p_base.", metavar="P", panel="Mixing"
    )
    renamed_tokens: str | None = option(
        None,
        "Ids whose token has another name in some member: what the message about vocabularies shows.",
        metavar="JSON",
        panel="Members",
    )

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise RecipeError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.preset is None and self.base.model is None:
            raise RecipeError("no base is given; name the model to be steered with --base, or use --preset")
        for choice in (self.base, self.expert, self.anti_expert):
            if choice.model is not None:
                resolve(choice.model, None)
