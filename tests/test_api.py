"""A base behind an API: its marks are right, nothing that is certain lacks its mark, and no fault goes unseen."""

from __future__ import annotations

import json
import math
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune import MemberError, ProxyTunedForCausalLM, ProxyTuneError, RecipeError, VocabularyError
from proxytune.decoding.ahead import Ahead
from proxytune.decoding.certificate import MARGIN, biases, bounded, drawn_from_known, judge, known_ids, most_probable
from proxytune.decoding.lane import Scores
from proxytune.generation_mixin import last_asked
from proxytune.lanes.completions import BadReply, known_of
from proxytune.lanes.probing import findings, probe
from proxytune.lanes.spelling import Spelling
from proxytune.lanes.transformers import TransformersState
from proxytune.recipe.parts import ApiBase, parse_base
from support import faults, tiny
from support.commands import fails, run
from support.completions import KEY, Served, serving
from support.decoding import family_oracle, near, new_tokens
from support.faults import PASSING, first_two, padded, spoiled, top
from support.oracle import Oracle, assert_same_tokens

ROWS = [[1, 40, 77, 102, 9], [1, 88, 15], [1, 7, 300, 41, 12]]
N_NEW = 12
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD, "max_new_tokens": N_NEW}


@pytest.fixture(scope="module")
def oracle():
    base = tiny.llama("base", 1)
    return Oracle(base, [("expert", near(base, 2), near(base, 3), 1.0)])


@pytest.fixture(scope="module")
def tokens_at(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    faults.hurry(monkeypatch)


@pytest.fixture
def served(oracle):
    """A server whose behaviour the test sets, and its URL."""
    made = Served(oracle.base, tiny.tokenizer())
    with serving(made):
        yield made


@pytest.fixture
def steered(oracle, served, tokens_at):
    """From options of the base and of loading to the composite."""

    def load(n=5, *, key=None, server="auto", experts=None, **options):
        base = {"api": served.url, "model": "tiny", "tokenizer": str(tokens_at), "top_logprobs": n, "server": server}
        base |= {} if key is None else {"key": key}
        experts = experts or [{"expert": e, "anti_expert": a, "alpha": alpha} for _, e, a, alpha in oracle.experts]
        return ProxyTunedForCausalLM.from_members(base, experts=experts, **options)

    return load


def answers(model, rows=ROWS, **options):
    """Each row's new tokens, and their marks."""
    tokens = new_tokens(model, rows, **{**GREEDY, **options})
    asked = last_asked(model)
    assert [len(row) for row in asked.certified] == [len(row) for row in tokens]
    assert all(n > 0 for n in asked.calls)
    return tokens, asked


def assert_no_mark_is_wrong(oracle, rows, tokens, marks):
    for row, own, certified in zip(rows, tokens, marks):
        for at, (token, certain) in enumerate(zip(own, certified)):
            if certain:
                assert token == int(oracle.logits(row, own[:at])[-1].argmax()), f"token {at} of {own}"


def covered(oracle, row, written, n):
    """Whether the true top n of the base alone prove what the mixture chooses behind a text, by a clear margin."""
    logits = oracle.member_logits(row, written)
    base = logits["base"][-1].double().log_softmax(dim=-1)
    delta = (logits["expert.expert"][-1] - logits["expert.anti_expert"][-1]).double()
    best = base.topk(n)
    inside = set(best.indices.tolist())
    outside = [index for index in range(len(base)) if index not in inside]
    rest = max(1 - float(best.values.exp().sum()), 1e-12)
    bound = min(float(best.values[-1]), math.log(rest)) + max(
        (float(delta[index]) for index in outside), default=-math.inf
    )
    two = (base + delta)[best.indices].topk(2).values
    return float(two[0]) > bound + 1e-2 and float(two[0] - two[1]) > 1e-3


# -- the recipe ---------------------------------------------------------------------------------------------------
GOOD = {"api": "https://host/v1", "model": "big", "tokenizer": "owner/big"}


def test_the_base_reads_and_writes_its_fields():
    whole = {**GOOD, "top_logprobs": 5, "key": "BIG_KEY", "server": "vllm"}
    assert parse_base(GOOD).to_json() == GOOD
    assert parse_base(whole).to_json() == whole
    assert isinstance(parse_base(whole), ApiBase)
    assert not isinstance(parse_base("owner/big"), ApiBase)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": "float32"}, "unknown field 'dtype'"),
        ({"revision": "main"}, "unknown field 'revision'"),
        ({"model": None}, "needs `model`"),
        ({"tokenizer": ""}, "needs `tokenizer`"),
        ({"api": "ftp://host"}, "must begin with http"),
        ({"api": "host/v1"}, "must begin with http"),
        ({"api": f"https://me:{KEY}@host/v1"}, "plain URL"),
        ({"api": f"https://host/v1?key={KEY}"}, "plain URL"),
        ({"api": f"https://{KEY}@[host"}, "no URL"),
        ({"top_logprobs": 0}, "whole number"),
        ({"top_logprobs": True}, "whole number"),
        ({"key": KEY}, "the name of an environment variable"),
        ({"key": "hf_abcDEF"}, "the name of an environment variable"),
        ({"server": "ollama"}, "is one of auto"),
    ],
)
def test_what_is_wrong_is_refused_and_no_key_is_repeated(fields, said):
    with pytest.raises(RecipeError, match=said) as caught:
        parse_base({**GOOD, **fields})
    assert KEY not in str(caught.value)


def test_an_expert_behind_an_api_is_refused():
    from proxytune import Expert

    with pytest.raises(RecipeError, match="only the base may run behind an API"):
        Expert.parse({"expert": GOOD})


# -- what a list of log-probabilities proves -----------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), data=st.data())
def test_no_id_exceeds_its_bound(seed, n, data):
    """Whatever is left out, merged or unknown in the list of a true distribution."""
    generator = torch.Generator().manual_seed(seed)
    truth = (
        (torch.randn(12, generator=generator) * data.draw(st.sampled_from([0.3, 2.0, 8.0])))
        .double()
        .log_softmax(dim=-1)
    )
    values, ids = truth.topk(n)
    named = data.draw(st.sampled_from([1, 3, 12]))  # so many ids share a text
    entries = {}
    for index, value in zip(ids.tolist(), values.tolist()):
        text = index % named if index < 6 else index + 100
        entries[text] = value  # the last one stands
    texts = {}
    for index in range(12):
        texts.setdefault(index % named if index < 6 else index + 100, []).append(index)
    listed = [(tuple(texts[text]), value) for text, value in entries.items()]
    lost = data.draw(st.integers(0, 2))
    listed = data.draw(st.permutations(listed))
    listed = [(ids, math.nan) if at < lost else (ids, value) for at, (ids, value) in enumerate(listed)]
    given_ = None
    if data.draw(st.booleans()) and lost == 0 and len(listed) == n and n < 12:  # one drawn from below the top n
        below = int(torch.randint(n, 12, (1,), generator=generator))
        index = int(truth.argsort(descending=True)[below])
        given_ = float(truth[index])
        listed.append(((index,), given_))
        if len(texts[index % named if index < 6 else index + 100]) > 1:
            return
    known = known_of(listed, n, given_)
    for index in range(12):
        if index in known.logprobs:
            assert known.logprobs[index] == pytest.approx(float(truth[index]))
        else:
            assert float(truth[index]) <= known.bound + 1e-9


