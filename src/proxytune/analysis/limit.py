"""What the base can reach: gold answers, token by token, at every strength of steering.

At one position let ``B`` be the base's logits and ``D`` what the recipe adds to them, ``sum_k alpha_k (expert_k -
anti_expert_k)``. With a factor ``s`` on the recipe's alphas the mixture is ``B + s D``: a line in ``s`` for each token
of the vocabulary. Greedy decoding can choose the gold token at some strength if its line is highest for some ``s``
from 0 on.

It is a bound for exactly this sequence of tokens, each after the gold tokens before it. Another wording of the same
answer, or another tokenisation, may be within reach where this one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proxytune.analysis.references import Reference
from proxytune.answers.generation import Encoded, Sampling, answer, encode
from proxytune.decoding.mixing import Members, mix
from proxytune.decoding.trace import as_json
from proxytune.errors import ProxyTuneError
from proxytune.evaluation.fit import gold_ids, read_gold
from proxytune.tables import Table, percent

if TYPE_CHECKING:
    from proxytune.model import ProxyTunedForCausalLM

__all__ = ["GoldAnswer", "GoldToken", "limit", "limit_tables", "reach", "summary"]

MOST = 64.0  # the best factor is searched up to this one
STEPS = 40  # of bisection
LISTED = 10


@dataclass(frozen=True)
class GoldToken:
    """One token of a gold answer, after the gold tokens before it.

    Attributes:
        id: the token's id. token: its text.
        base_rank, base_logprob: its rank and log-probability in the base; rank 1 is the most probable.
        needed: how many nats it must gain on the base's first choice to pass it; 0 if it is the first choice.
        given: how many nats it gains on that choice at the recipe's own alphas.
        at_recipe_alpha: whether greedy decoding chooses it at the recipe's alphas.
        reachable: (low, high), the factors on the recipe's alphas between which greedy decoding can choose it; high may
            be infinite. None: at no factor from 0 on.
        best: the factor at which it is most probable; infinite if it only grows.
    """

    id: int
    token: str
    base_rank: int
    base_logprob: float
    needed: float
    given: float
    at_recipe_alpha: bool
    reachable: tuple[float, float] | None
    best: float

    def to_json(self) -> dict[str, Any]:
        """As JSON; an infinite number is None."""
        return {name: as_json(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class GoldAnswer:
    """A gold answer, and whether samples of the base alone begin with it (None without samples)."""

    prompt: str
    completion: str
    tokens: list[GoldToken]
    passed: bool | None = None

    def share(self, some_alpha: bool) -> float:
        """The share of its tokens that greedy decoding can choose, at some strength or at that of the recipe."""
        return sum(_within(token, some_alpha) for token in self.tokens) / len(self.tokens)

    def first_unreachable(self) -> tuple[int, GoldToken] | None:
        """The first token that no strength reaches, and its number from 1."""
        return next(((at, each) for at, each in enumerate(self.tokens, start=1) if each.reachable is None), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        first = self.first_unreachable()
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "at_recipe_alpha": self.share(False) == 1,
            "at_some_alpha": self.share(True) == 1,
            "first_unreachable": None
            if first is None
            else {"number": first[0], "id": first[1].id, "token": first[1].token},
            "passed": self.passed,
            "tokens": [token.to_json() for token in self.tokens],
        }


def _within(token: GoldToken, some_alpha: bool) -> bool:
    return token.reachable is not None if some_alpha else token.at_recipe_alpha


# -- the lines ------------------------------------------------------------------------------------------------
def reach(base: Tensor, added: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Between which factors ``s >= 0`` the gold token's line ``base + s * added`` is highest.

    Args:
        base: logits, (n_tokens, n_vocab), -inf where a token can't be chosen at all.
        added: what s = 1 adds, same shape; -inf where every s above 0 excludes the token.
        gold: ids, (n_tokens,).

    Returns:
        low and high, (n_tokens,); low above high means nowhere. A factor of 0 is the base alone.
    """
    at = gold[:, None]
    own, own_added = base.gather(1, at), added.gather(1, at)
    apart, gap = own_added - added, base - own  # the gold line is not below another where s * apart >= gap
    rivals = (base > -torch.inf) & (added > -torch.inf)
    crossing = gap / apart
    low = crossing.where(rivals & (apart > 0), 0.0).amax(dim=-1).clamp(min=0.0)
    high = crossing.where(rivals & (apart < 0), torch.inf).amin(dim=-1)
    never = (rivals & (apart == 0) & (gap > 0)).any(dim=-1) | ~torch.isfinite(own + own_added)[:, 0]
    # At 0, tokens that the experts exclude can be chosen too, and compete with the others.
    first = (base.argmax(dim=-1) == gold) & (own[:, 0] > -torch.inf)
    found = ~never & (low <= high) & ((high > 0) | first)
    nowhere = torch.full_like(low, torch.inf).where(~first, 0.0)  # or at 0 alone
    return low.where(found, nowhere), high.where(found, -nowhere)


