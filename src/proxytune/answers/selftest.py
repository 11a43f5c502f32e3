"""What ``proxytune check --run`` does: a loaded recipe tries itself against the plain loop, on the user's own models.

The yardstick is the paper's loop (2401.08565, section 3): every member reads the whole text by itself, without a cache,
and the logits are mixed. A text that was written greedily is held against it position by position. Where two tokens
are as good as each other within the rounding of the members' dtype, either is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from proxytune.decoding.mixing import mix
from proxytune.errors import ProxyTuneError, first_line
from proxytune.recipe.prompts import left_pad

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Trial", "run_trials"]

TEXTS = ("The capital of France is", "Question: how many legs do three spiders and two ants have? Answer:")
N_NEW = 16
N_DRAFTS = 4
# How much likelier another token may be by the plain loop, in standard deviations of its logits.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
ROUNDED = 0.25  # float16 and bfloat16, and quantized members


@dataclass(frozen=True)
class Trial:
    """One thing that was tried.

    Attributes:
        name: what must hold. passed: whether it does; None where it does not apply to this recipe.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@torch.no_grad()
def run_trials(model: ProxyTunedForCausalLM) -> Iterator[Trial]:
    """Try a loaded recipe, one trial after another."""
    bench = _Bench(model)
    yield bench.trial("alpha 0 writes what the base alone writes", bench.alpha_zero)
    yield bench.trial("the recipe writes what the plain loop writes", bench.plain)
    yield bench.trial("without a cache it writes what it writes with one", bench.uncached)
    yield bench.trial("drafts change nothing", bench.drafted)
    yield bench.trial("a batch writes what its rows write alone", bench.batched)


class _DoesNotApply(Exception):
    """A trial that this recipe cannot have; the message says why."""


class _Differs(Exception):
    """Two texts differ where they must not; the message says where."""