def test_the_bound_is_the_smaller_of_two():
    flat = [((at,), math.log(0.1)) for at in range(5)]
    assert known_of(flat, 5).bound == pytest.approx(math.log(0.1))  # the k-th
    steep = [((0,), math.log(0.9)), ((1,), math.log(0.08))]
    assert known_of(steep, 2).bound == pytest.approx(math.log(0.02), abs=0.01)  # what is left over
    assert known_of(flat, 20).bound == pytest.approx(math.log(0.5), abs=0.01)  # fewer than asked for: no k-th
    below = [*flat, ((9,), math.log(0.001))]
    assert known_of(below, 5, math.log(0.001)).bound == pytest.approx(math.log(0.1))  # k + 1: the last is no k-th
    instead = known_of(below, 6, math.log(0.001))  # or it stands in the place of the k-th
    assert instead.bound == pytest.approx(math.log(0.1))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([((0,), 0.1)], "above 0"),
        ([((0,), -0.1), ((1,), -0.1)], "sum to"),
        ([((0,), -1.0), ((0,), -2.0)], "twice"),
        ([((at,), -5.0) for at in range(4)], "4 log-probabilities where 2"),
    ],
)
def test_what_is_not_a_distribution_is_refused(entries, said):
    with pytest.raises(BadReply, match=said):
        known_of(entries, 2)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_certain_choice_wins_whatever_the_unknown_are(seed):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randn(1, 1, 9, generator=generator)
    known = torch.rand(1, 1, 9, generator=generator) < 0.6
    certain, rivals = judge(upper, known)
    best = upper.masked_fill(~known, -torch.inf).argmax()
    first, second = upper[0, 0].topk(2).values  # every unknown token at its bound
    wins = bool(known.any() and upper.argmax() == best)
    assert bool(certain) == (wins and bool(first - MARGIN > second))
    assert not bool((rivals & known).any())
    tie = bool(known.sum() > 1) and float(upper[known].topk(2).values.diff().abs()) <= MARGIN  # no rival decides it
    assert bool(rivals.any()) != bool(certain) or tie
    assert not bool(rivals.any() and certain)


# -- spellings ----------------------------------------------------------------------------------------------------
def test_every_spelling_means_its_id():
    tokenizer = tiny.tokenizer()
    spelling = Spelling(tokenizer, tiny.VOCAB)
    for how in ("ids", "raw", "bytes"):
        served = Served(None, tokenizer, texts=how)
        assert all(spelling.meant(served.spell(index)) == (index,) for index in range(tiny.VOCAB)), how
    assert len(spelling.meant("\ufffd")) == 128
    assert spelling.meant("token_id:9999") == ()
    assert spelling.meant("no such token") == ()
    assert spelling.meant("bytes:\\xC3") == spelling.meant("bytes:\\xc3") != ()


# -- answers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["pull", "ask", "verify", "push"])
@pytest.mark.parametrize(("n", "texts"), [(5, "bytes"), (20, "raw"), (20, "decoded"), (tiny.VOCAB, "ids")])
def test_marks_are_right_and_complete(oracle, served, steered, way, n, texts):
    served.texts = texts
    tokens, asked = answers(steered(n, way=way))
    assert asked.way == way
    assert_no_mark_is_wrong(oracle, ROWS, tokens, asked.certified)
    if way == "pull":
        assert asked.calls == [N_NEW + 1, N_NEW, N_NEW]  # the first prompt is asked about once more at the end
    if texts != "decoded":  # there one text has 128 ids
        for row, own, marks in zip(ROWS, tokens, asked.certified):
            for at, certain in enumerate(marks):
                assert certain or not covered(oracle, row, own[:at], n)
    if n == tiny.VOCAB or (way != "pull" and texts != "decoded"):
        assert all(map(all, asked.certified))
        assert tokens == [oracle.greedy(row, N_NEW)[0] for row in ROWS]


def test_pull_is_not_certain_of_all(oracle, steered):
    tokens, asked = answers(steered(5, way="pull"))
    marks = [mark for row in asked.certified for mark in row]
    assert 0 < sum(marks) < len(marks)
    assert tokens != [oracle.greedy(row, N_NEW)[0] for row in ROWS]


def test_verify_asks_less_often_than_there_are_tokens(steered):
    model = steered(tiny.VOCAB, way="verify")
    _, asked = answers(model, ROWS[:1])
    assert asked.calls[0] < N_NEW
    assert model.speculation_stats.accepted > 0


def test_auto_takes_what_the_server_offers(served, steered):
    assert answers(steered(5))[1].way == "verify"
    served.lists = False
    assert answers(steered(5))[1].way == "ask"
    with pytest.raises(ProxyTuneError, match="cannot be verified"):
        steered(5, way="verify")
    with pytest.raises(ProxyTuneError, match="there is no way 'guess'"):
        steered(5, way="guess")


@pytest.mark.parametrize("most", [10**6, 300])
def test_push_lets_the_server_choose(oracle, served, steered, most):
    served.most_biases = most
    model = steered(5, way="push")
    assert model.lanes[0].endpoint.offer.biased == min(most, tiny.VOCAB)
    tokens, asked = answers(model)
    assert tokens == [oracle.greedy(row, N_NEW)[0] for row in ROWS]
    assert all(map(all, asked.certified))
    assert asked.calls[1] == N_NEW or most == 300
    for options, said in (
        ({"do_sample": True, "top_k": 0}, "sampling"),
        ({"repetition_penalty": 1.3}, "RepetitionPenalty"),
        ({"return_trace": True}, "a trace"),
    ):
        with pytest.raises(ProxyTuneError, match=f"{said}.* is not possible|of all tokens"):
            new_tokens(model, ROWS, **{**GREEDY, **options})
    served.refuses = ("logit_bias",)
    with pytest.raises(ProxyTuneError, match=r"the server of the base tiny at .* refuses: "):
        answers(model)


@pytest.fixture
def few(monkeypatch):
    """From a number of tokens that are pushed first."""
    return lambda n: monkeypatch.setattr("proxytune.lanes.completions.FEW_BIASES", n)