def best_factor(base: Tensor, added: Tensor, gold: Tensor) -> Tensor:
    """The factor at which each gold token is most probable, (n_tokens,): its log-probability is concave in the factor.

    The slope, ``added[gold]`` less the mixture's mean of ``added``, falls with s; its root is found by bisection, up to
    :data:`MOST`. The factor is infinite where no token gains more than the gold one.
    """
    own = added.gather(1, gold[:, None])
    known = (base > -torch.inf) & (added > -torch.inf)
    lines, slopes = base.where(known, -torch.inf), added.where(known, 0.0)

    def rises(s: Tensor) -> Tensor:
        p = (lines + s[:, None] * slopes).softmax(dim=-1)
        return (own - (p * slopes).sum(dim=-1, keepdim=True))[:, 0] > 0

    low, high = torch.zeros_like(own[:, 0]), torch.full_like(own[:, 0], MOST)
    endless = (own >= slopes.where(known, -torch.inf).amax(dim=-1, keepdim=True))[:, 0]
    for _ in range(STEPS):
        middle = (low + high) / 2
        up = rises(middle)
        low, high = middle.where(up, low), high.where(up, middle)
    return high.where(rises(torch.zeros_like(high)), 0.0).where(~endless, torch.inf)


@torch.inference_mode()
def gold_tokens(
    model: ProxyTunedForCausalLM, tokenizer: Any, encoded: Encoded, ids: Sequence[int], alphas: Sequence[float]
) -> list[GoldToken]:
    """The tokens of one gold answer, all read in one pass of every member.

    Args:
        ids: the answer, at least one id. alphas: one value per expert.
    """
    base, added, mixed = _lines(model, model.paired(read_gold(model, encoded, ids)), alphas)
    gold = torch.tensor(list(ids), device=base.device)
    low, high = reach(base, added, gold)
    best = best_factor(base, added, gold)
    log_p = base.log_softmax(dim=-1)
    own_log, first = log_p.gather(1, gold[:, None]), log_p.max(dim=-1, keepdim=True)
    columns = [
        own_log[:, 0],
        (log_p > own_log).sum(dim=-1) + 1,
        (first.values - own_log)[:, 0],
        (added.gather(1, gold[:, None]) - added.gather(1, first.indices))[:, 0],
        mixed.argmax(dim=-1) == gold,
        low,
        high,
        best,
    ]
    rows = torch.stack([column.double() for column in columns], dim=1).tolist()
    return [
        GoldToken(
            id_, tokenizer.decode([id_]), int(rank), log, needed, given, bool(chosen), None if lo > hi else (lo, hi), s
        )
        for id_, (log, rank, needed, given, chosen, lo, hi, s) in zip(ids, rows)
    ]


