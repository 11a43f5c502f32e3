"""``proxytune check --run``: compares the answers of a loaded recipe with the plain loop, on the user's own models.

The reference is the paper's loop (2401.08565, section 3): every member reads the whole text by itself, without a cache,
and the logits are mixed. A greedily written text is compared with it position by position. If two tokens are equally
good within the rounding of the members' dtype, both are accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from proxytune.errors import ProxyTuneError, first_line
from proxytune.recipe.prompts import left_pad

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["Trial", "run_trials"]

TEXTS = ("The capital of France is", "Question: how many legs do three spiders and two ants have? Answer:")
N_NEW = 16
N_DRAFTS = 4
# By how much another token may lead in the plain loop, in standard deviations of its logits.
EXACT, TOLERANCE = (torch.float64, torch.float32), 1e-3
ROUNDED = 0.25  # float16 and bfloat16, and quantized members


@dataclass(frozen=True)
class Trial:
    """The result of one comparison.

    Attributes:
        name: what must hold. passed: whether it holds; None if it does not apply to this recipe.
        detail: what was found.
    """

    name: str
    passed: bool | None
    detail: str


@torch.no_grad()
def run_trials(model: ProxyTunedForCausalLM) -> Iterator[Trial]:
    """Run all trials on a loaded recipe, one after another."""
    trials = _Trials(model)
    yield trials.run("alpha 0 writes what the base alone writes", trials.alpha_zero)
    yield trials.run("the recipe writes what the plain loop writes", trials.plain)
    yield trials.run("without a cache it writes what it writes with one", trials.uncached)
    yield trials.run("drafts change nothing", trials.drafted, f", {N_DRAFTS} drafts at a time")
    yield trials.run("a batch writes what its rows write alone", trials.batched)


Tokens = Sequence[int]
Texts = Iterator[tuple[Any, ...]]  # the arguments of :meth:`_Trials.difference`


class _DoesNotApply(Exception):
    """The trial does not apply to this recipe; the message says why."""


class _Trials:
    """The prompts, the tolerance, and the ways to write a text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        if model.tokenizer is None:
            self.prompts = [[(7919 * (at + n)) % model.shared_vocab for at in range(n)] for n in (5, 13)]
        else:
            self.prompts = [list(model.tokenizer(text)["input_ids"]) for text in TEXTS]
        members = [lane.model for lane in model.lanes]
        exact = all(one.dtype in EXACT and getattr(one, "hf_quantizer", None) is None for one in members)
        self.tolerance = TOLERANCE if exact else ROUNDED

    def run(self, name: str, tried: Callable[[], Texts], more: str = "") -> Trial:
        """Run one trial. An error that it raises is its result."""
        try:
            with self._plain_generation():
                differences = [self.difference(*texts) for texts in tried()]
        except _DoesNotApply as error:
            return Trial(name, None, str(error))
        except Exception as error:  # finding errors is what a trial is for
            return Trial(name, False, f"{type(error).__name__}: {first_line(error)}")
        found = next(filter(None, differences), None)
        return Trial(name, found is None, found or f"{len(self.prompts)} prompts, {N_NEW} tokens each{more}")

    @contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Leave out what the models' generation configs ask for; otherwise it would be tested too."""
        with ExitStack() as stack:
            for holder in (self.model, *map(self.model.member, self.model.seats)):
                stack.callback(setattr, holder, "generation_config", holder.generation_config)
                holder.generation_config = GenerationConfig()
            yield

    # -- the trials ---------------------------------------------------------------------------------------------
    def alpha_zero(self) -> Texts:
        for prompt in self.prompts:
            own, base = self._shown(prompt)["base"], self.model.base
            ids = torch.tensor([list(own)], device=base.device)
            wanted = base.generate(ids, attention_mask=torch.ones_like(ids), **_GREEDY)[0, len(own) :].tolist()
            yield prompt, self._write([prompt], alpha=0.0, speculate=False)[0], wanted, 0.0

    def plain(self) -> Texts:
        for prompt in self.prompts:
            yield prompt, self._write([prompt])[0]

    def uncached(self) -> Texts:
        for prompt in self.prompts:
            yield prompt, self._write([prompt], speculate=False)[0], self._write([prompt], use_cache=False)[0]

    def drafted(self) -> Texts:
        for prompt in self.prompts:
            try:
                drafted = self._write([prompt], speculate=N_DRAFTS)[0]
            except ProxyTuneError as error:
                raise _DoesNotApply(str(error)) from None
            yield prompt, drafted, self._write([prompt], speculate=False)[0]

    def batched(self) -> Texts:
        for prompt, row in zip(self.prompts, self._write(self.prompts)):
            yield prompt, row, self._write([prompt], speculate=False)[0]

    # -- writing, and the plain loop ----------------------------------------------------------------------------
    def _write(self, prompts: Sequence[Tokens], **options: Any) -> list[list[int]]:
        ids, mask = (tensor.to(self.model.device) for tensor in left_pad(prompts))
        return self.model.generate(ids, attention_mask=mask, **_GREEDY, **options)[:, ids.shape[1] :].tolist()

    def _shown(self, prompt: Tokens) -> dict[str, Tokens]:
        """What each member reads in place of the prompt."""
        ids = torch.tensor([list(prompt)])
        own = self.model.prompter.from_ids(ids, None) if any(self.model.own_prompts) else {}
        return {name: own[name][0] if name in own else prompt for name in self.model.seats}

    def _reference(self, prompt: Tokens, tokens: Tokens, alpha: float | None) -> Tensor:
        """The plain loop's logits for each of ``tokens``, (n_tokens, n_vocab): every member by itself, without a
        cache."""
        model, logits = self.model, {}
        for name, own in self._shown(prompt).items():
            member = model.member(name)
            ids = torch.tensor([[*own, *tokens[:-1]]], device=member.device)
            width = member.config.get_text_config(decoder=True).vocab_size
            logits[name] = member(input_ids=ids.clamp(max=width - 1), use_cache=False).logits[:, len(own) - 1 :]
        return model.mixture(logits, model.alpha_rows(alpha, 1))[0].cpu()

    def difference(
        self, prompt: Tokens, tokens: Tokens, wanted: Tokens | None = None, alpha: float | None = None
    ) -> str | None:
        """The first difference between two texts, if in the plain loop one of the two tokens there is worse than the
        best.

        Without ``wanted`` every token is checked: the plain loop should have chosen it.
        """
        if tokens == wanted:
            return None
        logits = self._reference(prompt, tokens, alpha)
        for at, (token, other) in enumerate(zip(tokens, wanted or logits.argmax(dim=-1).tolist())):
            if wanted is not None and token == other:
                continue
            behind = max(self._behind(logits[at], each) for each in (token, other))
            if behind > self.tolerance:
                return (
                    f"token {at + 1} after a prompt of {len(prompt)} is {token}, not {other}; in the plain loop one of "
                    f"them lies {behind:.3g} standard deviations of the logits below the best"
                )
            if wanted is not None:  # after a tie the texts may differ
                break
        return None

    @staticmethod
    def _behind(logits: Tensor, token: int) -> float:
        """How far a token's logit lies below the highest, in standard deviations."""
        known = logits[torch.isfinite(logits)]
        return float((known.max() - logits[token]) / known.std())


_GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": N_NEW, "eos_token_id": None, "pad_token_id": 0}