@pytest.mark.parametrize("most", [10**6, 300])
@pytest.mark.parametrize("n", [1, 40, 200])
def test_few_tokens_are_pushed_first(oracle, served, steered, few, n, most):
    """A second request names the winner too, and a third one holds as many as possible. Each is made only where those
    before it do not decide."""
    few(n)
    served.most_biases = most
    model = steered(5, way="push")
    began = len(served.requests)
    tokens, asked = answers(model)
    assert tokens == [oracle.greedy(row, N_NEW)[0] for row in ROWS]
    assert all(map(all, asked.certified))
    made = served.requests[began:]
    sent = [len(body.get("logit_bias", ())) for body in made]
    assert len(sent) == sum(asked.calls)
    n_tokens = len(ROWS) * N_NEW
    last = sent.pop()  # the request that decided the first token is repeated at the end
    again, whole = sent.count(n) - n_tokens, sent.count(min(most, tiny.VOCAB))
    assert 0 < whole <= again <= n_tokens if n < 200 else again < n_tokens / 4
    assert n != 40 or whole < again, "naming the winner decides some"
    if most > tiny.VOCAB:
        assert len(sent) == n_tokens + again + whole
        assert last in (n, tiny.VOCAB)
        assert made[-1] in [body for body in made[:-1] if body["prompt"] == ROWS[0]]


def test_ids_that_the_experts_lack_are_never_chosen(oracle, steered, few):
    few(40)
    width, rows = tiny.VOCAB - 120, ROWS[:2]
    narrow = tiny.llama("base", 4, vocab_size=width)
    other = Oracle(oracle.base, [("expert", narrow, near(narrow, 3), 1.0)])
    expected = [other.greedy(row, N_NEW)[0] for row in rows]
    alone = [oracle.member_logits(row, own[:at])["base"][-1] for row, own in zip(rows, expected) for at in range(N_NEW)]
    assert any(int(logits.argmax()) >= width for logits in alone)
    model = steered(20, experts=[{"expert": narrow, "anti_expert": near(narrow, 3)}], way="push")
    tokens, asked = answers(model, rows)
    assert tokens == expected
    assert all(map(all, asked.certified))


def test_push_needs_fractions(served, steered):
    served.whole_biases = True
    with pytest.raises(ProxyTuneError, match="takes no fractions as logit_bias"):
        steered(5, way="push")
    served.whole_biases, served.refuses = False, ("logit_bias",)
    with pytest.raises(ProxyTuneError, match="takes no fractions as logit_bias"):
        steered(5, way="push")


@pytest.mark.parametrize("words", [True, False])
def test_a_penalty_of_the_server_changes_no_push(oracle, served, steered, words):
    """It is turned off where the server knows the word, and push is refused where it does not."""
    served.penalty, served.words, served.raw = 1.4, words, True
    if not words:
        served.refuses = ("repetition_penalty",)
        with pytest.raises(ProxyTuneError, match="takes no fractions as logit_bias"):
            steered(20, way="push")
        return
    tokens, asked = answers(steered(20, way="push"))
    assert tokens == [oracle.greedy(row, N_NEW)[0] for row in ROWS]
    assert all(map(all, asked.certified))


@pytest.mark.parametrize("texts", ["bytes", "raw", "ids"])
@pytest.mark.parametrize(("lists", "n"), [(True, 5), (False, 20)])
def test_given_text_is_scored_in_one_request(oracle, served, steered, texts, lists, n):
    served.scores, served.texts, served.lists = True, texts, lists
    model = steered(n, way="verify")
    assert model.lanes[0].endpoint.offer.scores
    began = len(served.requests)
    tokens, asked = answers(model, speculate=3)
    assert tokens == [oracle.greedy(row, N_NEW)[0] for row in ROWS]
    assert all(map(all, asked.certified))
    assert sum(map(bool, (one.get("echo") for one in served.requests[began:]))) > 0
    assert not any(isinstance(one["prompt"][0], list) for one in served.requests[began:])
    assert len(served.requests) - began == sum(asked.calls)


def test_a_list_is_asked_where_a_scored_text_would_be_long(oracle, served, steered, monkeypatch):
    served.scores = True
    model = steered(20, way="verify")
    expected = answers(model, speculate=3)
    monkeypatch.setattr("proxytune.lanes.completions.MOST_SCORED", 19)
    began = len(served.requests)
    tokens, asked = answers(model, speculate=3)
    assert (tokens, asked.certified) == (expected[0], expected[1].certified)
    assert not any(one.get("echo") for one in served.requests[began:])


@pytest.mark.parametrize("what", ["another text", "other numbers", "an empty echo"])
def test_given_text_that_is_scored_otherwise_is_not_used(served, steered, what, monkeypatch):
    whole, served.scores = served.reply, True

    def reply(body):
        made = whole(body)
        if body.get("echo"):
            logprobs = made["choices"][0]["logprobs"]
            if what == "another text":
                logprobs["tokens"][1] = served.spell(7)
            elif what == "other numbers":
                logprobs["top_logprobs"][-2:] = logprobs["top_logprobs"][:0:-1][:2]
            else:
                for part in logprobs.values():
                    del part[:-1]
        return made

    monkeypatch.setattr(served, "reply", reply)
    assert not steered(20).lanes[0].endpoint.offer.scores


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_in_scored_text_changes_nothing(served, steered, fault):
    served.scores = True
    model = steered(20, way="verify")
    expected = answers(model, ROWS[:1], speculate=3)
    began = len(served.requests)
    served.faults = lambda number, made: PASSING[fault](made) if number - began in (1, 2, 4) else made
    tokens, asked = answers(model, ROWS[:1], speculate=3)
    assert (tokens, asked.certified) == (expected[0], expected[1].certified)


def test_a_choice_under_few_biases_is_that_of_all_offsets(oracle, steered, monkeypatch):
    """Of those that are not sent the largest stands for all: what wins against it wins. Some offsets are too far apart
    for a bias."""
    endpoint = steered(tiny.VOCAB, way="push").lanes[0].endpoint
    generator = torch.Generator().manual_seed(5)
    n_sure = {}
    for n, scale in ((1, 3), (40, 3), (40, 60), (tiny.VOCAB, 3), (tiny.VOCAB, 60)):
        for _ in range(30):
            text = torch.randint(4, tiny.VOCAB, (6,), generator=generator).tolist()
            offsets = torch.randn(tiny.VOCAB, generator=generator) * scale
            offsets[torch.randint(4, tiny.VOCAB, (9,), generator=generator)] = -torch.inf
            drawn, sure = endpoint.drawn(text, offsets, torch.randn(tiny.VOCAB, generator=generator), n)
            base = oracle.member_logits(text, [])["base"][-1]
            assert not sure or drawn == int((base + offsets).argmax())
            n_sure[n, scale] = n_sure.get((n, scale), 0) + sure
    assert 0 < n_sure[40, 3] < 30
    assert n_sure[tiny.VOCAB, 3] == n_sure[tiny.VOCAB, 60] == 30
    excluded = torch.full((tiny.VOCAB,), -torch.inf)
    assert endpoint.drawn([1, 2], excluded, excluded, 40) == (None, False)
    monkeypatch.setattr(endpoint, "chosen", lambda text, bias: 7)
    for offset, sure in ((-99.0, True), (-101.0, False), (-torch.inf, False)):  # what is sent is at least -100
        offsets = torch.zeros(tiny.VOCAB).index_fill(0, torch.tensor([7]), offset)
        assert endpoint.drawn([1, 2], offsets, offsets, tiny.VOCAB) == (7, sure)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), scale=st.sampled_from([1.0, 40.0, 200.0]), data=st.data())
