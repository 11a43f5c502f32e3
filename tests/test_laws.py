"""The laws of lanes: whatever runs members keeps them, and the loop and the composite rest on nothing else.

Add a runtime to ``RUNTIMES``: a function that makes a lane of two seats or one.
"""

from __future__ import annotations

from functools import cache
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxytune.decoding.certificate import bounded
from proxytune.decoding.lane import Scores, stacked
from proxytune.lanes.completions import Known
from proxytune.lanes.fake import FakeLane, hashed_logits
from proxytune.lanes.remote import RemoteLane, RemoteState
from proxytune.lanes.transformers import TransformersLane
from proxytune.recipe.layout import Seat
from proxytune.recipe.parts import ApiBase, Prompt
from support import tiny

N_VOCAB = 40
BOTH = (Seat(("a.expert",), Prompt()), Seat(("a.anti_expert",), Prompt()))


def fake():
    seats = [hashed_logits(N_VOCAB, seed) for seed in (1, 2)]
    return FakeLane(seats, [("a.expert",), ("a.anti_expert",)], N_VOCAB)


def llama():
    return TransformersLane(tiny.llama("mini", 3), [BOTH[0]])


def twice():
    """One set of weights under two prompts."""
    return TransformersLane(tiny.llama("mini", 3), BOTH)


def windowed():
    """Layers that keep a few tokens alone."""
    return TransformersLane(tiny.gemma3("mini", 3), [BOTH[0]])


def tabled():
    """Positions that come from a table."""
    return TransformersLane(tiny.gpt2("mini", 3), BOTH)


class Asked:
    """What a server that knows all tokens answers, without the server."""

    n, complete, offer = N_VOCAB, True, SimpleNamespace(lists=True)

    def top(self, texts, n):
        logits = [hashed_logits(N_VOCAB, 1)(text).log_softmax(dim=-1).tolist() for text in texts]
        return [Known(dict(enumerate(row)), -20.0, n) for row in logits]

    def along(self, text, n_places, n):
        return self.top([text[: len(text) - ahead] for ahead in range(n_places - 1, -1, -1)], n), 1

    def each(self, ask, items):
        return [ask(item) for item in items]

    def begin(self, ask, items):
        return lambda: self.each(ask, items)


class Dense(RemoteState):
    """Scores of all tokens in order, as the laws look at them."""

    def read(self, *args, **kwargs):
        scores = super().read(*args, **kwargs)
        return Scores(bounded(scores, N_VOCAB))


def remote():
    """A base behind an API."""
    lane = RemoteLane(ApiBase("m", api="http://h/v1", tokenizer="t"), Asked(), N_VOCAB)
    lane.open = lambda n_batch, capacity=None: Dense(lane, n_batch)
    return lane


RUNTIMES = {each.__name__: cache(each) for each in (fake, llama, twice, windowed, tabled, remote)}
CAPACITIES = {name: [None] if name in ("fake", "remote") else [None, 96] for name in RUNTIMES}


@pytest.fixture(params=[(name, capacity) for name in RUNTIMES for capacity in CAPACITIES[name]], ids=str)
def runtime(request):
    name, capacity = request.param
    return RUNTIMES[name](), capacity