class _Bench:
    """The prompts, the tolerance, and the ways to write a text."""

    def __init__(self, model: ProxyTunedForCausalLM) -> None:
        self.model = model
        vocabulary = model.shared_vocab
        if model.tokenizer is None:
            self.prompts = [[(7919 * (at + n)) % vocabulary for at in range(n)] for n in (5, 13)]
        else:
            self.prompts = [[int(token) for token in model.tokenizer(text)["input_ids"]] for text in TEXTS]
        lanes: Sequence[Any] = list(model.lanes)  # type: ignore[arg-type]
        exact = all(
            lane.model.dtype in TOLERANCE and getattr(lane.model, "hf_quantizer", None) is None for lane in lanes
        )
        self.tolerance = TOLERANCE[torch.float32] if exact else ROUNDED

    def trial(self, name: str, tried: Callable[[], str]) -> Trial:
        """Make one trial; what it raises is its outcome."""
        try:
            with self._plain_generation():
                return Trial(name, True, tried())
        except _DoesNotApply as error:
            return Trial(name, None, str(error))
        except _Differs as error:
            return Trial(name, False, str(error))
        except Exception as error:  # a trial is there to find out
            return Trial(name, False, f"{type(error).__name__}: {first_line(error)}")

    @contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Without what the models' generation configs ask for: it would be tried too."""
        holders = [self.model, *(self.model.member(name) for name in self.model.seats)]
        kept = [holder.generation_config for holder in holders]
        for holder in holders:
            holder.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for holder, config in zip(reversed(holders), reversed(kept)):
                holder.generation_config = config

    # -- the trials ---------------------------------------------------------------------------------------------
    def alpha_zero(self) -> str:
        """At alpha 0 the base's own ``generate`` writes the same."""
        for prompt in self.prompts:
            own = self._shown(prompt)["base"]
            base = self.model.base
            ids = torch.tensor([list(own)], device=base.device)
            wanted = base.generate(ids, attention_mask=torch.ones_like(ids), **_GREEDY)[0, len(own) :].tolist()  # type: ignore[operator]
            self._compare(prompt, self._write([prompt], alpha=0.0, speculate=False)[0], wanted, alpha=0.0)
        return self._said()

    def plain(self) -> str:
        """By default, drafts and all, each token is the plain loop's choice."""
        for prompt in self.prompts:
            self._hold(prompt, self._write([prompt])[0])
        return self._said()

    def uncached(self) -> str:
        """The same text is written when every member reads everything again for each token."""
        for prompt in self.prompts:
            cached = self._write([prompt], speculate=False)[0]
            self._compare(prompt, cached, self._write([prompt], use_cache=False)[0])
        return self._said()

    def drafted(self) -> str:
        """A fixed number of drafts writes what no drafts write."""
        for prompt in self.prompts:
            try:
                drafted = self._write([prompt], speculate=N_DRAFTS)[0]
            except ProxyTuneError as error:
                raise _DoesNotApply(str(error)) from None
            self._compare(prompt, drafted, self._write([prompt], speculate=False)[0])
        return f"{self._said()}, {N_DRAFTS} drafts at a time"

    def batched(self) -> str:
        """Rows of unequal lengths write what they write alone."""
        for prompt, row in zip(self.prompts, self._write(self.prompts)):
            self._compare(prompt, row, self._write([prompt], speculate=False)[0])
        return self._said()

    def _said(self) -> str:
        return f"{len(self.prompts)} prompts, {N_NEW} tokens each"

    # -- writing, and the plain loop ----------------------------------------------------------------------------
    def _write(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        ids, mask = left_pad(prompts)
        device = self.model.device
        out = self.model.generate(ids.to(device), attention_mask=mask.to(device), **_GREEDY, **options)
        return [row[ids.shape[1] :].tolist() for row in out]

    def _shown(self, prompt: Sequence[int]) -> dict[str, Sequence[int]]:
        """What each member reads in place of the prompt."""
        ids = torch.tensor([list(prompt)])
        own = self.model.prompter.from_ids(ids, None) if any(self.model.own_prompts) else {}
        return {name: own[name][0] if name in own else prompt for name in self.model.seats}

    def _reference(self, prompt: Sequence[int], tokens: Sequence[int], alpha: float | None) -> Tensor:
        """The plain loop's logits of each of ``tokens``, (n_tokens, n_vocab): every member alone, without a cache."""
        model, logits = self.model, {}
        for name, own in self._shown(prompt).items():
            member = model.member(name)
            ids = torch.tensor([[*own, *tokens[:-1]]], device=member.device)
            width = member.config.get_text_config(decoder=True).vocab_size
            logits[name] = member(input_ids=ids.clamp(max=width - 1), use_cache=False).logits[:, len(own) - 1 :]
        pairs = [(logits.get(f"{one.name}.expert"), logits.get(f"{one.name}.anti_expert")) for one in model.experts]
        return mix(
            logits["base"],
            pairs,
            model.alpha_rows(alpha, 1),
            plausibility=model.config.plausibility,
            vocab_size=model.shared_vocab,
        )[0].cpu()

    def _hold(self, prompt: Sequence[int], tokens: Sequence[int], alpha: float | None = None) -> None:
        """Each token is the likeliest by the plain loop, within the tolerance."""
        for at, (token, logits) in enumerate(zip(tokens, self._reference(prompt, tokens, alpha))):
            behind = self._behind(logits, token)
            if behind > self.tolerance:
                raise _Differs(
                    f"token {at + 1} behind {len(prompt)} of a prompt is {token}, but the plain loop chooses "
                    f"{int(logits.argmax())} by {behind:.3g} standard deviations of its logits"
                )

    def _compare(
        self, prompt: Sequence[int], tokens: Sequence[int], wanted: Sequence[int], alpha: float | None = None
    ) -> None:
        """Two texts are the same up to a place where the plain loop finds both tokens equally good."""
        at = next((at for at, (one, other) in enumerate(zip(tokens, wanted)) if one != other), None)
        if at is None:
            return
        logits = self._reference(prompt, tokens[: at + 1], alpha)[at]
        behind = max(self._behind(logits, token) for token in (tokens[at], wanted[at]))
        if behind > self.tolerance:
            raise _Differs(
                f"token {at + 1} behind {len(prompt)} of a prompt is {tokens[at]} and not {wanted[at]}; the plain loop "
                f"tells them apart by {behind:.3g} standard deviations of its logits"
            )

    @staticmethod
    def _behind(logits: Tensor, token: int) -> float:
        """How far a token's logit lies below the highest, in standard deviations."""
        known = logits[torch.isfinite(logits)]
        return float((known.max() - logits[token]) / known.std())


_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": N_NEW,
    "eos_token_id": None,
    "pad_token_id": 0,
}
