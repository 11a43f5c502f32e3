"""Find out what a server can do by trying it; its name is not used.

A capability is missing if the server rejects the request (4xx) or answers something else. If the server fails (5xx, no
connection), that proves nothing, and the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proxytune.errors import MemberError, VocabularyError
from proxytune.lanes.completions import (
    MOST_BIAS,
    TOO_FAR,
    Endpoint,
    Known,
    NoGoodReply,
    NoLogprobs,
    Offer,
    Refused,
    Reply,
)

__all__ = ["findings", "probe"]

# Characters of many kinds, so that another tokenizer splits them differently.
SAMPLE = (
    'The answer isn\'t 12: "Zürich" & naïve.\n\tabcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 (+)'
)
TRIES = 2  # of a probe whose reply is wrong
LIMITS = (20, 5)  # of log-probabilities, that servers have
ENOUGH = 20  # log-probabilities by which two replies are compared: scores of a whole text take seconds with all tokens
BIASES = (1024, 300)  # of tokens that a request may push


def probe(endpoint: Endpoint, *, bias: bool = False) -> None:
    """Find out with a few requests what a server can do, and whether it has the declared tokenizer.

    Args:
        bias: also find out how many tokens a request can push.

    Raises:
        MemberError: if the server cannot be used. VocabularyError: if its tokens differ.
    """
    ids = list(endpoint.tokenizer(SAMPLE)["input_ids"])
    reply = _first(endpoint, ids)
    if not reply.entries:
        raise _gives_none(endpoint)
    _refuse_strange(endpoint, reply)
    if len(reply.entries) < endpoint.n:  # a limit of its own; asked for so many, it gives the most probable ones
        endpoint.n = len(reply.entries)
        reply = endpoint.ask([ids], endpoint.n)[0]
    endpoint.given = len(reply.entries)
    short = endpoint.ask([ids[:-1]], endpoint.n)[0]
    for how in ("whole", "plain"):
        if all(one.offset == len(endpoint.shown(text, how)) for one, text in ((reply, ids), (short, ids[:-1]))):
            endpoint.offer = replace(endpoint.offer, offsets=how)
    # At temperature 0 some servers give the drawn token all probability. At 1 no server changes anything.
    cold = endpoint.offer
    endpoint.offer = replace(cold, temperature=1.0)
    warm = endpoint.ask([ids], endpoint.n)[0].known
    if same(reply.known, warm):
        endpoint.offer, warm = cold, reply.known
    endpoint.complete = len(warm.logprobs) >= endpoint.spelling.n_vocab
    _check_tokenizer(endpoint, ids, warm)
    endpoint.offer = replace(endpoint.offer, lists=_answers_lists(endpoint, ids, warm))
    if bias:
        endpoint.offer = replace(endpoint.offer, biased=_takes_bias(endpoint, ids, warm))
    endpoint.offer = replace(endpoint.offer, scores=_scores_text(endpoint, ids, warm))
    if endpoint.offer.words and endpoint.offer.echoes:
        endpoint.offer = replace(endpoint.offer, named=_scores_by_name(endpoint, ids, warm))


def _first(endpoint: Endpoint, ids: Sequence[int]) -> Reply:
    """The first good reply; it also shows which kind of request the server takes."""
    server, n = endpoint.base.server, endpoint.n
    plain = Offer(ids=True)
    extended = replace(plain, words=True)
    offers = [plain] if server in ("openai", "llama.cpp") else [extended, plain]
    tried = [(offer, k) for k in (n, *(limit for limit in LIMITS if limit < n)) for offer in offers]
    tried += [(replace(plain, ids=False), k) for k in (n, *(limit for limit in LIMITS if limit < n))]
    refusal: Refused | None = None
    for offer, k in tried:
        endpoint.offer, endpoint.n = offer, k
        try:
            reply = endpoint.ask([ids], k)[0]
        except Refused as error:
            refusal = refusal or error
            continue
        except NoGoodReply as error:
            raise _gives_none(endpoint) if isinstance(error.__cause__, NoLogprobs) else error from None
        endpoint.offer = replace(offer, numbered=reply.numbered, echoes=reply.echoes)
        return reply
    raise MemberError(f"the server of the base {endpoint.name} refuses to be asked: {refusal}") from refusal


def _gives_none(endpoint: Endpoint) -> MemberError:
    return MemberError(f"the server of the base {endpoint.name} gives no log-probabilities; steering needs them")


def same(one: Known, other: Known) -> bool:
    """Whether two replies have the same log-probabilities."""
    common = one.logprobs.keys() & other.logprobs.keys()
    return bool(common) and all(abs(one.logprobs[index] - other.logprobs[index]) < TOO_FAR for index in common)


def _refuse_strange(endpoint: Endpoint, reply: Reply) -> None:
    """Raise :class:`VocabularyError` for tokens that the declared tokenizer does not have."""
    if strange := [token for token, (meant, _) in zip(reply.tokens, reply.entries) if not meant]:
        raise VocabularyError(
            f"the server of the base {endpoint.name} has tokens that the tokenizer {endpoint.base.tokenizer!r} lacks: "
            f"{', '.join(map(repr, strange[:3]))}; name the tokenizer of the server's model"
        )


def _check_tokenizer(endpoint: Endpoint, ids: Sequence[int], known: Known) -> None:
    """Send a text, and compare the reply with what is ``known`` after the same text as ids.

    Raises:
        VocabularyError: names the first token that the server reads differently.
    """
    start = endpoint.tokenizer("")["input_ids"]  # what the tokenizer puts before a text, and a server may not
    own = endpoint.tokenized(SAMPLE)
    if own is not None:
        own = own[len(start) :] if own[: len(start)] == start else own
        endpoint.same_tokenizer = own == ids[len(start) :]
        if not endpoint.same_tokenizer:
            pairs = enumerate(zip([*own, None], [*ids[len(start) :], None]))
            raise _unlike(endpoint, ids, len(start) + next(at for at, (one, other) in pairs if one != other))
        return
    if not endpoint.offer.ids:
        return  # ids and texts cannot be compared there; the number of tokens is, at each request

    n_compared = min(endpoint.n, ENOUGH)

    def agrees(n: int) -> bool | None:
        text = endpoint.shown(ids[len(start) : n], "whole")
        by_text = endpoint.ask_text(text, n_compared)
        if by_text is None:
            return None
        if same(by_text, known if n == len(ids) else endpoint.ask([ids[:n]], n_compared)[0].known):
            return True
        return bool(start) and same(by_text, endpoint.ask([ids[len(start) : n]], n_compared)[0].known)

    agreed = agrees(len(ids))
    endpoint.same_tokenizer = agreed
    if agreed is not False:
        return
    low, high = len(start), len(ids)  # the first low ids are read the same, the first high are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if agrees(middle) else (low, middle)
    raise _unlike(endpoint, ids, high - 1)


def _unlike(endpoint: Endpoint, ids: Sequence[int], at: int) -> VocabularyError:
    """The error for a server that reads another token at place ``at`` of these ids."""
    at = min(at, len(ids) - 1)
    return VocabularyError(
        f"the server of the base {endpoint.name} reads text otherwise than the tokenizer {endpoint.base.tokenizer!r}, "
        f"first at {endpoint.shown([ids[at]], 'whole')!r} (id {ids[at]}); name the tokenizer of the server's model"
    )


def _answers_lists(endpoint: Endpoint, ids: Sequence[int], known: Known) -> bool:
    """Whether the server answers several prompts in one request."""
    endpoint.offer = replace(endpoint.offer, lists=True)
    try:
        replies = endpoint.ask([ids[:-1], ids], min(endpoint.n, ENOUGH), tries=TRIES)
    except (Refused, NoGoodReply):
        return False
    return same(replies[1].known, known) and not same(replies[0].known, known)


def _scores_text(endpoint: Endpoint, ids: Sequence[int], known: Known) -> bool:
    """Whether the server scores the places of a given text, with the numbers of its plain replies."""
    if not endpoint.offer.ids:
        return False
    n = min(endpoint.n, ENOUGH)
    try:
        before, last = (reply.known for reply in endpoint.ask([ids], n, tries=TRIES, n_places=2))
        plain = endpoint.ask([ids[:-1]], n, tries=TRIES)[0].known
    except (Refused, NoGoodReply):
        return False
    return same(last, known) and same(before, plain)


def _scores_by_name(endpoint: Endpoint, ids: Sequence[int], known: Known) -> bool:
    """Whether the server scores the ids that a request names (vLLM's ``logprob_token_ids``)."""
    some = sorted(known.logprobs)[:2]
    try:
        named = endpoint.of_ids(ids, some)
    except (Refused, NoGoodReply, KeyError):
        return False
    return all(abs(named[index] - known.logprobs[index]) < TOO_FAR for index in some)


def _takes_bias(endpoint: Endpoint, ids: Sequence[int], known: Known) -> int:
    """How many tokens a request can push by fractions; 0 if that has not the right effect.

    The second most probable token is pushed to 0.25 above the first, and to 0.25 below it. So is one of a pair of which
    the prompt has one: a server that holds back what was said before would choose otherwise.
    """
    first, second, *_ = ranked(known)
    n_vocab = endpoint.spelling.n_vocab
    for n in (n_vocab, *(limit for limit in BIASES if limit < n_vocab)):
        try:
            fits = _moves(endpoint, ids, known, first, second, n)
        except (Refused, NoGoodReply):
            continue
        if not fits:
            return 0
        longer = [*ids, *ranked(known)[:5]]
        after = endpoint.ask([longer], endpoint.n)[0].known
        said = set(longer)
        old, new = (next((one for one in ranked(after) if (one in said) is old), None) for old in (True, False))
        if old is None or new is None:
            return n
        return n if _moves(endpoint, longer, after, old, new, n) else 0
    return 0


def ranked(known: Known) -> list[int]:
    """The known tokens, the most probable one first."""
    return sorted(known.logprobs, key=lambda index: -known.logprobs[index])


def _moves(endpoint: Endpoint, text: Sequence[int], known: Known, first: int, second: int, n: int) -> bool:
    """Whether a bias of ``n`` entries makes the server choose what it should: one of two tokens, pushed to the top."""
    top = max(known.logprobs[ranked(known)[0]], known.bound)
    idle = {str(index): 0.0 for index in range(endpoint.spelling.n_vocab) if index not in (first, second)}
    padding = dict(list(idle.items())[: max(n - 2, 0)])
    lifted = {str(first): top - known.logprobs[first] + 1.0}
    chosen = [
        endpoint.chosen(text, {**padding, **lifted, str(second): top - known.logprobs[second] + 1.0 + more})
        for more in (0.25, -0.25)
    ]
    return chosen == [second, first]


def _under_bias(endpoint: Endpoint, ids: Sequence[int], known: Known) -> str:
    """Whether log-probabilities are those ``before`` or ``after`` the bias."""
    index = ranked(known)[1]
    plain = known.logprobs[index]
    bias = known.logprobs[ranked(known)[0]] - plain + 1.0
    found = endpoint.pushed(ids, {str(index): bias}).logprob
    if found is None:
        return "not known"
    after = plain + bias - math.log1p(math.exp(plain) * math.expm1(bias))
    near = [word for word, value in (("before", plain), ("after", after)) if abs(found - value) < TOO_FAR]
    return near[0] if len(near) == 1 else "not known"


def _at_end(endpoint: Endpoint, ids: Sequence[int]) -> str:
    """What a reply says where the server chooses the end token."""
    end = endpoint.tokenizer.eos_token_id
    if end is None or end >= endpoint.spelling.n_vocab:
        return "not known"
    reply = endpoint.pushed(ids, {str(end): MOST_BIAS})
    if end not in reply.drawn:
        return "another token"
    return "the token and its log-probabilities" if reply.logprob is not None else "that the text ends, and no more"


def _caches(endpoint: Endpoint, ids: Sequence[int]) -> bool | None:
    """Whether the server reads a prompt faster that it has just read; None if its replies do not say."""
    for _ in range(2):
        endpoint.ask([list(ids) * 4], 1)  # longer than the blocks in which caches are kept
    return None if endpoint.cached is None else endpoint.cached > 0


def findings(endpoint: Endpoint) -> dict[str, Any]:
    """What a server can do and what it sees, by name, for people. A few more requests are made.

    A server that cannot be pushed is not asked what comes under a bias.
    """
    offer = endpoint.offer
    ids = list(endpoint.tokenizer(SAMPLE)["input_ids"])
    under, end = "not known", "not known"
    if offer.biased:
        under = _under_bias(endpoint, ids, endpoint.ask([ids], endpoint.n)[0].known)
        end = _at_end(endpoint, ids)
    sees = "the prompt and the answer so far, at each request"
    return {
        "answers as": endpoint.model,
        "log-probabilities of a token": endpoint.n,
        "names all tokens": endpoint.complete,
        "takes token ids": offer.ids,
        "writes token ids": offer.numbered,
        "several prompts in one request": offer.lists,
        "scores given text": offer.scores,
        "scores tokens by name": offer.named,
        "tokens that a request can push": offer.biased,
        "its log-probabilities are before or after what is pushed": under,
        "at an end token it returns": end,
        "says which prompt it read": offer.echoes or offer.offsets is not None,
        "temperature of its log-probabilities": offer.temperature,
        "reads text as the declared tokenizer": known_or_not(endpoint.same_tokenizer),
        "keeps prompts that it has read (prefix cache)": known_or_not(_caches(endpoint, ids)),
        "it sees": sees
        + (", and the ids of tokens that steering could choose" if offer.named else "")
        + ("; with push the offsets too" if offer.biased else ""),
    }


def known_or_not(value: bool | None) -> bool | str:
    """A finding, for people."""
    return "not known" if value is None else value