def ids_of(n_rows, n_columns, seed=0):
    return torch.randint(3, N_VOCAB, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fresh(lane, text):
    """The logits after a text, read at once by itself: (n_seats, n_vocab)."""
    return lane.open(1).read(torch.tensor([text]), positions=1).values[:, 0]


def assert_near(lane, found, expected):
    bound = lane.tolerance * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def assert_stands_at(lane, state, texts, probe=5):
    """Reading one more token gives what a fresh state gives for the whole text; it is taken back if it can be."""
    n_batch = len(texts)
    values = state.read(torch.full((n_batch, 1), probe), positions=1).values
    for row, text in enumerate(texts):
        expected = fresh(lane, [*text, probe])
        assert_near(lane, torch.stack([values[seat * n_batch + row, 0] for seat in range(len(expected))]), expected)
    state.keep([0] * n_batch)


def begun(lane, capacity, ids, mask=None):
    """A state that has read and kept a prompt, and may take back what comes."""
    state = lane.open(len(ids), capacity)
    state.read(ids, mask)
    state.keep()
    state.begin_drafts()
    return state


def texts_of(ids, mask=None):
    rows = ids.tolist()
    if mask is None:
        return rows
    return [[token for token, shown in zip(row, own) if shown] for row, own in zip(rows, mask.tolist())]


# -- the laws -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_it_describes_itself(runtime):
    lane, _ = runtime
    assert all(seat.names for seat in lane.seats)
    assert lane.open(2).read(ids_of(2, 3)).values.shape == (2 * len(lane.seats), 3, lane.n_vocab)
    assert lane.complete
    assert lane.context is None or lane.context > 0
    assert lane.cost.of(1) > 0


@torch.no_grad()
def test_a_batch_is_its_rows(runtime):
    lane, capacity = runtime
    ids = ids_of(3, 7)
    assert_stands_at(lane, begun(lane, capacity, ids), ids.tolist())


@torch.no_grad()
def test_seats_may_read_prompts_of_their_own(runtime):
    lane, capacity = runtime
    n_seats = len(lane.seats)
    own, shared = ids_of(2 * n_seats, 4, seed=1), ids_of(2, 3, seed=2)
    state = lane.open(2, capacity)
    state.read(own)
    values = state.read(shared, positions=1).values
    for at, text in enumerate(torch.cat([own, stacked(shared, 2 * n_seats)], dim=1).tolist()):
        assert_near(lane, values[at, 0], fresh(lane, text)[at // 2])


@torch.no_grad()
def test_in_pieces_is_at_once(runtime):
    lane, capacity = runtime
    ids = ids_of(2, 9)
    whole = lane.open(2, capacity).read(ids).values
    state, parts = lane.open(2, capacity), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        parts.append(state.read(ids[:, start:stop]).values)
        if start != 4:
            state.keep()
    assert_near(lane, torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_positions_are_the_last(runtime):
    lane, capacity = runtime
    ids = ids_of(2, 6)
    whole = lane.open(2, capacity).read(ids).values
    assert_near(lane, lane.open(2, capacity).read(ids, positions=2).values, whole[:, -2:])


@pytest.mark.parametrize("name", RUNTIMES)
@torch.no_grad()
def test_a_state_for_one_read_gives_the_same_and_keeps_nothing(name):
    lane = RUNTIMES[name]()
    ids, mask = ids_of(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    state = lane.open(2, 0)
    values = state.read(ids, mask, positions=1).values
    for row, text in enumerate(texts_of(ids, mask)):
        expected = fresh(lane, text)
        assert_near(lane, torch.stack([values[seat * 2 + row, 0] for seat in range(len(expected))]), expected)
    assert not getattr(state, "layers", [])


@torch.no_grad()
def test_left_padding_changes_nothing(runtime):
    lane, capacity = runtime
    ids, mask = ids_of(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    assert_stands_at(lane, begun(lane, capacity, ids, mask), texts_of(ids, mask))
    state = lane.open(2, capacity)  # padding that goes on in a second piece
    state.read(ids[:, :2], mask[:, :2])
    state.read(ids[:, 2:], mask[:, 2:])
    state.keep()
    state.begin_drafts()
    assert_stands_at(lane, state, texts_of(ids, mask))


@torch.no_grad()
@pytest.mark.parametrize("counts", [[2, 2, 2], [0, 0, 0], [1, 3, 0]])
def test_what_is_not_kept_was_never_read(runtime, counts):
    lane, capacity = runtime
    ids, drafts = ids_of(3, 20), ids_of(3, 4, seed=1)
    state = begun(lane, capacity, ids)
    state.read(drafts)
    state.keep(counts)
    texts = [row + own[:n] for row, own, n in zip(ids.tolist(), drafts.tolist(), counts)]
    assert_stands_at(lane, state, texts)
    state.read(drafts)
    state.keep(counts[::-1])
    assert_stands_at(lane, state, [text + own[:n] for text, own, n in zip(texts, drafts.tolist(), counts[::-1])])


@torch.no_grad()
def test_seats_may_keep_unequal_numbers(runtime):
    """Each of the stacked rows has read another text then; a lane of one seat has one row of each batch row."""
    lane, capacity = runtime
    n_seats = len(lane.seats)
    ids, more = ids_of(2, 20), ids_of(2 * n_seats, 4, seed=1)
    state = begun(lane, capacity, ids)
    counts = [(1 + 2 * at) % 5 for at in range(2 * n_seats)]
    state.read(more)
    state.keep(counts)
    newest = torch.tensor([[5]] * 2)
    values = state.read(newest).values[:, -1]
    for row, (own, n) in enumerate(zip(more.tolist(), counts)):
        seat, at = divmod(row, 2)
        assert_near(lane, values[row], fresh(lane, ids[at].tolist() + own[:n] + [5])[seat])


@torch.no_grad()
def test_cropped_is_never_read(runtime):
    lane, capacity = runtime
    ids = ids_of(2, 20)
    state = lane.open(2, capacity)
    state.begin_drafts()
    state.read(ids)
    state.keep()
    state.crop(3)
    assert state.n_columns == 17
    assert_stands_at(lane, state, ids[:, :17].tolist())


@torch.no_grad()
def test_what_lies_beyond_the_room_can_be_read(runtime):
    """Drafts at the end of a text go beyond it, and are thrown away; where positions are a table they end there."""
    lane, capacity = runtime
    room = 2
    limit = lane.context if capacity is None else None  # the static caches here are shorter
    ids = ids_of(2, 10 if limit is None else limit - room)
    state = lane.open(2, capacity)
    state.read(ids)
    state.keep()
    state.begin_drafts(room)
    drafts = ids_of(2, room + 3, seed=1)
    values = state.read(drafts).values[:, room - 1]
    for row, text in enumerate(torch.cat([ids, drafts[:, :room]], dim=1).tolist()):
        assert_near(lane, values[row::2], fresh(lane, text))


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [0, 0, 1, 1, 2, 2], [1]])
def test_rows_are_reordered_repeated_and_left_out(runtime, rows):
    lane, capacity = runtime
    ids, mask = ids_of(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    state = begun(lane, capacity, ids, mask)
    state.select(torch.tensor(rows))
    assert state.n_batch == len(rows)
    texts = texts_of(ids, mask)
    assert_stands_at(lane, state, [texts[row] for row in rows])


@torch.no_grad()
def test_a_finished_row_costs_nothing():
    lane = fake()
    state = begun(lane, None, ids_of(3, 4))
    state.select(torch.tensor([1]))
    before = lane.n_computed
    state.read(ids_of(1, 2), positions=1)
    assert lane.n_computed - before == len(lane.seats)


def test_threads_with_states_of_their_own_do_not_meet(runtime):
    lane, capacity = runtime
    wrong = []

    @torch.no_grad()
    def work(seed):
        ids = ids_of(2, 6, seed)
        expected = [fresh(lane, text) for text in ids.tolist()]
        for _ in range(4):
            state = lane.open(2, capacity)
            state.read(ids[:, :3])
            values = state.read(ids[:, 3:], positions=1).values[:, 0]
            for row, own in enumerate(expected):
                if not torch.allclose(values[row::2], own, atol=1e-3):
                    wrong.append(seed)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- any order of reads, keeps and selections ---------------------------------------------------------------------
class Ragged(RuleBasedStateMachine):
    """What the loop may do to a state, compared with the texts that each row then has."""

    lane = None
    capacity = None

    @initialize(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 10**6))
    def begin(self, lengths, seed):
        ids = ids_of(len(lengths), max(lengths), seed)
        mask = torch.tensor([[int(at >= max(lengths) - n) for at in range(max(lengths))] for n in lengths])
        with torch.no_grad():
            self.state = begun(self.lane, self.capacity, ids, mask)
        self.texts, self.drafts = texts_of(ids, mask), []

    @rule(k=st.integers(1, 4), seed=st.integers(0, 10**6))
    @precondition(lambda self: max(map(len, self.texts)) < 60 and len(self.drafts) < 3)
    def read(self, k, seed):
        ids = ids_of(len(self.texts), k, seed)
        with torch.no_grad():
            values = self.state.read(ids).values
        self.drafts.append(ids)
        n_batch = len(self.texts)
        read = torch.cat(self.drafts, dim=1).tolist()
        for row, text in enumerate(self.texts):
            expected = fresh(self.lane, text + read[row])
            for seat, own in enumerate(expected):
                assert_near(self.lane, values[seat * n_batch + row, -1], own)

    @rule(data=st.data())
    @precondition(lambda self: self.drafts)
    def keep(self, data):
        read = torch.cat(self.drafts, dim=1).tolist()
        counts = data.draw(st.lists(st.integers(0, len(read[0])), min_size=len(read), max_size=len(read)))
        with torch.no_grad():
            self.state.keep(counts)
        self.texts = [text + own[:n] for text, own, n in zip(self.texts, read, counts)]
        self.drafts = []

    @rule(data=st.data())
    @precondition(lambda self: not self.drafts)
    def select(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.texts) - 1), min_size=1, max_size=4))
        with torch.no_grad():
            self.state.select(torch.tensor(rows))
        self.texts = [list(self.texts[row]) for row in rows]

    @invariant()
    def counts_rows(self):
        if hasattr(self, "texts"):
            assert self.state.n_batch == len(self.texts)
            assert self.state.n_columns >= max(map(len, self.texts)), "every token of every row is held"


@pytest.mark.parametrize(
    ("name", "capacity"),
    [
        ("fake", None),
        ("remote", None),
        ("twice", None),
        ("windowed", None),
        pytest.param("twice", 96, marks=pytest.mark.slow),
    ],
)
def test_any_order(name, capacity):
    machine = type("Machine", (Ragged,), {"lane": RUNTIMES[name](), "capacity": capacity}).TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    machine().runTest()