def test_a_winner_under_biases_wins_under_all_offsets(seed, n, scale, data):
    """Whatever the base is: against a server that adds what it is sent, within -100 and 100."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(12, generator=generator, dtype=torch.float64) * scale
    offsets[torch.rand(12, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 0.8]))] = -math.inf
    offsets[int(torch.randint(12, (1,), generator=generator))] = scale
    base = torch.randn(12, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([1.0, 100.0]))
    ids, added = biases(offsets, torch.randn(12, generator=generator), n, 100.0)
    assert len(ids) == len(added) == n
    assert bool((added <= 100).all())
    server = base.clone()
    server[ids] += added.clamp(min=-100.0)
    won = int(server.argmax())
    if won in ids[added >= -100].tolist():
        assert won == int((base + offsets).argmax())


def test_half_of_the_pushed_tokens_are_those_that_members_find_probable():
    """So a token that steering hardly lifts can win in a request that does not hold all offsets."""
    offsets = torch.tensor([0.0, 5.0, 4.0, 3.0, -1.0, -torch.inf])
    lane = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 8.0]])  # a row, read by two members
    likely = most_probable([lane, torch.zeros(1, 7)], 1, 6)
    assert likely.shape == (1, 6)
    assert likely[0].topk(2).indices.tolist() == [0, 4]
    assert float(likely[0, 5]) == pytest.approx(-math.log(7))
    ids, added = biases(offsets, likely[0], 4, 100.0)
    assert ids.tolist() == [0, 4, 1, 2]
    assert added.tolist() == [-3.0, -4.0, 2.0, 1.0]
    ids, added = biases(offsets, likely[0], 6, 100.0)
    assert dict(zip(ids.tolist(), (added + 5).tolist())) == dict(enumerate(offsets.tolist()))


@pytest.mark.parametrize(
    "behaviour",
    [
        {"ids": False},
        {"lists": False},
        {"hot": True},
        {"usage": False},
        {"cap": 7},
        {"refuses": ("return_tokens_as_token_ids",)},
    ],
    ids=str,
)
def test_servers_of_all_kinds(oracle, served, steered, behaviour):
    for name, value in behaviour.items():
        setattr(served, name, value)
    rows = [tiny.tokenizer()(text)["input_ids"] for text in ("The quick brown", "how many apples")]
    model, n_new = steered(20), 6
    if behaviour == {"ids": False}:  # the text so far is none of the tokenizer's own cuts
        with pytest.raises(ProxyTuneError, match="would be read as other tokens"):
            answers(model, rows, max_new_tokens=6)
        rows, n_new = rows[:1], 1
    tokens, asked = answers(model, rows, max_new_tokens=n_new)
    assert_no_mark_is_wrong(oracle, rows, tokens, asked.certified)
    assert any(map(any, asked.certified))


def test_plausibility_and_two_experts(oracle, steered):
    base = oracle.base
    both = Oracle(base, [("a", near(base, 2), None, 0.2), ("b", near(base, 4), near(base, 5), 0.7)], plausibility=0.1)
    experts = [
        {"name": name, **{side: one for side, one in (("expert", e), ("anti_expert", a)) if one}, "alpha": alpha}
        for name, e, a, alpha in both.experts
    ]
    tokens, asked = answers(steered(20, experts=experts, plausibility=0.1))
    assert_no_mark_is_wrong(both, ROWS, tokens, asked.certified)
    assert any(map(any, asked.certified))


@pytest.mark.parametrize("way", ["ask", "push"])
@pytest.mark.parametrize("rule", ["mean", "convex", "union", "intersection"])
def test_rules(oracle, steered, few, way, rule):
    few(60)
    base = oracle.base
    both = Oracle(base, [("a", near(base, 2), near(base, 3), 0.6), ("b", near(base, 4), near(base, 5), 0.4)], rule=rule)
    experts = [{"name": n, "expert": e, "anti_expert": a, "alpha": alpha} for n, e, a, alpha in both.experts]
    model = steered(20, experts=experts, way=way)
    if (way, rule) == ("push", "convex"):
        with pytest.raises(ProxyTuneError, match="so the rule convex is not possible"):
            answers(model, combine=rule)
        return
    tokens, asked = answers(model, combine=rule)
    assert_no_mark_is_wrong(both, ROWS, tokens, asked.certified)
    assert all(map(all, asked.certified))


def test_a_rule_that_needs_all_probabilities(oracle, steered):
    with pytest.raises(ProxyTuneError, match="the rule dynamic needs the base's probabilities of all tokens"):
        answers(steered(20), combine="dynamic")
    plain = Oracle(oracle.base, oracle.experts, rule="dynamic")
    tokens, asked = answers(steered(tiny.VOCAB, way="pull"), ROWS[:1], combine="dynamic")
    assert_same_tokens(tokens[0], plain.greedy(ROWS[0], N_NEW))
    assert all(map(all, asked.certified))


def test_gates(oracle, steered):
    """A schedule needs no probabilities."""
    plain = Oracle(oracle.base, oracle.experts, gate=("decay", 4))
    for way in ("verify", "ask"):
        tokens, asked = answers(steered(20, way=way), gate="decay=4")
        assert_no_mark_is_wrong(plain, ROWS, tokens, asked.certified)
        assert any(map(any, asked.certified))
    plain = Oracle(oracle.base, oracle.experts, gate=("unsure", 0.12))
    tokens, asked = answers(steered(tiny.VOCAB, way="pull"), ROWS[:1], gate="unsure=0.12")
    assert_same_tokens(tokens[0], plain.greedy(ROWS[0], N_NEW))
    assert all(map(all, asked.certified))
    with pytest.raises(ProxyTuneError, match="the gate unsure needs the base's probabilities of all tokens"):
        answers(steered(20), gate="unsure=0.5")
    with pytest.raises(ProxyTuneError, match="so a gate is not possible"):
        answers(steered(20, way="push"), gate="decay=4")


def test_what_needs_all_probabilities_is_refused_or_exact(oracle, steered):
    model = steered(20)
    for options in ({"do_sample": True, "seed": 1}, {"num_beams": 2}, {"return_trace": True}):
        with pytest.raises(ProxyTuneError, match="of all tokens"):
            new_tokens(model, ROWS[:1], **{**GREEDY, **options})
    with pytest.raises(ProxyTuneError, match="can be read only by generate"):
        model.requires_grad_(True)(torch.tensor(ROWS[:1]), use_cache=False)
    model.requires_grad_(False)
    with torch.no_grad(), pytest.raises(ProxyTuneError, match="of all tokens"):
        model(torch.tensor(ROWS[:1]), use_cache=False)
    with pytest.raises(MemberError, match="runs behind an API"):
        model.member("base")
    whole, white = steered(tiny.VOCAB), tiny.compose(oracle)
    drawn = {**GREEDY, "do_sample": True, "seed": 3}
    assert new_tokens(whole, ROWS, **drawn) == new_tokens(white, ROWS, **drawn)
    assert all(map(all, last_asked(whole).certified))
    torch.testing.assert_close(
        whole(torch.tensor(ROWS[:1])).logits.softmax(-1), white(torch.tensor(ROWS[:1])).logits.softmax(-1)
    )
    beams = {**GREEDY, "num_beams": 2}
    assert new_tokens(whole, ROWS[:1], **beams) == new_tokens(white, ROWS[:1], **beams)


@pytest.mark.parametrize("way", ["ask", "verify"])
def test_a_trace_of_a_base_whose_server_names_all_tokens(oracle, served, steered, recipe, tmp_path, no_progress, way):
    asked = {**GREEDY, "return_trace": True, "trace_top_k": 3}
    ids = torch.tensor(ROWS[:1])
    traces = [model.generate(ids, **asked).traces[0] for model in (steered(tiny.VOCAB, way=way), tiny.compose(oracle))]
    assert len(traces[0]) == N_NEW
    for own, local in zip(*traces, strict=True):
        assert own.certified is True
        assert own.to_json()["certified"] is True
        assert local.certified is None
        assert "certified" not in local.to_json()
        for name in ("base_logprob", "mixture_logprob", "base_entropy", "kl"):
            assert getattr(own, name) == pytest.approx(getattr(local, name), abs=1e-3), name
        assert (own.id, own.base_rank, own.changed) == (local.id, local.base_rank, local.changed)
        assert [each.id for each in own.candidates] == [each.id for each in local.candidates]
        assert own.offsets == pytest.approx(local.offsets, abs=1e-3)

    written = json.loads((recipe / "config.json").read_text("utf-8"))
    written["base"]["top_logprobs"] = tiny.VOCAB
    (recipe / "config.json").write_text(json.dumps(written), "utf-8")
    run("generate", recipe, "The quick brown", "-n", 5, "--trace", tmp_path / "t.jsonl", "--way", way)
    (line,) = map(json.loads, (tmp_path / "t.jsonl").read_text("utf-8").splitlines())
    assert [token["certified"] for token in line["tokens"]] == [True] * 5
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"prompt": "The quick brown", "completion": " fox"}) + "\n", "utf-8")
    assert json.loads(run("limit", recipe, "--input", gold, "--json").stdout)["n_answers"] == 1


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]))
def test_draws_from_known_tokens_are_no_farther_than_their_bound(seed, n, temperature):
    """For any distribution, offsets and list of its most probable tokens; if all are known the bound is 0."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(12, generator=generator) * 3).double().log_softmax(dim=-1)
    delta = torch.randn(12, generator=generator).double() * 2
    delta[torch.rand(12, generator=generator) < 0.1] = -math.inf
    values, ids = base.topk(n)
    bound = known_of([((i,), x) for i, x in zip(ids.tolist(), values.tolist())], n).bound
    scores = Scores(values[None, None], ids[None, None], torch.tensor([[bound]]).double())
    known = known_ids(scores, 12)
    upper = bounded(scores, 12) + delta
    true = ((base + delta) / temperature).softmax(dim=-1)
    apart = float(true[~known[0, 0]].sum())  # the total variation of a distribution and itself, restricted
    found = float(drawn_from_known(scores, upper, known, temperature))
    if bool((delta[ids] > -math.inf).any()):
        assert apart <= found + 1e-9
        assert found <= 1
    assert n < 12 or found == 0


