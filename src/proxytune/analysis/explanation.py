"""An explanation: an answer and why each of its tokens was chosen. Terminal, page and notebook show it.

Tokens are the objects of the trace schema (``docs/python.md``). What is None or missing there is unknown, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = [
    "KINDS",
    "Explanation",
    "Piece",
    "Totals",
    "base_choice",
    "expert_choice",
    "kind_of",
    "probability",
    "rise",
    "shift",
]

# Kind of token -> its meaning, in the order of legends.
KINDS = {
    "changed": "the base's most probable token here is another one",
    "strengthened": "the base's most probable token too, and steering made the written token more probable by at "
    "least 5 points",
    "kept": "as in the base, or nearly so",
    "given": "given, not chosen here",
    "unknown": "not recorded",
}
STRENGTHENED = 0.05  # how much more probable, from 0 to 1
HALF = "\ufffd"  # in the text of a token that is a part of a character


@dataclass(frozen=True)
class Piece:
    """A piece of the answer's text, and its tokens: several if each is only a part of a character.

    Attributes:
        text: its text in the answer. first: its first token, from 0. n_tokens: the number of its tokens.
        special: whether the text of the answer leaves it out, like an end token.
        span: its start and end in the text of the answer; empty if it is left out.
    """

    text: str
    first: int
    n_tokens: int = 1
    special: bool = False
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Totals:
    """What steering did to the answer as a whole.

    Attributes:
        n_tokens: number of tokens of the answer, without given ones.
        kinds: kind -> number of tokens.
        kl: the mean KL(mixture || base), in nats; None if it is unknown.
        promoted, demoted: the tokens that gained and lost the most probability, summed over all places at which they
            were candidates, largest first. One place counts from 0 to 1.
        conflict: how far several experts disagree, in a sentence; None if there is one expert, or it is unknown.
    """

    n_tokens: int
    kinds: Mapping[str, int]
    kl: float | None
    promoted: Sequence[tuple[str, float]]
    demoted: Sequence[tuple[str, float]]
    conflict: str | None


@dataclass(frozen=True)
class Explanation:
    """An answer and why each of its tokens was chosen. A notebook shows it as a page.

    Attributes:
        prompt: the prompt; None if it is unknown. text: the answer.
        alpha: expert name -> alpha; empty if another program wrote the answer.
        tokens: one object per token, as in a trace (see the documentation of traces). ``texts`` of a token: id -> text,
            for the tokens that its flips name.
        own: what ``base`` and each expert, by name, answer alone.
        n_given: how many tokens at the beginning were given, not chosen.
        command: the words of the command that gives this answer; empty if there is none.

    Example:
        >>> import proxytune
        >>> why = proxytune.explain("my-recipe", "The fox", max_new_tokens=3)
        >>> sorted(why.tokens[0]["candidates"][0])
        ['base_logprob', 'delta', 'expert_logprob', 'id', 'masked', 'mixture_logprob', 'token']
        >>> why.html().startswith("<!doctype html>")
        True
    """

    prompt: str | None
    text: str
    alpha: Mapping[str, float]
    tokens: Sequence[Mapping[str, Any]]
    own: Mapping[str, str] = field(default_factory=dict)
    n_given: int = 0
    command: Sequence[str] = ()

    @property
    def steered(self) -> bool:
        """Whether this is an answer of a recipe, and not another program's log."""
        return bool(self.alpha)

    def kind(self, at: int) -> str:
        """What steering did to a token: ``changed``, ``strengthened``, ``kept`` or ``given``."""
        return "given" if at < self.n_given else kind_of(self.tokens[at])

    @cached_property
    def pieces(self) -> list[Piece]:
        """The answer's text cut into its tokens, parts of characters together."""
        return list(_pieces(self.text, [str(token["token"]) for token in self.tokens]))

    def moves(self, k: int) -> list[int]:
        """The places of the k tokens that steering moved furthest (by KL); if that is unknown, of the least probable
        ones."""

        def far(at: int) -> float:
            token = self.tokens[at]
            moved = token.get("kl" if self.steered else "mixture_logprob")
            if moved is None:
                return -math.inf
            return float(moved if self.steered else -moved)

        chosen = [at for at in range(self.n_given, len(self.tokens)) if far(at) > -math.inf]
        return sorted(chosen, key=far, reverse=True)[:k]

    @cached_property
    def totals(self) -> Totals:
        """What steering did to the answer as a whole."""
        counts = dict.fromkeys(KINDS, 0)
        shifts: dict[int, float] = {}
        texts: dict[int, str] = {}
        for at, token in enumerate(self.tokens):
            counts[self.kind(at)] += 1
            for each in token.get("candidates") or () if self.kind(at) in ("changed", "strengthened", "kept") else ():
                shifts[each["id"]] = shifts.get(each["id"], 0.0) + shift(each)
                texts[each["id"]] = each["token"]
        kls = [token["kl"] for token in self.tokens[self.n_given :] if token.get("kl") is not None]
        ordered = [(texts[id_], moved) for id_, moved in sorted(shifts.items(), key=lambda item: item[1])]
        return Totals(
            n_tokens=len(self.tokens) - self.n_given,
            kinds={kind: count for kind, count in counts.items() if count},
            kl=sum(kls) / len(kls) if kls else None,
            promoted=[pair for pair in reversed(ordered[-5:]) if pair[1] > 0],
            demoted=[pair for pair in ordered[:5] if pair[1] < 0],
            conflict=_conflict([token.get("conflict") for token in self.tokens[self.n_given :]]),
        )

    def html(self) -> str:
        """The explanation as one HTML page that needs no network and no other file."""
        from proxytune.analysis.page import page

        return page(self)

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks."""
        from proxytune.analysis.page import framed

        return framed(self)


def _conflict(of_tokens: Sequence[Mapping[str, Any] | None]) -> str | None:
    """The conflicts of an answer's tokens in a sentence."""
    found = [each for each in of_tokens if each is not None]
    if not found:
        return None
    apart = sum(bool(each["disagree"]) for each in found)
    distance = sum(each["distance"] for each in found) / len(found)
    cosines = [each["cosine"] for each in found if each["cosine"] is not None]
    cosine = f", mean cosine of offsets {sum(cosines) / len(cosines):.2f}" if cosines else ""
    return (
        f"By themselves, the experts would choose different tokens at {apart} of {len(found)} places; mean distance "
        f"{distance:.2f}{cosine}"
    )