def _lines(model: ProxyTunedForCausalLM, members: Members, alphas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The base's logits for tokens that can be chosen, the recipe's offsets, and the mixture; (n_tokens, n_vocab)
    each."""
    base, experts = members
    alpha = torch.tensor([list(alphas)], dtype=torch.float32)
    how = model.mixing()
    added = mix(torch.zeros_like(base, dtype=torch.float32), experts, alpha, **{**how, "plausibility": None})
    return mix(base, [], alpha[:, :0], **how)[0], added[0], mix(base, experts, alpha, **how)[0]


# -- a set of answers -----------------------------------------------------------------------------------------
def limit(
    model: ProxyTunedForCausalLM,
    tokenizer: Any,
    references: Sequence[Reference],
    alphas: Sequence[float],
    *,
    shown: dict[str, Any],
    samples: int = 0,
    sampling: Sampling | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[GoldAnswer]:
    """Measure each reference's gold answer. Of several wordings it returns the one with the most tokens within reach.

    Args:
        alphas: one value per expert. shown: what :func:`proxytune.answers.generation.encode` takes besides the prompt.
        samples: number of samples of the base alone per prompt; an answer passes if one of them begins with the gold
            text.
        note: called for a reference that cannot be read, which is left out.

    Raises:
        ProxyTuneError: for the rules convex and dynamic, and with a gate.
    """
    rule, gate = vars(model.steering).values()
    if gate is not None or rule in ("convex", "dynamic"):
        what = "with a gate" if gate is not None else f"under the rule {rule}"
        raise ProxyTuneError(
            f"{what} the mixture is no straight line in the strength of steering, so no limit "
            "is known; use another recipe"
        )
    for number, reference in enumerate(references, start=1):
        try:
            encoded = encode(model, tokenizer, reference.prompt, **shown)
            worded = []
            for text in reference.completions:
                ids = gold_ids(tokenizer, encoded, text)
                worded.append(GoldAnswer(reference.prompt, text, gold_tokens(model, tokenizer, encoded, ids, alphas)))
        except ProxyTuneError as error:
            note(f"{reference.where}: {error}")
            continue
        best = max(worded, key=lambda one: (one.share(True), one.share(False)))
        if samples:
            longest = max(len(one.tokens) for one in worded)
            made = answer(
                model,
                tokenizer,
                [encoded] * samples,
                [(0.0,) * len(alphas)] * samples,
                max_new_tokens=longest + 2,  # the same text may have a few more tokens
                sampling=sampling or Sampling(temperature=1.0),
                rows=[f"{number}/{at}" for at in range(samples)],
            )
            golds = tuple(text.strip() for text in reference.completions)
            best = replace(best, passed=any(one.text.strip().startswith(golds) for one in made))
        yield best


def summary(answers: Sequence[GoldAnswer], samples: int = 0) -> dict[str, Any]:
    """The shares of tokens and of whole answers within reach, what samples of the base reach, and each answer."""
    n_tokens = sum(len(one.tokens) for one in answers)

    def shares(some_alpha: bool) -> dict[str, float]:
        within = sum(_within(token, some_alpha) for one in answers for token in one.tokens)
        return {
            "tokens": within / n_tokens,
            "answers": sum(one.share(some_alpha) == 1 for one in answers) / len(answers),
        }

    passed = {"k": samples, "share": sum(bool(one.passed) for one in answers) / len(answers)} if samples else None
    return {
        "n_answers": len(answers),
        "n_tokens": n_tokens,
        "reachable": {"at_recipe_alpha": shares(False), "at_some_alpha": shares(True)},
        "pass_at_k": passed,
        "answers": [one.to_json() for one in answers],
    }


def limit_tables(found: dict[str, Any]) -> list[Table]:
    """Tables of the shares, and of the first tokens that are out of reach."""
    rows = [
        [name, *(percent(found["reachable"][key][kind]) for kind in ("tokens", "answers"))]
        for name, key in (
            ("at the recipe's alpha", "at_recipe_alpha"),
            ("at some alpha for each token", "at_some_alpha"),
        )
    ]
    if found["pass_at_k"]:
        k, share = found["pass_at_k"]["k"], found["pass_at_k"]["share"]
        rows.append([f"one of {k} samples of the base", "", percent(share)])
    about = f", {found['n_answers']} gold answers, {found['n_tokens']} tokens"
    notes = [
        "This is a bound for exactly these tokens, each after the gold tokens before it. Another wording of an answer "
        "may be within reach where this one is not."
    ]
    shares = Table(["greedy decoding can write", "tokens", "whole answers"], rows, "limit", about, notes=notes)
    broken = [one for one in found["answers"] if one["first_unreachable"]]
    lines = []
    for one in broken[:LISTED]:
        at = one["first_unreachable"]["number"]
        token = one["tokens"][at - 1]
        lines.append(
            [
                one["prompt"].strip().splitlines()[-1][-40:],
                f"{at}: {token['token']!r}",
                str(token["base_rank"]),
                *("–" if token[key] is None else f"{token[key]:.1f}" for key in ("needed", "given")),
            ]
        )
    legend = {
        "needed": "nats that it must gain on the base's first choice",
        "given": "nats that the experts move it against that choice at the recipe's alpha",
    }
    about = f", in {len(broken)} of {found['n_answers']} answers" + (
        f"; the first {LISTED}" if len(broken) > LISTED else ""
    )
    heads = ["prompt", "first token out of reach", "rank in the base", "needed", "given"]
    return [shares, Table(heads, lines, "no alpha reaches", about, legend=legend)] if lines else [shares]