@pytest.mark.parametrize(("way", "temperature"), [("ask", 0.7), ("verify", 1.0)])
def test_samples_from_named_tokens_have_a_bound(oracle, steered, way, temperature):
    """Against the plain loop's whole distribution at each place of the drawn text."""
    bounds = {}
    for n in (5, 60):
        model = steered(n, way=way, sample_named=True, speculate=2 if way == "verify" else "auto")
        drawn = {"do_sample": True, "seed": [1, 2, 3], "temperature": temperature, "top_k": 0, "max_new_tokens": 5}
        tokens, asked = answers(model, **drawn)
        bounds[n] = [bound for row in asked.tv_bound for bound in row]
        for row, own, row_bounds in zip(ROWS, tokens, asked.tv_bound, strict=True):
            for at, (token, bound) in enumerate(zip(own, row_bounds, strict=True)):
                logits = oracle.member_logits(row, own[:at])["base"][-1]
                true = (oracle.logits(row, own[:at])[-1].double() / temperature).softmax(dim=-1)
                named = logits.topk(n).indices
                assert token in named.tolist()
                assert 1 - float(true[named].sum()) <= bound + 1e-6
    assert sum(bounds[60]) < sum(bounds[5])
    assert max(bounds[60]) < 1


def test_draws_from_named_tokens_have_their_distribution(oracle, steered):
    """With drafts and without: the mixture over the five most probable tokens of the base."""
    row, n_rows = ROWS[1], 300
    base = oracle.member_logits(row, [])["base"][-1]
    named = base.topk(5).indices
    expected = torch.zeros(tiny.VOCAB).index_put((named,), oracle.logits(row, [])[-1][named].softmax(dim=-1))
    counts = torch.zeros(tiny.VOCAB)
    model = steered(5, way="verify", sample_named=True)
    options = {**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 1}
    for (token,) in new_tokens(model, [row] * n_rows, **options, seed=list(range(n_rows))):
        counts[token] += 1
    assert float((counts / n_rows - expected).abs().sum()) / 2 < 0.1


