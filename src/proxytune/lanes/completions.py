"""A server with OpenAI's completions route: the requests, and what its replies prove.

Each request asks for one token after one prompt, or after each of several, with the log-probabilities of the most
probable tokens. Everything in a reply that can be checked is checked. If a reply contradicts itself or the request, the
request is repeated; after some tries the run ends.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from proxytune.decoding.certificate import biases
from proxytune.errors import MemberError, ProxyTuneError, Unfinished, need
from proxytune.lanes.spelling import Spelling
from proxytune.recipe.parts import ApiBase

__all__ = [
    "TOO_FAR",
    "BadReply",
    "Budget",
    "Drawn",
    "Endpoint",
    "Known",
    "NoGoodReply",
    "Offer",
    "Refused",
    "Reply",
    "known_of",
]

RETRIES = 6  # of a request that failed, and of one whose reply is wrong
TIMEOUT = 60.0  # seconds
PAUSE = 0.2  # seconds before a wrong reply is asked for again; it doubles
AT_ONCE = 8  # requests under way
MOST_BIAS = 100.0  # of one token
FEW_BIASES = 1_000  # tokens that are pushed first: 1 MB less to send than for a vocabulary of 50,000
FEW_TIMES = 2  # so often; the second time with the token that won though it was not among them
MOST_IDS = 128  # that vLLM scores by name in one request
MOST_SCORED = 10_000  # log-probabilities in one reply up to which a text is scored as a whole
NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0}  # a server may have others as its defaults
NEUTRAL_WORDS = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}  # of vLLM, of llama.cpp
MISSING = -9998.0  # at and below it a log-probability stands for "not known"
ROUNDING = 1e-4  # how far the probabilities in a reply may be off, all together
TOO_FAR = 1e-2  # log-probabilities of one token and one prompt, asked for in two ways, that lie farther apart differ
MOVES = 0.5  # how far half precision in other batches may move the log-probability of a token

Entry = tuple[tuple[int, ...], float]  # the ids that it can mean, and its log-probability
Drawn = tuple[int | None, bool]  # see `Endpoint.drawn`
T = TypeVar("T")


class BadReply(Exception):
    """A reply that contradicts itself or the request."""


class NoLogprobs(BadReply):
    """A reply without log-probabilities."""


class Refused(Exception):
    """The server rejects a request (status 4xx)."""


class NoGoodReply(ProxyTuneError):
    """All replies to a request were wrong."""


@dataclass(frozen=True)
class Known:
    """What a reply proves about the token after a text.

    Attributes:
        logprobs: id -> log-probability, for the ids that are certain.
        bound: no other id has a larger log-probability.
        asked: how many log-probabilities the request asked for.
    """

    logprobs: dict[int, float]
    bound: float
    asked: int = 0


@dataclass(frozen=True)
class Offer:
    """What a server can do, found out by trying.

    Attributes:
        ids: it takes token ids as the prompt; otherwise texts. lists: it answers several prompts in one request.
        words: it takes words that only vLLM knows, or leaves them unread. numbered: it writes tokens as ids.
        named: it scores the ids that a request names (vLLM's ``logprob_token_ids``).
        echoes: it returns the prompt that it read, as ids. temperature: the temperature at which its log-probabilities
            are the model's own.
        scores: it returns log-probabilities at each place of the prompt (``echo``).
        biased: how many tokens a request can push up or down by fractions (``logit_bias``); 0: none, or not tried.
        offsets: it returns the length of the prompt's text, with special tokens (``whole``) or without (``plain``).
    """

    ids: bool
    lists: bool = False
    words: bool = False
    numbered: bool = False
    named: bool = False
    echoes: bool = False
    temperature: float = 0.0
    scores: bool = False
    biased: int = 0
    offsets: Literal["whole", "plain"] | None = None


@dataclass
class Budget:
    """The limits of a run's requests to a server, and what was used so far.

    Attributes:
        max_calls, max_tokens: requests, and tokens in prompts and answers; None: any number.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    calls: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.spent: str | None = None  # why nothing more is asked

    def take(self, tokens: int) -> None:
        """Count one request with so many tokens.

        Raises:
            Unfinished: if that exceeds a limit; it is then not counted. So does each later request, however short.
        """
        with self.lock:
            if self.spent is not None:
                raise Unfinished(self.spent)
            for what, used, most, flag in (
                ("requests", self.calls + 1, self.max_calls, "--max-calls"),
                ("tokens", self.tokens + tokens, self.max_tokens, "--max-tokens"),
            ):
                if most is not None and used > most:
                    self.spent = f"the budget of {most} {what} ({flag}) is spent"
                    raise Unfinished(self.spent)
            self.calls, self.tokens = self.calls + 1, self.tokens + tokens


def known_of(entries: Sequence[Entry], asked: int, given: float | None = None) -> Known:
    """What a list of log-probabilities proves.

    An id outside the list has at most the probability that the list leaves over, and, if the list is the true top k, at
    most the k-th largest one. An entry that can mean several ids may be any of them, and a list that is keyed by text
    may lack other ids with the same text.

    Args:
        entries: in any order. asked: how many log-probabilities the request asked for.
        given: the log-probability of the token that the server drew, if it need not be among the top k.

    Raises:
        BadReply: if these cannot be log-probabilities of one distribution.
    """
    usable = [(ids, value) for ids, value in entries if not math.isnan(value) and value > MISSING]
    if any(value > ROUNDING for _, value in usable):
        raise BadReply("it has a log-probability above 0")
    mass = math.fsum(math.exp(value) for _, value in usable)
    if mass > 1 + 10 * ROUNDING:
        raise BadReply(f"its probabilities sum to {mass:.3f}")
    if len(usable) > asked + 1:
        raise BadReply(f"it has {len(usable)} log-probabilities where {asked} were asked for")
    rest = math.log(max(1 - mass, 0.0) + ROUNDING)
    ordered = sorted((value for _, value in usable), reverse=True)
    bound = rest
    if len(ordered) == asked + 1:  # one more: the drawn token lies below the top k
        if given is not None and given > ordered[-1] + ROUNDING:
            raise BadReply(f"it has {len(ordered)} log-probabilities, and the token that it drew is not the last")
        bound = min(rest, ordered[-2])
    elif len(ordered) == asked:
        lowest = ordered[-1]
        if given is not None and given <= lowest + ROUNDING:  # it may have taken the place of the k-th
            lowest = ordered[-2] if asked > 1 else 0.0
        bound = min(rest, lowest)
    logprobs: dict[int, float] = {}
    for ids, value in usable:
        if len(ids) != 1:
            bound = max(bound, value, rest)
        elif ids[0] in logprobs:
            raise BadReply(f"it has token {ids[0]} twice")
        else:
            logprobs[ids[0]] = value
    return Known(logprobs, min(bound, 0.0), asked)


class Endpoint:
    """The server of a base, asked through the official client; lanes.probing finds out what it can do.

    Attributes:
        n: how many log-probabilities each request asks for. offer: see :class:`Offer`.

    Raises:
        MemberError: if the server cannot be used. ProxyTuneError: if it keeps failing, or a budget is spent.
    """

    def __init__(self, base: ApiBase, spelling: Spelling, tokenizer: Any, budget: Budget) -> None:
        need("a base behind an API", "api", "openai")
        import openai

        self.base, self.spelling, self.tokenizer, self.budget = base, spelling, tokenizer, budget
        self.secret = "none"
        if base.key is not None:
            self.secret = os.environ.get(base.key, "").strip()
            if not self.secret:
                raise MemberError(
                    f"the base's API key is read from the environment variable {base.key}, which is empty; set it"
                )
        self.client: Any = openai.OpenAI(
            base_url=base.api,
            api_key=self.secret,
            max_retries=RETRIES,
            timeout=TIMEOUT,
            # What the environment says of an account elsewhere is not for this server.
            default_headers={"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()},  # type: ignore[dict-item]
        )
        self.pool, self.rows = ThreadPoolExecutor(AT_ONCE), ThreadPoolExecutor(AT_ONCE)
        weakref.finalize(self, self.client.close)
        for pool in (self.pool, self.rows):
            weakref.finalize(self, pool.shutdown, wait=False)
        self.model: str | None = None  # as the first reply calls it
        self.given = 0  # log-probabilities that it gave in the first reply
        self.most: int | None = None  # log-probabilities that it gives at most, once it has given fewer than asked
        self.n = base.top_logprobs
        self.offer = Offer(ids=True)
        self.complete = False  # whether it names all tokens
        self.same_tokenizer: bool | None = None  # whether it reads text as the declared tokenizer; None: not known
        self.cached: int | None = None  # tokens that its last reply took from a prefix cache; None: it does not say

    @property
    def name(self) -> str:
        return f"{self.base.model} at {self.base.api}"

    # -- questions ----------------------------------------------------------------------------------------------
    def top(self, texts: Sequence[Sequence[int]], n: int) -> list[Known]:
        """The ``n`` most probable tokens after each of several texts, in one request if the server can do that."""
        if len(texts) > 1 and not self.offer.lists:
            return [known for each in self.each(lambda text: self.top([text], n), texts) for known in each]
        return [reply.known for reply in self._certain(texts, n)]

    def along(self, text: Sequence[int], n_places: int, n: int) -> tuple[list[Known], int]:
        """The ``n`` most probable tokens at the last places of a text, and how many requests that took.

        The last place is behind the text. A server that scores given texts needs one request, unless its reply would
        be too long.
        """
        if self.offer.scores and n_places > 1 and n * len(text) <= MOST_SCORED:
            return [reply.known for reply in self._certain([text], n, n_places)], 1
        texts = [text[: len(text) - ahead] for ahead in range(n_places - 1, -1, -1)]
        return self.top(texts, n), 1 if self.offer.lists else n_places

    def more(self, text: Sequence[int], known: Known, rivals: Sequence[int]) -> Known | None:
        """What is known after a text once the server was also asked for ``rivals``; None if it returns nothing more."""
        if self.offer.named and len(rivals) <= MOST_IDS:
            try:
                return replace(known, logprobs={**known.logprobs, **self.of_ids(text, rivals)})
            except (Refused, KeyError):
                return None
        n = min(4 * known.asked, self.spelling.n_vocab, self.most or self.spelling.n_vocab)
        if n <= known.asked:
            return None
        try:
            found = self.ask([text], n)[0].known
        except Refused:
            self.most = known.asked
            return None
        self._refuse_unlike(alike(known, found))
        if len(found.logprobs) <= len(known.logprobs):
            if len(found.logprobs) >= self.given:  # a limit, and not a short reply
                self.most = known.asked
            return None
        return found

    @property
    def pushes(self) -> Sequence[int]:
        """How many tokens the requests of a push hold; each one is for what the ones before it left open."""
        most = self.offer.biased
        return [FEW_BIASES] * FEW_TIMES + [most] if most > FEW_BIASES else [most]

    def drawn(self, text: Sequence[int], offsets: Tensor, likely: Tensor, n: int) -> Drawn:
        """The token that the server chooses after a text if what steering adds is added to its logits.

        Args:
            offsets, likely, n: the request holds ``n`` tokens, see :func:`proxytune.decoding.certificate.biases`.

        Returns:
            The token, None if the reply does not say which; and whether it is surely the mixture's.

        Raises:
            ProxyTuneError: if the server rejects the request.
        """
        if not bool(offsets.amax() > -math.inf):
            return None, False  # steering excludes all
        ids, added = (tensor.tolist() for tensor in biases(offsets, likely, n, MOST_BIAS))
        exact = {index for index, value in zip(ids, added) if value >= -MOST_BIAS}
        try:
            index = self.chosen(text, {str(index): max(value, -MOST_BIAS) for index, value in zip(ids, added)})
        except Refused as error:
            raise ProxyTuneError(f"the server of the base {self.name} refuses: {error}") from error
        return index, index in exact

    def chosen(self, text: Sequence[int], bias: dict[str, float]) -> int | None:
        """The token that the server chooses under a bias; None if its reply does not say which."""
        meant = self.pushed(text, bias).drawn
        return meant[0] if len(meant) == 1 else None

    def pushed(self, text: Sequence[int], bias: dict[str, float]) -> Reply:
        """The reply of the server under a bias. No penalty of its own changes it."""
        return self.ask([text], 1, {"logit_bias": bias, "temperature": 0.0, **NEUTRAL})[0]

    def confirm(self, text: Sequence[int], known: Known) -> None:
        """Repeat an earlier request, because a model may be replaced under the same name.

        Raises:
            ProxyTuneError: if the reply differs.
        """
        self._refuse_unlike(alike(known, self.top([text], known.asked)[0]))

    def confirm_drawn(self, choose: Callable[[], Drawn], token: int) -> None:
        """Like :meth:`confirm`, if the server chose ``token`` before, and is asked by ``choose``."""
        self._refuse_unlike(choose()[0] == token)

    def _refuse_unlike(self, same: bool) -> None:
        if not same:
            raise ProxyTuneError(
                f"the server of the base {self.name} gave two different replies to one prompt; its model was changed, "
                "or its replies belong to other prompts"
            )

    def of_ids(self, text: Sequence[int], ids: Sequence[int]) -> dict[int, float]:
        """The log-probabilities of these ids after a text (vLLM only)."""
        reply = self.ask([text], len(ids), {"logprob_token_ids": list(ids)})[0]
        found = {meant[0]: value for meant, value in reply.entries if len(meant) == 1 and value > MISSING}
        return {index: found[index] for index in ids}

    def each(self, ask: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Call ``ask`` for several items at once."""
        return [ask(items[0])] if len(items) == 1 else list(self.pool.map(ask, items))

    def begin(self, ask: Callable[[Any], T], items: Sequence[Any]) -> Callable[[], list[T]]:
        """Begin to call ``ask`` for several items at once, and return a function that waits for the results.

        It has threads of its own: ``ask`` may call :meth:`each`, whose threads would otherwise wait for themselves.
        """
        begun = [self.rows.submit(ask, item) for item in items]
        return lambda: [each.result() for each in begun]

    def tokenized(self, text: str) -> list[int] | None:
        """A text's ids as the server's own route says (``/tokenize`` of vLLM and llama.cpp); None if it has none."""
        self.budget.take(0)
        body = {"model": self.base.model, "prompt": text, "add_special_tokens": True}
        body |= {"content": text, "add_special": True}
        url = self.base.api.rstrip("/").removesuffix("/v1") + "/tokenize"
        try:
            tokens = self._sent(lambda: self.client.post(url, body=body, cast_to=object))["tokens"]
        except (Refused, KeyError, TypeError):
            return None
        usable = isinstance(tokens, list) and all(isinstance(index, int) for index in tokens)
        return tokens if usable else None

    def _certain(self, texts: Sequence[Sequence[int]], n: int, n_places: int = 1) -> list[Reply]:
        try:
            return self.ask(texts, n, n_places=n_places)
        except Refused as error:
            raise ProxyTuneError(f"the server of the base {self.name} refuses: {error}") from error

    def ask(
        self,
        texts: Sequence[Sequence[int]],
        n: int,
        more: dict[str, Any] | None = None,
        *,
        tries: int = RETRIES,
        n_places: int = 1,
    ) -> list[Reply]:
        """Ask for one token after each text.

        A reply with fewer log-probabilities than the server has given before is asked for again, and accepted if that
        does not help: what it says is true.

        Args:
            n: how many log-probabilities. more: further fields of the request. tries: how often a wrong reply is asked
                for again. n_places: of one text; if more than one, those at its last tokens are asked for as well.

        Raises:
            Refused: if the server rejects the request. NoGoodReply: if every reply was wrong.
        """
        prompts: list[Any] = [list(text) for text in texts] if self.offer.ids else [self._text(text) for text in texts]
        prompt = prompts if len(prompts) > 1 else prompts[0]
        extra = dict(more or {})
        if self.offer.words:
            extra["return_token_ids"] = True
        if n_places > 1:
            extra["echo"] = True
        biased, named = "logit_bias" in extra, extra.get("logprob_token_ids", ())
        least = 0 if biased or named else min(n, self.given)
        for trial in range(tries):
            try:
                value = self._post(prompt, n, sum(map(len, texts)) + len(texts), extra)
                replies = self._read(value, texts, n, biased=biased, n_places=n_places)
                worth = max(reply.tries(least, named) for reply in replies)
                if trial + 1 >= min(worth, tries):
                    return replies
            except BadReply as error:
                reason = error
            time.sleep(min(PAUSE * 2**trial, 5.0) * random.uniform(0.5, 1.5))
        raise NoGoodReply(
            f"the server of the base {self.name} gave {tries} replies that cannot be right: {reason}"
        ) from reason

    def ask_text(self, text: str, n: int) -> Known | None:
        """What is known after a text that the server itself splits into tokens; None if it takes no texts."""
        offer, self.offer = self.offer, replace(self.offer, ids=False, offsets=None, echoes=False)
        try:
            value = self._post(text, n, len(self.tokenizer(text)["input_ids"]) + 1, {})
            return self._read(value, [[]], n)[0].known
        except (Refused, BadReply):
            return None
        finally:
            self.offer = offer

    def _text(self, ids: Sequence[int]) -> str:
        """The text of a prompt, for servers that take no ids; its tokens must be the prompt's."""
        kept = list(ids)
        if self.tokenizer("").get("input_ids") == kept[:1] and kept:  # the server's tokenizer puts it there as well
            kept = kept[1:]
        text = self.shown(kept, "whole")
        if list(self.tokenizer(text)["input_ids"]) != list(ids):
            raise ProxyTuneError(
                f"the server of the base {self.name} takes no token ids, and the text so far would be read as other "
                "tokens; use a server that takes ids"
            )
        return text

    def _post(self, prompt: Any, n: int, tokens: int, extra: dict[str, Any]) -> Any:
        """Send one request for one token with ``n`` log-probabilities; ``tokens`` are counted against the budget."""
        if self.offer.words:
            extra = {**extra, "return_tokens_as_token_ids": True}
        if self.offer.words or self.base.server == "llama.cpp":
            extra = {**extra, **NEUTRAL_WORDS}
        self.budget.take(tokens)
        raw = self._sent(
            lambda: self.client.completions.with_raw_response.create(
                model=self.base.model,
                prompt=prompt,
                max_tokens=1,
                temperature=self.offer.temperature,
                top_p=1.0,
                logprobs=n,
                extra_body=extra or None,
            )
        )
        try:
            return json.loads(raw.http_response.text, object_pairs_hook=_once)
        except ValueError as error:
            raise BadReply("it is not JSON") from error

    def _sent(self, send: Callable[[], Any]) -> Any:
        """What a request returns.

        Raises:
            Refused: if the server rejects it. MemberError: if it rejects the key. ProxyTuneError: if it keeps failing.
        """
        import openai

        try:
            return send()
        except openai.APIStatusError as error:
            said = self._without_secret(str(error.message))
            if error.status_code in (401, 403):
                which = f"in {self.base.key}" if self.base.key else "(the recipe's base names no `key`)"
                raise MemberError(f"the server of the base {self.name} refuses the API key {which}") from None
            if 400 <= error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise Refused(said) from None
            raise ProxyTuneError(
                f"the server of the base {self.name} fails ({error.status_code}) after {RETRIES + 1} tries: {said}"
            ) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise ProxyTuneError(
                f"the server of the base {self.name} does not answer ({cause}) after {RETRIES + 1} tries"
            ) from None

    def _without_secret(self, text: str) -> str:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
        return first if self.base.key is None else first.replace(self.secret, "***")

    # -- replies ------------------------------------------------------------------------------------------------
    def _read(
        self, value: Any, texts: Sequence[Sequence[int]], n: int, *, biased: bool = False, n_places: int = 1
    ) -> list[Reply]:
        """The reply to each text, or to each place of one text, in order. Those under a bias prove nothing.

        Raises:
            BadReply: if it does not answer this request.
        """
        if len(texts) > 1 and isinstance(value, list):  # llama.cpp, in some versions: a whole reply for each prompt
            value = _joined(value)
        if not isinstance(value, dict) or not isinstance(value.get("choices"), list):
            raise BadReply("it has no choices")
        model = value.get("model")
        if self.model is None:
            self.model = str(model)
        elif str(model) != self.model:
            raise ProxyTuneError(
                f"the server of the base {self.name} answered as {self.model!r} first and now as {str(model)!r}; its "
                "model was changed, so the run ends here"
            )
        choices = value["choices"]
        if len(choices) != len(texts) or not all(isinstance(choice, dict) for choice in choices):
            raise BadReply(f"it has {len(choices)} choices for {len(texts)} prompts")
        if len(choices) > 1:
            places = [choice.get("index") for choice in choices]
            if sorted(places, key=str) != sorted(range(len(texts)), key=str):
                raise BadReply(f"its choices are numbered {places}")
            choices = sorted(choices, key=lambda choice: choice["index"])
        usage = value.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        # In some versions llama.cpp says of a list how long its first prompt was.
        if self.offer.ids and read and read not in (sum(map(len, texts)), len(texts[0])):
            raise BadReply(f"the server read {read} tokens where {sum(map(len, texts))} were sent")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        self.cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return [
            reply
            for choice, text in zip(choices, texts)
            for reply in self._choice(choice, text, n, biased=biased, n_places=n_places)
        ]

    def _choice(
        self, choice: dict[str, Any], text: Sequence[int], n: int, *, biased: bool, n_places: int
    ) -> list[Reply]:
        """The reply at each place of a text."""
        echoed = choice.get("prompt_token_ids")
        if echoed is None and self.offer.echoes and self.given:
            raise BadReply("it does not say which prompt it is for")
        if echoed is not None and self.offer.ids and echoed != list(text):
            raise BadReply("it is the reply to another prompt")
        tokens, values, tops = _columns(choice.get("logprobs"))
        if n_places > 1:
            if not all(index in self._meant(token) for index, token in zip(text, tokens)) or len(tokens) < len(text):
                raise BadReply("it scores another text")
            shown = len(text) - n_places + 1
            tokens, values, tops = tokens[shown:], values[shown:], tops[shown:]
        ended: list[Reply] = []
        if len(tokens) == n_places - 1 and choice.get("finish_reason") == "stop":
            end = self.tokenizer.eos_token_id  # an end token, of which the server says no more
            known = Known({} if end is None else {end: 0.0}, 0.0, n)
            ended = [Reply(known, [], [], False, echoed is not None, drawn=() if end is None else (end,), ended=True)]
        elif not tokens:
            raise NoLogprobs("it has no log-probabilities")
        if not len(tokens) == len(values) == len(tops) == n_places - len(ended):
            raise BadReply(f"it has log-probabilities of {len(tokens)} tokens where {n_places} were asked for")
        offset = None if n_places > 1 or ended else _offset(choice["logprobs"])
        how = self.offer.offsets
        if how is not None and n_places == 1 and not ended and offset != len(self.shown(text, how)):
            raise BadReply(f"the server read a prompt of {offset} characters, which is another one")
        base = Reply(Known({}, 0.0, n), [], [], False, echoed is not None, offset)
        base = replace(base, ended=choice.get("finish_reason") == "stop")
        if biased:
            return ended or [replace(base, drawn=self._meant(tokens[0]), logprob=values[0])]
        places = zip(tokens, values, tops)
        drawn_at = n_places - 1  # the other tokens are given, and need not be the most probable
        return [self._place(base, *one, n, drawn=at == drawn_at) for at, one in enumerate(places)] + ended

    def _place(
        self, base: Reply, token: Any, value: Any, top: list[tuple[Any, float]], n: int, *, drawn: bool
    ) -> Reply:
        """What a reply says at one place, where the server drew a token or the text has one."""
        if not top:
            return base
        entries = [(self._meant(other), logprob) for other, logprob in top]
        own = self._meant(token)
        if not isinstance(value, float) or math.isnan(value):
            raise BadReply("the token that it drew has no log-probability")
        at = [logprob for meant, logprob in entries if meant == own]
        if at and all(abs(logprob - value) > ROUNDING for logprob in at):
            if len(own) == 1:
                raise BadReply("the token that it drew has two log-probabilities")
            at = []  # a text of several ids, of which the list has another one
        best = max((logprob for _, logprob in top if not math.isnan(logprob)), default=-math.inf)
        if drawn and self.offer.temperature == 0 and value < best - ROUNDING:
            raise BadReply("the token that it drew is not the most probable one")
        if not at:
            entries.append((own, value))
        given = None if drawn and self.offer.temperature == 0 else value
        return replace(
            base,
            known=known_of(entries, n, given),
            entries=entries,
            tokens=[other for other, _ in top],
            numbered=all(isinstance(other, str) and other.startswith("token_id:") for other, _ in top),
        )

    def shown(self, ids: Sequence[int], how: str) -> str:
        """The text of ids, with special tokens (``whole``) or without (``plain``)."""
        plain = how == "plain"
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=plain, clean_up_tokenization_spaces=False))

    def _meant(self, token: Any) -> tuple[int, ...]:
        return self.spelling.meant(token) if isinstance(token, str) else tuple(token)


@dataclass(frozen=True)
class Reply:
    """One choice of a reply, parsed.

    Attributes:
        known: what it proves. entries: see :data:`Entry`. tokens: the tokens as the server wrote them.
        numbered: whether these are ids. echoes: whether it returned the prompt. offset: where its token begins.
        drawn: the ids that the chosen token can mean, if there was a bias. logprob: its log-probability then.
        ended: whether the server says that the text ends.
    """

    known: Known
    entries: list[Entry]
    tokens: list[Any]
    numbered: bool
    echoes: bool
    offset: int | None = None
    drawn: tuple[int, ...] = ()
    logprob: float | None = None
    ended: bool = False

    def tries(self, least: int, named: Sequence[int]) -> int:
        """How many tries it is worth to get ``least`` log-probabilities, those of ``named`` among them.

        vLLM fills the reply to one request with tokens at -inf if another request in the same batch names ids. That
        passes. Other short replies usually stay short, because two tokens have the same text.
        """
        usable = [(meant, value) for meant, value in self.entries if value > MISSING]
        enough = len(usable) >= least and {(index,) for index in named} <= {meant for meant, _ in usable}
        if enough or math.fsum(math.exp(value) for _, value in usable) > 1 - TOO_FAR:
            return 1
        return RETRIES if len(usable) < len(self.entries) else 2


def alike(one: Known, other: Known) -> bool:
    """Whether two replies to one prompt can come from one model, whose rounding may differ from call to call."""
    common = one.logprobs.keys() & other.logprobs.keys()
    far = sum(abs(one.logprobs[index] - other.logprobs[index]) > MOVES for index in common)
    # A short reply may lack tokens, but none above its own bound.
    lost = sum(
        value > second.bound + MOVES
        for first, second in ((one, other), (other, one))
        for index, value in first.logprobs.items()
        if index not in common
    )
    whole = all(len(each.logprobs) >= each.asked for each in (one, other))
    least = min(len(one.logprobs), len(other.logprobs)) if whole else 0
    return 2 * len(common) >= least and 2 * (far + lost) <= max(len(common), 1)


def _offset(logprobs: dict[str, Any]) -> int | None:
    """Where the new token begins in the text; None if a reply does not say."""
    offsets = logprobs.get("text_offset")
    return offsets[0] if isinstance(offsets, list) and offsets and isinstance(offsets[0], int) else None


def _joined(parts: list[Any]) -> dict[str, Any]:
    """The replies to several prompts as one reply."""
    if not all(isinstance(part, dict) and isinstance(part.get("choices"), list) for part in parts) or not parts:
        raise BadReply("it has no choices")
    if len({str(part.get("model")) for part in parts}) > 1:
        raise BadReply("it names several models")
    return {**parts[0], "choices": [choice for part in parts for choice in part["choices"]]}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; :class:`ValueError` if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _columns(logprobs: Any) -> tuple[list[Any], list[Any], list[list[tuple[Any, float]]]]:
    """The new tokens, their log-probabilities and the most probable tokens at each place, from OpenAI's two forms."""
    if logprobs is None:
        return [], [], []
    try:
        if "content" in logprobs:  # of the chat route, and of llama.cpp

            def token_of(part: dict[str, Any]) -> Any:
                if "id" in part:
                    return f"token_id:{part['id']}"
                written = part["token"]
                if "\ufffd" in written and part.get("bytes"):  # no text by itself
                    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part["bytes"])
                return written

            parts = logprobs["content"] or []
            tops = [[(token_of(one), float(one["logprob"])) for one in part["top_logprobs"]] for part in parts]
            return [token_of(part) for part in parts], [float(part["logprob"]) for part in parts], tops
        tokens = list(logprobs["tokens"] or [])
        values = [None if value is None else float(value) for value in logprobs["token_logprobs"] or []]
        tops = [
            [] if top is None else [(token, _number(value)) for token, value in top.items()]
            for top in logprobs["top_logprobs"] or [None] * len(tokens)
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadReply("its log-probabilities are not in OpenAI's form") from error
    if not all(isinstance(token, str) for token in tokens):
        raise BadReply("its tokens are not texts")
    return tokens, values, tops


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
