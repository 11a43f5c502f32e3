"""What a run asks of a base behind an API: requests, billed tokens and their cost, for each way of asking.

It is counted as the lane counts (lanes.remote): a request holds one text or several, and each text is billed whole and
answered by one token. Drafts are accepted independently of each other, with one probability (2211.17192).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.errors import ProxyTuneError
from proxytune.lanes.completions import FEW_BIASES, FEW_TIMES, MOST_SCORED
from proxytune.recipe.check import MemberReport, cache_bytes, count_recipe
from proxytune.recipe.config import ProxyTuneConfig
from proxytune.recipe.members import Loading, load_config
from proxytune.recipe.parts import ApiBase
from proxytune.speed.options import RequestOptions

__all__ = ["RequestPlan", "Usage", "plan_requests", "usage_of"]

WAYS = ("plain", "verify, one text", "verify, list", "push", "ask", "pull")


@dataclass(frozen=True)
class Usage:
    """What one way of asking uses in a whole run; with drafts an expected value.

    Attributes:
        calls: requests. tokens_in: tokens of all texts sent. tokens_out: tokens of all replies.
    """

    calls: float = 0.0
    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def plus(self, other: Usage, times: float = 1.0) -> Usage:
        """The sum of this and ``times`` the other."""
        return Usage(
            self.calls + times * other.calls,
            self.tokens_in + times * other.tokens_in,
            self.tokens_out + times * other.tokens_out,
        )

    def cost(self, prices: tuple[float, float]) -> float:
        """In the unit of the prices, which are those of a million tokens sent and of a million received."""
        return (self.tokens_in * prices[0] + self.tokens_out * prices[1]) / 1e6


@dataclass(frozen=True)
class WayPlan:
    """One way of asking, with its number of drafts and their acceptance (None where nothing is drafted).

    Attributes:
        low: if no choice is open. high: if each one is asked about again as often as possible.
        cost: of both, in the unit of the prices; None without prices.
    """

    way: str
    drafts: int | None
    acceptance: float | None
    low: Usage
    high: Usage
    cost: tuple[float, float] | None


@dataclass(frozen=True)
class RequestPlan:
    """The ways of asking, and the members that run on this machine.

    Attributes:
        ways: ``plain`` is the base alone, which writes each answer in one request.
        weight_bytes, kv_bytes_per_token: of the members here; None if unknown.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    top_logprobs: int
    n_vocab: int
    ways: list[WayPlan]
    members: list[MemberReport]
    weight_bytes: int
    kv_bytes_per_token: int | None
    notes: list[str]


def plan_requests(
    config: ProxyTuneConfig,
    options: RequestOptions,
    *,
    acceptances: Sequence[float],
    batch: int,
    loading: Loading | None = None,
) -> RequestPlan:
    """Plan a run of a recipe whose base is behind an API. Nothing is loaded, and the server is not asked.

    Args:
        acceptances: shares of drafts that the mixture accepts. batch: prompts per batch.

    Raises:
        ProxyTuneError: if the base is a model on this machine.
    """
    base = config.base_member
    if not isinstance(base, ApiBase):
        raise ProxyTuneError("the base of this recipe is a model on this machine, which no request asks")
    loading = loading or Loading()
    members, notes = count_recipe(config, loading)
    here = [(name, member) for name, member in config.members() if not isinstance(member, ApiBase)]
    widths = (load_config(config, *one, loading).get_text_config(decoder=True).vocab_size for one in here)
    n_vocab = min(widths)
    ways = []
    for way in WAYS:
        for n_drafts in options.drafts if way.startswith("verify") else (None,):
            for acceptance in acceptances if n_drafts is not None else (None,):
                low, high = usage_of(
                    way,
                    options,
                    batch=batch,
                    n_drafts=n_drafts or 0,
                    acceptance=acceptance or 0.0,
                    top_logprobs=base.top_logprobs,
                    n_vocab=n_vocab,
                )
                cost = None if options.prices is None else (low.cost(options.prices), high.cost(options.prices))
                ways.append(WayPlan(way, n_drafts, acceptance, low, high, cost))
    return RequestPlan(
        prompts=options.prompts,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch=batch,
        top_logprobs=base.top_logprobs,
        n_vocab=n_vocab,
        ways=ways,
        members=members,
        weight_bytes=sum(one.weight_bytes for one in members),
        kv_bytes_per_token=cache_bytes(members),
        notes=notes,
    )


def usage_of(
    way: str,
    options: RequestOptions,
    *,
    batch: int,
    n_drafts: int,
    acceptance: float,
    top_logprobs: int,
    n_vocab: int,
) -> tuple[Usage, Usage]:
    """What a way of asking uses, if no choice is open, and if all are.

    An open choice is asked about again: once by the names of the tokens that could win, or for four times as many
    tokens until the server names all. A push that does not decide is followed by another, and by one of all tokens.
    """
    n, length, new = options.prompts, options.prompt_tokens, options.new_tokens
    if way == "plain":
        plain = Usage(n, n * length, n * new)
        return plain, plain
    if way == "push":
        again = FEW_TIMES if n_vocab > FEW_BIASES else 0
    else:
        again = 0 if way == "pull" or top_logprobs >= n_vocab else math.ceil(math.log(n_vocab / top_logprobs, 4))
    # After each number of written tokens: what is asked until the answer ends, at least and at most.
    ahead = [(Usage(), Usage())] * (new + 1)
    for written in range(new - 1, -1, -1):
        room = max(new - written - 1, 0) if written else 0  # the prompt's pass has no drafts
        drafts = min(n_drafts, room)
        places = [length + written + at for at in range(drafts + 1)]
        one_text = way == "verify, one text" and drafts > 0 and top_logprobs * places[-1] <= MOST_SCORED
        low = Usage(1, places[-1], 1) if one_text else Usage(1, sum(places), len(places))
        high = low.plus(Usage(len(places), sum(places), len(places)), again)
        for accepted in range(drafts + 1):
            chance = acceptance**accepted * (1.0 if accepted == drafts else 1.0 - acceptance)
            after = ahead[written + accepted + 1]
            low, high = low.plus(after[0], chance), high.plus(after[1], chance)
        ahead[written] = low, high
    check = Usage(1, length, 1)  # at the end of each batch its first prompt is asked about once more
    n_batches = math.ceil(n / batch)
    low, high = (Usage().plus(each, n).plus(check, n_batches) for each in ahead[0])
    return low, high