def test_named_tokens_are_refused_where_no_bound_is_known(oracle, steered, shelf):
    model = steered(5, sample_named=True)
    for options, said in (
        ({}, "this is greedy decoding"),
        ({"do_sample": True, "top_k": 3}, "no bound is known under TopKLogitsWarper"),
        ({"do_sample": True, "top_k": 0, "combine": "convex"}, "no bound is known under the rule convex"),
    ):
        with pytest.raises(ProxyTuneError, match=f"--sample-named is for sampling at a temperature alone, and {said}"):
            new_tokens(model, ROWS[:1], **{**GREEDY, **options})
    with pytest.raises(RecipeError, match="--sample-named is for a base behind an API"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", sample_named=True)


def test_processors_leave_nothing_certain(steered):
    _, asked = answers(steered(20), repetition_penalty=1.3)
    assert not any(map(any, asked.certified))


def test_an_end_token_without_probabilities(oracle, served, steered, monkeypatch):
    """Some servers say of an end token that it ends, and nothing more."""
    ended = served.reply

    def reply(body):
        made = ended(body)
        for choice in made["choices"]:
            if "The" not in choice["text"]:
                choice |= {"text": "", "finish_reason": "stop"}
                choice["logprobs"] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        return made

    model = steered(20, way="pull")
    monkeypatch.setattr(served, "reply", reply)
    tokens, asked = answers(model, ROWS[:1], eos_token_id=tiny.EOS)
    assert tokens[0][-1] == tiny.EOS
    assert asked.certified[0][-1] is False


# -- faults -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(oracle, served, steered, fault):
    expected = answers(steered(20, way="ask"), ROWS[:1], max_new_tokens=6)
    model = steered(20, way="ask")
    began = len(served.requests)
    served.faults = lambda number, made: PASSING[fault](made) if number - began in (1, 2, 6) else made
    tokens, asked = answers(model, ROWS[:1], max_new_tokens=6)
    assert (tokens, asked.certified) == (expected[0], expected[1].certified)
    assert len(served.requests) - began == sum(asked.calls) + 3
    assert asked.calls == expected[1].calls


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_in_a_push_changes_nothing(served, steered, few, fault):
    few(40)
    model = steered(20, way="push")
    expected = answers(model, ROWS[:1], max_new_tokens=6)
    assert expected[1].calls[0] > 7  # some tokens are pushed twice
    began = len(served.requests)
    served.faults = lambda number, made: PASSING[fault](made) if number - began in (0, 1, 4, 8) else made
    tokens, asked = answers(model, ROWS[:1], max_new_tokens=6)
    assert (tokens, asked.certified, asked.calls) == (expected[0], expected[1].certified, expected[1].calls)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_ends_the_run(served, steered, fault):
    model = steered(20, way="ask")
    began = len(served.requests)
    served.faults = lambda number, made: PASSING[fault](made)
    with pytest.raises(ProxyTuneError, match="the server of the base tiny"):
        answers(model, ROWS[:1])
    assert len(served.requests) - began >= 6


@pytest.mark.parametrize(
    "change",
    [
        lambda lp: top(lp).pop(max(top(lp), key=lambda token: (token not in lp["tokens"], top(lp)[token]))),
        lambda lp: top(lp).update({min(top(lp), key=top(lp).get): None}),
        lambda lp: top(lp).update({min(top(lp), key=top(lp).get): -9999.0}),
        lambda lp: lp.update(top_logprobs=[dict(reversed(top(lp).items()))]),
        lambda lp: lp.update(top_logprobs=[dict(list(top(lp).items())[:2])]),
    ],
    ids=["the second is missing", "one is null", "one is -9999", "reordered", "two of five"],
)
def test_a_reply_that_says_less_is_never_too_certain(oracle, served, steered, change):
    model = steered(5, way="pull")
    served.faults = lambda number, made: spoiled(change)(made)
    tokens, asked = answers(model)
    assert_no_mark_is_wrong(oracle, ROWS, tokens, asked.certified)


@pytest.mark.parametrize(("short", "passing"), [(padded, (0, 1, 2, 3, 4, 8)), (first_two, (0, 3))])
def test_a_short_reply_is_asked_for_again(served, steered, short, passing):
    expected = answers(steered(20, way="ask"), ROWS[:1], max_new_tokens=6)
    model = steered(20, way="ask")
    began = len(served.requests)
    served.faults = lambda number, made: short(made) if number - began in passing else made
    tokens, asked = answers(model, ROWS[:1], max_new_tokens=6)
    assert (tokens, asked.certified, asked.calls) == (expected[0], expected[1].certified, expected[1].calls)
    assert len(served.requests) - began == sum(asked.calls) + len(passing)


@pytest.mark.parametrize("short", [padded, first_two])
def test_a_reply_that_stays_short_is_accepted(oracle, served, steered, short):
    model = steered(20, way="ask")
    served.faults = lambda number, made: short(made)
    tokens, asked = answers(model, ROWS[:1], max_new_tokens=6)
    assert_no_mark_is_wrong(oracle, ROWS[:1], tokens, asked.certified)
    served.faults = None
    assert answers(model, ROWS[:1], max_new_tokens=6)[1].certified == [[True] * 6]  # nothing of it is remembered


def test_a_model_that_changes_ends_the_run(served, steered):
    model = steered(5)
    served.name = "another"
    with pytest.raises(ProxyTuneError, match="answered as 'tiny' first and now as 'another'"):
        answers(model)


@pytest.mark.parametrize("way", ["pull", "verify", "push"])
def test_a_model_that_changes_under_its_name_ends_the_run(served, steered, way):
    model = steered(20, way=way)
    began, first = len(served.requests), served.model

    def swap(number, made):
        served.model = tiny.llama("base", 7) if number - began >= 2 else first
        return made

    served.faults = swap
    with pytest.raises(ProxyTuneError, match="two different replies to one prompt"):
        answers(model, ROWS[:1])


def test_a_failing_probe_proves_nothing(served, steered):
    """A server that fails is no server that cannot."""
    served.faults = lambda number, made: (503, "busy") if number % 3 else made
    assert steered(5).lanes[0].endpoint.offer.lists
    served.faults = lambda number, made: (503, "busy") if isinstance(served.requests[-1]["prompt"][0], list) else made
    with pytest.raises(ProxyTuneError, match=r"fails \(503\) after 7 tries"):
        steered(5)


def test_choices_are_distinguished_by_their_numbers(oracle, served, steered):
    model = steered(20, way="verify")
    served.faults = lambda number, made: {**made, "choices": made["choices"][::-1]}
    tokens, asked = answers(model)
    assert_no_mark_is_wrong(oracle, ROWS, tokens, asked.certified)
    assert all(map(all, asked.certified))
    served.faults = lambda number, made: {**made, "choices": [{**one, "index": 0} for one in made["choices"]]}
    with pytest.raises(ProxyTuneError, match="its choices are numbered"):
        answers(model, speculate=2)


def test_a_server_that_is_slow_is_waited_for_so_long(served, steered, monkeypatch):
    monkeypatch.setattr("proxytune.lanes.completions.TIMEOUT", 0.2)
    model = steered(5)
    served.faults = lambda number, made: ("slow", 0.5, made)
    with pytest.raises(ProxyTuneError, match=r"does not answer \(\w+\) after 7 tries"):
        answers(model, ROWS[:1])


def test_a_wrong_tokenizer_is_refused(oracle, served, tmp_path):
    tokenizer = tiny.tokenizer()
    kept = {token: index for token, index in tokenizer.get_vocab().items() if index < 280}
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    parsed["model"]["vocab"], parsed["model"]["merges"] = kept, parsed["model"]["merges"][:20]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    base = {"api": served.url, "model": "tiny", "tokenizer": str(tmp_path), "top_logprobs": 100}
    with pytest.raises(VocabularyError, match=r"has tokens that the tokenizer .* lacks"):
        ProxyTunedForCausalLM.from_members(base, tiny.llama("mini", 3, vocab_size=280))


def test_a_tokenizer_with_other_ids_is_refused(oracle, served, steered):
    assert steered().lanes[0].endpoint.same_tokenizer
    served.tokenizer = tiny.tokenizer(bos=False)  # that no token is put before a text is no other tokenizer
    assert steered().lanes[0].endpoint.same_tokenizer
    served.tokenizer = tiny.tokenizer(swap=("w", "k"))
    with pytest.raises(VocabularyError, match=r"reads text otherwise .*, first at 'k'"):
        steered()


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_that_tokenizes_is_asked(served, steered, ids):
    served.ids, served.tokenizes = ids, True
    assert steered().lanes[0].endpoint.same_tokenizer
    served.tokenizer = tiny.tokenizer(bos=False)
    assert steered().lanes[0].endpoint.same_tokenizer or not ids
    served.tokenizer = tiny.tokenizer(swap=("w", "k"))
    with pytest.raises(VocabularyError, match=r"reads text otherwise .*, first at "):
        steered()


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ({}, ("after", "the token and its log-probabilities", "not known")),
        ({"raw": True, "details": True}, ("before", "the token and its log-probabilities", True)),
        ({"whole_biases": True}, ("not known", "not known", "not known")),
    ],
)
def test_what_check_finds(oracle, served, steered, behaviour, expected):
    for name, value in behaviour.items():
        setattr(served, name, value)
    endpoint = steered(20).lanes[0].endpoint
    probe(endpoint, bias=True)
    found = findings(endpoint)
    assert tuple(found[name] for name in found if name.startswith(("its log", "at an", "keeps"))) == expected


