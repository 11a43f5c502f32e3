"""A base behind an API: a lane whose scores another machine computes, and returns only for the most probable tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.decoding.certificate import known_ids
from proxytune.decoding.cost import Cost
from proxytune.decoding.lane import Scores
from proxytune.errors import MemberError, ProxyTuneError
from proxytune.lanes.completions import Drawn, Endpoint, Known
from proxytune.lanes.texts import TextState
from proxytune.recipe.layout import Seat
from proxytune.recipe.options import WAYS, Way
from proxytune.recipe.parts import ApiBase, Prompt

__all__ = ["RemoteLane", "RemoteState", "chosen_way"]

# What a request costs, as the bytes of weights that could be read in that time: far more than any local pass. A further
# prefix in it costs the server a token that it reads from its prefix cache.
REQUEST = Cost(2e10, 1e9)


def chosen_way(asked: str, endpoint: Endpoint) -> Way:
    """The way to ask a base: ``auto`` takes the first that its server offers.

    Raises:
        ProxyTuneError: for an unknown way, or one that the server does not offer.
    """
    if asked != "auto" and asked not in WAYS:
        raise ProxyTuneError(f"there is no way {asked!r}; there are auto, {', '.join(WAYS)}")
    verifies = endpoint.offer.lists or endpoint.offer.scores
    if asked == "verify" and not verifies:
        raise ProxyTuneError(
            "the base's server answers one prompt in a request and does not score given text, so drafts cannot be "
            "verified there"
        )
    if asked == "push" and not endpoint.offer.biased:
        raise ProxyTuneError("the base's server takes no fractions as logit_bias, so offsets cannot be pushed there")
    if asked != "auto":
        return asked  # type: ignore[return-value]
    return "verify" if verifies else "ask"


class RemoteLane(nn.Module):
    """A base that an API serves. It has no weights here, and never samples from a distribution that it does not know.

    Attributes:
        way: ``pull`` asks for the top k after each token, ``ask`` asks again if that does not decide the choice,
            ``verify`` asks for all drafts of a step in one request, ``push`` sends what steering adds and lets the
            server choose.
        sample_named: whether tokens may be drawn from those that the server names, with a bound on the difference.
    """

    model: Any = None
    adapted: Any = None
    compiled = changed = packed = narrow = False
    tolerance = 1e-3
    context: int | None = None
    device = torch.device("cpu")
    quick_head = None
    read_bytes = 0
    cost = REQUEST
    head_cost: Cost | None = None

    def __init__(
        self, base: ApiBase, endpoint: Endpoint, n_vocab: int, way: str = "auto", *, sample_named: bool = False
    ) -> None:
        super().__init__()
        self.sample_named = sample_named
        self.source, self.endpoint, self.n_vocab = base, endpoint, n_vocab
        self.seats = (Seat(("base",), Prompt()),)
        self.way = chosen_way(way, endpoint)
        self.complete = endpoint.complete and self.way != "push"  # its replies to a push hold no log-probabilities

    def open(self, n_batch: int, capacity: int | None = None) -> RemoteState:
        return RemoteState(self, n_batch)  # a list has room for any number of columns

    def alone(self, name: str) -> Any:
        """Refused: there is no model here."""
        raise MemberError(f"{name} runs behind an API ({self.source.api}), so its model is not on this machine")

    def prepare_drafts(self) -> None:
        """Nothing: it never drafts."""

    def forward(self, **inputs: Any) -> Tensor:
        raise ProxyTuneError(
            "a base behind an API can be read only by generate() and without gradients, so not in training"
        )


class RemoteState(TextState):
    """The texts that a :class:`RemoteLane` has read, and its server's replies.

    Attributes:
        calls: the number of requests per row.
    """

    def __init__(self, lane: RemoteLane, n_batch: int) -> None:
        super().__init__(1, n_batch)
        self.lane = lane
        self.known: dict[tuple[int, int], Known] = {}  # row, and how many pending columns stand before the position
        self.calls = [Count() for _ in range(n_batch)]
        self.awaited: Awaited | None = None  # what was asked last, if nobody has looked at it yet
        self.drawn: tuple[Callable[[], Drawn], int] | None = None  # the first row's last request and token

    def read(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: int = 0, want: Tensor | None = None
    ) -> Scores:
        """See :class:`proxytune.decoding.lane.LaneState`. Each row is one request, whatever its positions.

        The requests are on their way when this returns. Other lanes compute meanwhile, until the scores are looked at.
        """
        self._settle()
        self.take(ids, mask)
        k, endpoint = ids.shape[1], self.lane.endpoint
        start = len(self.pending) - (min(positions, k) or k) + 1
        places = range(start, len(self.pending) + 1)
        if self.lane.way == "push":  # it is asked once the offsets are known
            self.known.update({(row, ahead): Known({}, 0.0) for row in range(self.n_batch) for ahead in places})
            return self._scores(start, len(places))

        texts = [[self.text(row, ahead) for ahead in places] for row in range(self.n_batch)]

        def ask(row: int) -> list[Known]:
            text = texts[row][-1]
            lengths = list(map(len, texts[row]))  # a padded column adds nothing
            n_asked = len({n for n in lengths if n})  # before its first token there is nothing to ask for a row
            found, n_calls = endpoint.along(text, n_asked, endpoint.n)
            self.calls[row].n += n_calls
            return [found[n - len(text) - 1] if n else Known({}, 0.0) for n in lengths]

        wait = endpoint.begin(ask, range(self.n_batch))

        def scores_of_replies() -> Scores:
            for row, found in enumerate(wait()):
                self.known.update({(row, ahead): known for ahead, known in zip(places, found)})
            return self._scores(start, len(places))

        scores = self.awaited = Awaited(scores_of_replies)
        if want is None:
            return scores
        rivals = torch.zeros(self.n_batch, len(places), self.lane.n_vocab, dtype=torch.bool)
        rivals[..., want] = True
        return self.ask(start, rivals & ~known_ids(scores, self.lane.n_vocab)) or scores

    def ask(self, start: int, rivals: Tensor) -> Scores | None:
        """Ask for more at positions at which some of ``rivals`` must be known; None if the server returns nothing more.

        Args:
            start: how many of the pending columns stand before the first position.
            rivals: shape = (n_batch, n_positions, n_vocab), bool.
        """
        self._settle()
        endpoint = self.lane.endpoint
        places = [(row, start + at) for row, at in rivals.any(dim=-1).nonzero().tolist()]

        def more(place: tuple[int, int]) -> Known | None:
            row, ahead = place
            self.calls[row].n += 1
            if self.known[place].asked == 0:  # nothing was asked yet
                return endpoint.top([self.text(row, ahead)], endpoint.n)[0]
            wanted = rivals[row, ahead - start].nonzero()[:, 0].tolist()
            return endpoint.more(self.text(row, ahead), self.known[place], wanted)

        found = dict(zip(places, endpoint.each(more, places) if places else []))
        self.known.update({place: known for place, known in found.items() if known is not None})
        return self._scores(start, rivals.shape[1]) if any(found.values()) else None

    def again(self) -> Callable[[], None]:
        """A function that asks about the first row's text again, and raises an error if the reply differs."""
        self._settle()
        text, known, calls, drawn = self.text(0, 0), self.known[0, 0], self.calls[0], self.drawn

        def ask() -> None:
            calls.n += 1
            if drawn is not None:
                self.lane.endpoint.confirm_drawn(*drawn)
            else:
                self.lane.endpoint.confirm(text, known)

        return ask

    def draw(self, start: int, offsets: Tensor, likely: Tensor) -> Callable[[], list[int | None]]:
        """See :class:`proxytune.decoding.lane.AskedState`. A few tokens are pushed first, then as many as possible."""
        endpoint = self.lane.endpoint

        def drawn(row: int) -> int | None:
            text, named = self.text(row, start), likely[row]
            for n in endpoint.pushes:
                self.calls[row].n += 1
                choose = partial(endpoint.drawn, text, offsets[row], named, n)
                token, sure = choose()
                if sure:
                    break
                if token is not None:
                    named = named.index_fill(0, torch.tensor([token]), torch.inf)
            if row == 0:
                self.drawn = (choose, token) if sure and token is not None else None
            return token if sure else None

        return endpoint.begin(drawn, range(self.n_batch))

    def behind(self, start: int, n_positions: int) -> Tensor:
        """See :class:`proxytune.decoding.lane.AskedState`."""
        columns = [[token for (token,) in column] for column in self.pending[start : start + n_positions]]
        columns += [[-1] * self.n_batch] * (n_positions - len(columns))
        return torch.tensor(columns).T

    def _scores(self, start: int, n_positions: int) -> Scores:
        """The known scores at some positions."""
        rows = [[self.known[row, start + at] for at in range(n_positions)] for row in range(self.n_batch)]
        width = max((len(known.logprobs) for row in rows for known in row), default=0)
        ids = torch.full((self.n_batch, n_positions, width), -1)
        values = torch.full(ids.shape, -torch.inf)
        bound = torch.zeros(self.n_batch, n_positions)
        for at, row in enumerate(rows):
            for j, known in enumerate(row):
                n = len(known.logprobs)
                ids[at, j, :n] = torch.tensor(list(known.logprobs), dtype=torch.long)
                values[at, j, :n] = torch.tensor(list(known.logprobs.values()))
                bound[at, j] = known.bound
        return Scores(values, ids, bound)

    def _settle(self) -> None:
        """Wait for the replies that are on their way."""
        if self.awaited is not None:
            self.awaited.values  # noqa: B018
            self.awaited = None

    def keep(self, counts: Sequence[int] | None = None) -> None:
        self._settle()
        kept = [len(self.pending)] * self.n_batch if counts is None else counts
        super().keep(counts)
        last = {row: self.known.get((row, n)) for row, n in enumerate(kept)}
        self.known = {(row, 0): known for row, known in last.items() if known is not None}

    def crop(self, n_columns: int) -> None:
        self._settle()
        super().crop(n_columns)
        self.known = {}

    def select(self, rows: Tensor) -> None:
        self._settle()
        super().select(rows)
        chosen = rows.tolist()
        self.calls = [self.calls[row] for row in chosen]
        self.known = {
            (at, ahead): known
            for at, old in enumerate(chosen)
            for (row, ahead), known in self.known.items()
            if row == old
        }


class Awaited(Scores):
    """Scores that are still to come: whoever looks at them first waits."""

    def __init__(self, wait: Callable[[], Scores]) -> None:
        object.__setattr__(self, "wait", cache(wait))

    values = property(lambda self: self.wait().values)  # type: ignore[assignment]
    ids = property(lambda self: self.wait().ids)  # type: ignore[assignment]
    bound = property(lambda self: self.wait().bound)  # type: ignore[assignment]


class Count:
    """A number that stays with its row."""

    def __init__(self) -> None:
        self.n = 0
