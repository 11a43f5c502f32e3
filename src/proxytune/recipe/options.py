"""The options of loading a recipe: what holds for members whose entry in it sets none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxytune.errors import ProxyTuneError
from proxytune.options import option

__all__ = ["DTYPES", "LoadingOptions", "device_map"]

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
    trust_remote_code: bool = option(False, "Run code that the members bring along.", panel="Loading")
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