# -- one token ------------------------------------------------------------------------------------------------
def kind_of(token: Mapping[str, Any]) -> str:
    """What steering did to a token that was chosen."""
    changed = token.get("changed")
    if changed is None:
        return "unknown"
    if changed:
        return "changed"
    risen = rise(token)
    return "strengthened" if risen is not None and risen >= STRENGTHENED else "kept"


def probability(value: Mapping[str, Any], name: str) -> float | None:
    """A probability from a log-probability of an object; None if it is unknown."""
    log_p = value.get(name)
    return None if log_p is None else math.exp(log_p)


def rise(token: Mapping[str, Any]) -> float | None:
    """How much more probable steering made a token, from -1 to 1."""
    before, after = probability(token, "base_logprob"), probability(token, "mixture_logprob")
    return None if before is None or after is None else after - before


def shift(candidate: Mapping[str, Any]) -> float:
    """How much more probable steering made a candidate, from -1 to 1; one without a log-probability is never chosen."""
    before, after = probability(candidate, "base_logprob"), probability(candidate, "mixture_logprob")
    return (after or 0.0) - (before or 0.0)


def base_choice(token: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The candidate that the base would choose; None if that is unknown."""
    return _best(token, lambda each: each.get("base_logprob"))


def expert_choice(token: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The candidate that an expert alone would choose; None if that is unknown."""
    return _best(token, lambda each: (each.get("expert_logprob") or {}).get(name))


def _best(token: Mapping[str, Any], log_p: Any) -> Mapping[str, Any] | None:
    known = [each for each in token.get("candidates") or () if log_p(each) is not None]
    return max(known, key=lambda each: (log_p(each), -each["id"]), default=None)  # of equals the lowest id


# -- text -----------------------------------------------------------------------------------------------------
def _pieces(text: str, tokens: Sequence[str]) -> Iterator[Piece]:
    """Cut ``text`` into its ``tokens``; a token that is not in it (a special one) is a piece with its own text."""
    at = first = 0
    while first < len(tokens):
        token, n = tokens[first], 1
        if HALF in token and not text.startswith(token, at):
            while first + n < len(tokens) and HALF in tokens[first + n]:
                n += 1
            rest = next((each for each in tokens[first + n :] if each and text.find(each, at) >= 0), "")
            end = text.find(rest, at) if rest else len(text)
            yield Piece(text[at:end] or token, first, n, span=(at, end))
            at = end
        else:
            there = text.startswith(token, at)
            yield Piece(token, first, special=not there, span=(at, at + len(token) if there else at))
            at += len(token) if there else 0
        first += n
