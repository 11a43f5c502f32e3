"""The options of benches and plans: what is measured, and what is predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from proxytune.decoding.pace import Speculate, parse_speculate
from proxytune.errors import ProxyTuneError
from proxytune.options import Options, numbers, option, words
from proxytune.recipe.options import DTYPES

__all__ = ["ARMS", "MAIN", "BenchOptions", "Case", "MemberOptions", "PlanOptions", "RequestOptions"]

# The options under one heading of the help.
_api = partial(option, panel="Base behind an API")

ARMS = ("base", "base_lookup", "plain_loop", "composite", "shared", "speculative", "traced")
MAIN = ("64/128", 1)  # the case that always has its repeats
BATCHES: dict[str, Any] = {
    "help": "Batch sizes.",
    "flag": "--batch-size -b",
    "metavar": "N,...",
    "parse": numbers("--batch-size", "1,16"),
}


@dataclass(frozen=True)
class Case:
    """``batch`` rows of ``prompt`` tokens, continued by ``output`` tokens."""

    batch: int
    prompt: int
    output: int

    @property
    def lengths(self) -> str:
        return f"{self.prompt}/{self.output}"

    def __str__(self) -> str:
        return f"{self.lengths} at batch {self.batch}"


@dataclass(frozen=True)
class MemberOptions:
    """Options of every member of an arm: a dtype (None: the recipe's), packed weights, compiled layers."""

    dtype: str | None = None
    pack: bool = False
    compile: bool = False

    def __str__(self) -> str:
        return (self.dtype or "auto") + ("+pack" if self.pack else "") + ("+compile" if self.compile else "")

    @classmethod
    def parse(cls, text: str) -> MemberOptions:
        """Read ``float32+pack+compile``; ``auto`` is the recipe's own dtype."""
        given = text.strip().split("+")
        for word in given:
            if word not in (*DTYPES, "pack", "compile"):
                known = ", ".join((*DTYPES, "pack"))
                raise ProxyTuneError(f"no member option is called {word!r}; known are {known} and compile")
        dtypes = [word for word in given if word in DTYPES]
        if len(dtypes) > 1:
            raise ProxyTuneError(f"{text!r} names two dtypes")
        dtype = dtypes[0] if dtypes and dtypes[0] != "auto" else None
        return cls(dtype, pack="pack" in given, compile="compile" in given)


def _member_options(text: str) -> tuple[MemberOptions, ...]:
    found = tuple(MemberOptions.parse(part) for part in words(text))
    if len(set(found)) < len(found):
        raise ProxyTuneError(f"--options {text!r} names one set twice")
    return found


def _speculate(text: str) -> Speculate:
    return parse_speculate(int(text) if text.isdecimal() else text)


@dataclass(frozen=True)
class BenchOptions(Options):
    """Options of a bench. Every batch size with every pair of lengths is a case, and all arms run it."""

    batches: tuple[int, ...] = option((1, 4, 16), **BATCHES)
    lengths: tuple[str, ...] = option(
        ("64/128", "8/512", "512/8"), "Pairs of prompt tokens and new tokens.", metavar="PROMPT/OUTPUT,...", parse=words
    )
    arms: tuple[str, ...] = option(
        ARMS, "What to compare; ratios need base and plain_loop.", metavar="NAME,...", parse=words
    )
    members: tuple[MemberOptions, ...] = option(
        (MemberOptions(),),
        "Sets of member options. Each set is measured for every arm, the base alone too: a dtype (auto is the "
        "recipe's), pack, compile.",
        flag="--options",
        metavar="NAME+NAME,...",
        parse=_member_options,
    )
    speculate: Any = option(
        "auto",
        "Drafting in the arms speculative and traced: auto, or always N tokens, with no copies from the text.",
        metavar="auto|N",
        parse=_speculate,
    )
    temperature: float | None = option(None, "Sample in all arms, with seeds; greedy by default.", metavar="T")
    repeats: int = option(5, "Number of rounds. The table shows their median.", metavar="N", min=1)
    minutes: float = option(
        18,
        "Time limit. Cases that do not fit get fewer rounds or none, and a note says so; 64/128 at batch 1 always "
        "gets all. 0 is no limit.",
        metavar="M",
        min=0,
    )
    prompts: Path | None = option(
        None, "Text to cut the prompts from; by default the demo's held-out problems.", metavar="FILE"
    )
    seed: int = option(0, "Seed for the prompts and for the order within a round.", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm in self.arms:
            if arm not in ARMS:
                raise ProxyTuneError(f"no arm is called {arm!r}; known are {', '.join(ARMS)}")
        for name in ("arms", "batches", "lengths"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ProxyTuneError(f"the {name} must be named, each once, not {', '.join(map(str, given)) or 'none'}")
        if any(batch < 1 for batch in self.batches):
            raise ProxyTuneError(f"a batch has at least 1 row, not {min(self.batches)}")
        if self.temperature is not None and not self.temperature > 0:
            raise ProxyTuneError(f"a temperature is greater than 0, not {self.temperature}; leave it out for greedy")
        if self.prompts is not None:
            self.prompts.open("rb").close()  # find out now, not after loading the models, that it is missing
        self.cases()

    @property
    def budget(self) -> float | None:
        """Seconds for all of it; None is no limit."""
        return 60.0 * self.minutes or None

    def asked(self, arm: str) -> dict[str, Any]:
        """Further arguments of ``generate`` in a run of ``arm``."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        return {
            **({} if self.temperature is None else sampling),
            **({"speculate": self.speculate} if arm in ("speculative", "traced") else {}),
        }

    def cases(self) -> list[Case]:
        """Every batch size with every length pair; the main case first, then the cheap before the expensive."""
        found = []
        for text in self.lengths:
            prompt, slash, output = text.partition("/")
            if not (slash and prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
                raise ProxyTuneError(f"lengths are PROMPT/OUTPUT in tokens, such as 64/128, not {text!r}")
            found += [Case(batch, int(prompt), int(output)) for batch in self.batches]
        return sorted(
            found, key=lambda case: ((case.lengths, case.batch) != MAIN, case.batch, case.prompt, case.output)
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values; rows name their members' options."""
        said = {name: value for name, value in asdict(self).items() if name not in ("members", "minutes", "prompts")}
        return {**said, "budget": self.budget}


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan."""

    acceptances: tuple[float, ...] = option(
        (0.7,),
        "Shares of drafts that the mixture accepts.",
        flag="--acceptance",
        metavar="A,...",
        parse=numbers("--acceptance", "0.6,0.8", float),
    )
    batches: tuple[int, ...] = option((1, 4, 16), **BATCHES)
    members: MemberOptions = option(
        MemberOptions(),
        "Member options, as in bench: a dtype, pack.",
        flag="--options",
        metavar="NAME+NAME",
        parse=MemberOptions.parse,
    )
    device: str | None = option(
        None, "Device to predict for; by default a GPU if this machine has one.", metavar="cpu|cuda"
    )
    probe: bool = option(False, "Load the recipe and time it for about ten seconds.")
    against: Path | None = option(
        None, "With --probe: compare with the measurements that `bench --output FILE` wrote.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            given = ",".join(map(str, self.batches))
            raise ProxyTuneError(f"--batch-size is numbers of rows, at least 1 and each once, not {given!r}")
        if self.members.compile:
            raise ProxyTuneError("a plan knows nothing of compiled members; leave compile out of --options")
        if not all(0 <= value <= 1 for value in self.acceptances):
            given = ",".join(f"{value:g}" for value in self.acceptances)
            raise ProxyTuneError(f"an acceptance lies between 0 and 1, not at {given}")
        if self.probe and self.device is not None:
            raise ProxyTuneError("--device is for a prediction without --probe; --device-map says where to probe")
        if self.device not in (None, "cpu", "cuda"):
            raise ProxyTuneError(f"--device is cpu or cuda, not {self.device!r}")


@dataclass(frozen=True)
class RequestOptions(Options):
    """Options of a plan for a base behind an API: what is asked, and what it is paid."""

    prompts: int = _api(1, "Number of prompts.", metavar="N", min=1)
    prompt_tokens: int = _api(256, "Tokens of each prompt.", metavar="N", min=1)
    new_tokens: int = _api(
        256,
        "New tokens of each answer; those that end earlier cost less.",
        flag="--max-new-tokens -n",
        metavar="N",
        min=1,
    )
    drafts: tuple[int, ...] = _api(
        (4,),
        "Drafts per request of the way verify, as generate's --speculate N.",
        metavar="N,...",
        parse=numbers("--drafts", "2,4"),
    )
    price_in: float | None = _api(
        None, "Price of a million tokens in prompts, in any currency.", metavar="PRICE", min=0
    )
    price_out: float | None = _api(None, "Price of a million tokens in answers.", metavar="PRICE", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.price_in is None) != (self.price_out is None):
            raise ProxyTuneError("a cost needs both prices, --price-in and --price-out")
        if not self.drafts or min(self.drafts) < 1 or len(set(self.drafts)) < len(self.drafts):
            given = ",".join(map(str, self.drafts))
            raise ProxyTuneError(f"--drafts is numbers of drafts, at least 1 and each once, not {given!r}")

    @property
    def prices(self) -> tuple[float, float] | None:
        """The prices of a million tokens in prompts and in answers."""
        return None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out)
