"""A base that a real vLLM server has, over its API: every way gives the plain loop's tokens."""

from __future__ import annotations

import sys

import pytest
from transformers import AutoModelForCausalLM

from proxytune import ProxyTunedForCausalLM, ProxyTuneError
from proxytune.generation_mixin import last_asked
from support import faults, tiny
from support.completions import Proxy, Served, serving
from support.decoding import near, new_tokens
from support.oracle import Oracle, assert_same_tokens
from support.served import running, wide

pytestmark = pytest.mark.slow
ROWS = [[1, 40, 77, 102, 9], [1, 88, 15]]
N_NEW = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model = wide(root / "base", "llama", "base", 1)
    # vLLM takes this as the default of each request; steering is of the model's own probabilities.
    (model / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    return root


@pytest.fixture(scope="module")
def url(place):
    words = ["--model", str(place / "base"), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-logprobs", "-1", "--max-num-seqs", "16"]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    with running(program, place / "log", VLLM_ENABLE_V1_MULTIPROCESSING="1") as own:
        yield own


@pytest.fixture(scope="module")
def oracle(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return Oracle(base, [("e", near(base, 2), near(base, 3), 1.0)])


def load(place, oracle, url, n, way):
    """The composite whose base is at a URL."""
    member = {"api": url, "model": "tiny", "tokenizer": str(place / "base"), "top_logprobs": n}
    experts = [{"expert": e, "anti_expert": a, "alpha": alpha} for _, e, a, alpha in oracle.experts]
    return ProxyTunedForCausalLM.from_members(member, experts=experts, way=way)


def answers(model, rows=ROWS):
    tokens = new_tokens(model, rows, max_new_tokens=N_NEW)
    return tokens, last_asked(model).certified


def assert_marks_are_right(oracle, rows, tokens, certified):
    for row, own, marks in zip(rows, tokens, certified):
        for at, (token, certain) in enumerate(zip(own, marks)):
            assert not certain or token == int(oracle.logits(row, own[:at])[-1].argmax())


@pytest.mark.parametrize("n", [5, tiny.VOCAB])
@pytest.mark.parametrize("way", ["pull", "ask", "verify", "push"])
def test_every_way(place, oracle, url, n, way):
    model = load(place, oracle, url, n, way)
    offer = model.lanes[0].endpoint.offer
    assert offer.ids
    assert offer.lists
    assert offer.numbered
    assert offer.named
    assert offer.echoes
    assert model.lanes[0].endpoint.same_tokenizer
    tokens, certified = answers(model)
    assert_marks_are_right(oracle, ROWS, tokens, certified)
    if way != "pull" or n == tiny.VOCAB:
        for row, own, marks in zip(ROWS, tokens, certified):
            assert_same_tokens(own, oracle.greedy(row, N_NEW))
            assert all(marks)


# -- faults between the client and the server ----------------------------------------------------------------------
@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    faults.hurry(monkeypatch)


@pytest.fixture(scope="module")
def whole_proxy(url):
    proxy = Proxy(url)
    with serving(proxy):
        yield proxy


@pytest.fixture
def proxy(whole_proxy, url):
    yield whole_proxy
    whole_proxy.target, whole_proxy.faults, whole_proxy.altered = url, None, None


def behind(place, oracle, proxy, way):
    """The composite whose base is behind the proxy, and its answers without faults."""
    model = load(place, oracle, proxy.url, 5, way)
    expected = answers(model)
    assert all(map(all, expected[1]))
    return model, expected


@pytest.fixture(scope="module", params=["ask", "verify", "push"])
def through(request, place, oracle, whole_proxy):
    return behind(place, oracle, whole_proxy, request.param)


@pytest.fixture(scope="module")
def asking(place, oracle, whole_proxy):
    return behind(place, oracle, whole_proxy, "ask")


@pytest.mark.parametrize("fault", faults.PASSING)
def test_a_fault_that_passes_changes_nothing(through, proxy, fault):
    model, expected = through
    began = len(proxy.requests)
    proxy.faults = lambda number, made: faults.PASSING[fault](made) if number - began in (0, 2, 3) else made
    assert answers(model) == expected


@pytest.mark.parametrize("fault", faults.PASSING)
def test_a_fault_that_stays_gives_no_wrong_answer(asking, proxy, fault):
    """By one way alone: replies are checked in one place."""
    model, expected = asking
    proxy.faults = lambda number, made: faults.PASSING[fault](made)
    if fault == "another text":  # vLLM gives the place of a token in the answer alone
        assert answers(model) == expected
    else:
        with pytest.raises(ProxyTuneError, match="the server of the base tiny"):
            answers(model)
    proxy.faults = None
    assert answers(model) == expected


def test_slow_replies_are_asked_for_again(through, proxy, monkeypatch):
    model, expected = through
    monkeypatch.setattr(model.lanes[0].endpoint.client, "timeout", 1.0)
    began = len(proxy.requests)
    proxy.faults = lambda number, made: ("slow", 1.5, made) if number == began else made
    assert answers(model) == expected


def test_replies_to_other_prompts_are_asked_for_again(through, proxy):
    """Of the same length, so that only the returned ids tell."""
    model, expected = through
    began = len(proxy.requests)

    def altered(number, body):
        prompt = body["prompt"]
        if number - began not in (0, 1, 4):
            return body
        other = [
            [*one[:-1], (one[-1] + 1) % tiny.VOCAB] for one in (prompt if isinstance(prompt[0], list) else [prompt])
        ]
        return {**body, "prompt": other if isinstance(prompt[0], list) else other[0]}

    proxy.altered = altered
    assert answers(model) == expected
    began = -(10**9)
    proxy.altered = lambda number, body: altered(began, body)
    with pytest.raises(ProxyTuneError, match="the reply to another prompt"):
        answers(model)


def test_choices_in_another_order(through, proxy):
    model, expected = through
    proxy.faults = lambda number, made: {**made, "choices": made["choices"][::-1]}
    assert answers(model) == expected


@pytest.mark.parametrize("short", [faults.padded, faults.first_two])
def test_fewer_log_probabilities(oracle, through, proxy, short):
    model, expected = through
    began = len(proxy.requests)
    proxy.faults = lambda number, made: short(made) if number - began in (0, 3) else made
    assert answers(model) == expected
    proxy.faults = lambda number, made: short(made)
    tokens, certified = answers(model)
    assert_marks_are_right(oracle, ROWS, tokens, certified)
    proxy.faults = None
    assert answers(model) == expected


def test_a_model_that_is_swapped_ends_the_run(through, proxy):
    """Under its name, and under another one."""
    model, _ = through
    other = Served(tiny.llama("base", 7), tiny.tokenizer(), words=True, scores=True)
    began, target = len(proxy.requests), proxy.target

    def altered(number, body):
        proxy.target = other if number - began >= 3 else target
        return body

    proxy.altered = altered
    with pytest.raises(ProxyTuneError, match=r"two different replies to one prompt|named twice|cannot be right"):
        answers(model)
    proxy.target, proxy.altered = target, None
    began = len(proxy.requests)
    proxy.faults = lambda number, made: {**made, "model": "another"} if number - began >= 2 else made
    with pytest.raises(ProxyTuneError, match="answered as 'tiny' first and now as 'another'"):
        answers(model)