def test_a_server_without_log_probabilities_is_refused(served, steered, monkeypatch):
    """``transformers serve`` takes the word, and ignores it."""
    whole = served.reply

    def reply(body):
        made = whole(body)
        for choice in made["choices"]:
            del choice["logprobs"]
        return made

    monkeypatch.setattr(served, "reply", reply)
    with pytest.raises(MemberError, match="gives no log-probabilities; steering needs them"):
        steered()


def test_a_limit_of_its_own(served, steered, monkeypatch):
    """Some refuse to give more than so many, others give fewer."""
    whole = served.reply
    monkeypatch.setattr(served, "reply", lambda body: (400, "too many") if body["logprobs"] > 5 else whole(body))
    assert steered(50).lanes[0].endpoint.n == 5


# -- keys and budgets ---------------------------------------------------------------------------------------------
def test_the_key_is_sent_and_never_shown(served, steered, monkeypatch, capsys, caplog, tmp_path):
    served.key = KEY
    monkeypatch.delenv("TINY_KEY", raising=False)
    with pytest.raises(MemberError, match="TINY_KEY, which is empty"):
        steered(key="TINY_KEY")
    monkeypatch.setenv("TINY_KEY", "sk-wrong")
    with pytest.raises(MemberError, match="refuses the API key in TINY_KEY") as caught:
        steered(key="TINY_KEY")
    assert "sk-wrong" not in str(caught.value)
    monkeypatch.setenv("TINY_KEY", KEY)
    model = steered(key="TINY_KEY")
    answers(model, ROWS[:1])
    served.faults = lambda number, made: (400, f"your key {KEY} may not do that")
    with pytest.raises(ProxyTuneError, match=r"your key \*\*\* may not") as caught:
        answers(model, ROWS[:1])
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in str(caught.value) + written + caplog.text + "".join(capsys.readouterr())


def test_budgets_end_a_run(served, steered):
    model = steered(5, way="pull", max_calls=12)
    with pytest.raises(ProxyTuneError, match=r"the budget of 12 requests \(--max-calls\) is spent"):
        answers(model, ROWS[:1])
    assert len(served.requests) <= 12
    with pytest.raises(ProxyTuneError, match=r"the budget of 900 tokens \(--max-tokens\) is spent"):
        answers(steered(5, way="pull", max_tokens=900), [ROWS[0] * 10])


def test_options_of_an_api_need_one(shelf):
    with pytest.raises(RecipeError, match="--max-calls is for a base behind an API"):
        ProxyTunedForCausalLM.from_pretrained(shelf / "recipe", max_calls=3)


# -- commands -----------------------------------------------------------------------------------------------------
@pytest.fixture
def recipe(served, tokens_at, oracle, tmp_path):
    """A recipe made by the command."""
    for name, model in (("expert", oracle.experts[0][1]), ("anti", oracle.experts[0][2])):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    where = ["--base-api", served.url, "--base-model", "tiny", "--base-tokenizer", tokens_at, "--base-top-logprobs", 20]
    members = ["--expert", tmp_path / "expert", "--anti-expert", tmp_path / "anti"]
    run("new", tmp_path / "recipe", *where, *members)
    return tmp_path / "recipe"


def test_the_commands(recipe, served, oracle, tmp_path, no_progress):
    found = json.loads(run("check", recipe, "--json").stdout)
    assert found["works"]
    assert found["server"]["log-probabilities of a token"] == 20
    shown = run("check", recipe).stdout
    assert "several prompts in one request: True" in shown
    assert "it sees: the prompt and the answer so far" in shown

    prompt = "The quick brown"
    ids = tiny.tokenizer()(prompt)["input_ids"]
    result = run("generate", recipe, prompt, "--json", "-n", 8, "--way", "pull")
    answer = json.loads(result.stdout)
    assert answer["way"] == "pull"
    assert answer["calls"] - 1 == len(answer["tokens"]) == len(answer["certified"])
    assert_no_mark_is_wrong(oracle, [ids], [answer["tokens"]], [answer["certified"]])
    n = sum(answer["certified"])
    assert f"{n} of {len(answer['tokens'])} tokens are certain" in result.stderr

    result = run("generate", recipe, prompt, "--json", "-n", 8, "--temperature", 1, "--sample-named")
    answer = json.loads(result.stdout)
    assert all(0 < bound < 1 for bound in answer["tv_bound"])
    assert len(answer["tv_bound"]) == len(answer["tokens"])
    assert not any(answer["certified"])
    assert f"at most {max(answer['tv_bound']):.3f} from the mixture's (total variation)" in result.stderr

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (prompt, "how many", "the dog")))
    job = [
        "generate",
        recipe,
        "--input",
        prompts,
        "--output",
        tmp_path / "out.jsonl",
        "-n",
        6,
        "-b",
        1,
        "--way",
        "pull",
    ]
    spent = run(*job, "--max-calls", 19, status=3).stderr
    assert "budget of 19 requests (--max-calls) is spent; the answers so far are kept" in spent
    assert "the same command continues from there" in spent
    kept = (tmp_path / "out.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 3
    run(*job)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [json.dumps(line) for line in lines[: len(kept)]] == [json.dumps(json.loads(line)) for line in kept]
    assert [line["line"] for line in lines] == [1, 2, 3]


def test_chat_and_the_commands_that_need_the_model(recipe, no_progress, tmp_path):
    talk = run("chat", recipe, "-n", 4, input="Hello\nAnd now?\n/why\n/quit\n")
    assert len(talk.stdout.splitlines()) >= 2
    assert "error: the base's server gives only its top tokens" in talk.stderr
    assert talk.stderr.count("error: ") == 1
    assert "of all tokens" in run("chat", recipe, "--trace", tmp_path / "talk.jsonl", input="Hello\n", status=2).stderr
    for command in (["explain", recipe, "hi"], ["generate", recipe, "hi", "--temperature", 1]):
        assert "of all tokens" in fails(*command)
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"prompt": "The dog", "completion": " runs"}) + "\n", "utf-8")
    assert "does not give all log-probabilities" in fails("limit", recipe, "--input", gold)
    assert "eval compares the answers" in fails("doctor", recipe, "--data", gold, "--output", tmp_path / "doctor")
    assert not (tmp_path / "doctor").exists()
    for command in (["bench", recipe], ["serve", recipe, "--engine", "vllm", "--print"]):
        assert "behind an API" in fails(*command)
    assert "behind an API" in run("check", recipe, "--run", status=2).stderr


def test_a_missing_client_is_named(steered, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ProxyTuneError, match=r"needs openai: pip install 'proxytune\[api\]'"):
        steered()


def test_new_refuses_half_a_base(tmp_path):
    assert "needs --base-tokenizer too" in fails(
        "new", tmp_path / "x", "--base-api", "http://h/v1", "--base-model", "m", "--expert", "e"
    )
    assert "give its URL with --base-api" in fails(
        "new", tmp_path / "x", "--base-key", "K", "--base", "b", "--expert", "e"
    )
    both = ["--base-api", "http://h/v1", "--base-model", "m", "--base-tokenizer", "t", "--base", "b"]
    assert "leave --base and its dtype" in fails("new", tmp_path / "x", *both, "--expert", "e")


@pytest.mark.parametrize("way", ["pull", "ask"])
def test_experts_read_while_the_base_is_asked(served, steered, monkeypatch, way):
    """The server answers only when an expert has read what it was asked about."""
    model = steered(tiny.VOCAB, way=way)
    began, late = threading.Semaphore(0), []
    read = TransformersState.read

    def seen(self, *args, **kwargs):
        began.release()
        return read(self, *args, **kwargs)

    def answered(number, made):
        if not all(began.acquire(timeout=2) for _ in ("expert", "anti-expert")):
            late.append(number)
        return made

    monkeypatch.setattr(TransformersState, "read", seen)
    served.faults = answered
    answers(model, ROWS[:1], max_new_tokens=4)
    assert late == [len(served.requests) - 1]  # at the end the base alone is asked once more


def test_experts_read_a_guess_while_the_server_chooses(served, steered, monkeypatch):
    """The server answers only when expert and anti-expert have read a guess."""
    model = steered(5, way="push")
    arrived, over, late, read = threading.Event(), threading.Event(), [], []
    guess = Ahead.guess

    def seen(self, ids):
        arrived.wait(5)
        guess(self, ids)
        read.append(ids)
        if len(read) % 2 == 0:
            over.set()

    def answered(number, made):
        arrived.set()
        if not over.wait(2):
            late.append(number)
        arrived.clear()
        over.clear()
        return made

    monkeypatch.setattr(Ahead, "guess", seen)
    began = len(served.requests)
    served.faults = answered
    answers(model, ROWS[:1], max_new_tokens=5)
    # Nothing is guessed at the prompt, nor at the last token, and at the end the base alone is asked once more.
    assert [number - began for number in late] == [0, 4, 5]


@pytest.mark.parametrize("few_first", [40, 2_000])
def test_wrong_guesses_change_nothing(oracle, served, steered, few, monkeypatch, few_first):
    few(few_first)
    model = steered(5, way="push")
    guess, read, guessed, n_read = Ahead.guess, TransformersState.read, [], []

    def seen(self, ids):
        guessed.append(int(ids))
        guess(self, ids)

    def counted(self, ids, *args, **kwargs):
        n_read.append(ids.shape[1])
        return read(self, ids, *args, **kwargs)

    monkeypatch.setattr(Ahead, "guess", seen)
    monkeypatch.setattr(TransformersState, "read", counted)
    n_right = 0
    for row in ROWS:
        expected = oracle.greedy(row, N_NEW)[0]
        guessed.clear()
        n_read.clear()
        tokens, asked = answers(model, [row])
        assert tokens == [expected]
        assert all(asked.certified[0])
        assert asked.calls == [N_NEW + 1] or few_first < tiny.VOCAB
        right = [one == token for one, token in zip(guessed[::2], expected[1:-1], strict=True)]  # two lanes guess
        assert n_read.count(1) == 2 * (N_NEW - 1 + right.count(False))  # no column is read twice without need
        n_right += sum(right)
        ended = {"eos_token_id": expected[5], "return_dict_in_generate": True}
        out = model.generate(torch.tensor([row]), **{**GREEDY, **ended})
        assert out.sequences[0, len(row) :].tolist() == expected[: expected.index(expected[5]) + 1]
        assert {state.n_columns for state in out.past_key_values.states} == {out.sequences.shape[1] - 1}
        following = torch.tensor([expected[5:6]])
        for state, lane in list(zip(out.past_key_values.states, model.lanes))[1:]:
            fresh = lane.open(1)
            found, whole = state.read(following).values[:, -1], fresh.read(out.sequences).values[:, -1]
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-3)
    assert 0 < n_right < len(ROWS) * (N_NEW - 2)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # the last two have sliding windows
def test_a_guess_leaves_no_column(family):
    lane = tiny.compose(family_oracle(family)).lanes[1]
    state, plain = lane.open(1), lane.open(1)
    for each in (state, plain):
        each.read(torch.tensor([list(range(3, 43))]))
        each.keep()
    state.begin_drafts(30)
    ahead = Ahead(state)
    tokens = [5, 9, 200, 41, 77, 3, 120, 8]
    for at, token in enumerate(tokens):
        ids = torch.tensor([[token]])
        assert torch.equal(ahead.read(ids).values, plain.read(ids).values)
        if at % 4 > 0:  # one is not guessed, one right, two wrong
            ahead.guess(torch.tensor([[tokens[at + 1] if at % 4 == 1 else 50]]))
        ahead.keep([1])
        plain.keep([1])
    ahead.settle()
    assert state.n_columns == plain.n_columns


def test_calls_of_many_rows_are_under_way_at_once(served, steered):
    model = steered(5, way="pull")
    served.faults = lambda number, made: ("slow", 0.15, made)
    began = time.monotonic()
    answers(model, ROWS * 2, max_new_tokens=3)
    assert time.monotonic() - began < 6 * 3 * 0.15
