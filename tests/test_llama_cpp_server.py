"""Replies in the form that llama.cpp's server documents: what is known from each. No such server runs here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from proxytune.lanes.completions import BadReply, Budget, Endpoint, NoLogprobs, Offer
from proxytune.lanes.spelling import Spelling
from proxytune.recipe.parts import parse_base
from support import tiny

TEXT = [1, 40, 77]


@pytest.fixture
def endpoint():
    base = parse_base({"api": "http://host/v1", "model": "m", "tokenizer": "t", "server": "llama.cpp"})
    tokenizer = tiny.tokenizer()
    made = Endpoint(base, Spelling(tokenizer, tiny.VOCAB), tokenizer, Budget())
    made.offer = Offer(ids=True)
    return made


def entry(index, logprob, token="x", **more):
    return {"id": index, "token": token, "bytes": list(token.encode()), "logprob": logprob, **more}


def completion(*parts, index=0, n_read=3, finish="length"):
    """A reply of /v1/completions to one prompt."""
    return {
        "choices": [
            {
                "text": "x",
                "index": index,
                "logprobs": {"content": list(parts)} if parts else None,
                "finish_reason": finish,
            }
        ],
        "created": 1700000000,
        "model": "m",
        "system_fingerprint": "b1-abc",
        "object": "text_completion",
        "usage": {
            "completion_tokens": 1,
            "prompt_tokens": n_read,
            "total_tokens": n_read + 1,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "id": "chatcmpl-1",
    }


def part(first=50):
    top = [entry(first, -0.5), entry(60, -1.5), entry(61, -2.5)]
    return entry(first, -0.5, top_logprobs=top)


def test_ids_name_the_tokens(endpoint):
    (reply,) = endpoint._read(completion(part()), [TEXT], 3)
    assert reply.known.logprobs == {50: -0.5, 60: -1.5, 61: -2.5}  # whatever the texts are
    assert reply.known.bound == pytest.approx(-2.5)
    assert reply.numbered
    assert endpoint.cached == 2


def test_values_that_stand_for_zero_are_not_known(endpoint):
    """A probability of 0 is written as the smallest float."""
    top = [entry(50, -1e-3), entry(60, -3.4028234663852886e38)]
    (reply,) = endpoint._read(completion(entry(50, -1e-3, top_logprobs=top)), [TEXT], 2)
    assert reply.known.logprobs == {50: -1e-3}
    assert reply.known.bound >= math.log(1e-3) - 1e-6


def test_a_choice_outside_the_list_is_added(endpoint):
    """At temperature 1 the drawn token need not be among the most probable; its value is the list's k + 1st."""
    endpoint.offer = Offer(ids=True, temperature=1.0)
    top = [entry(60, -2.0), entry(61, -2.5)]
    (reply,) = endpoint._read(completion(entry(50, -4.0, top_logprobs=top)), [TEXT], 2)
    assert reply.known.logprobs == {60: -2.0, 61: -2.5, 50: -4.0}
    assert reply.known.bound == pytest.approx(-2.5)


@pytest.mark.parametrize("form", ["joined", "one by one"])
def test_several_prompts(endpoint, form):
    """Newer versions join the choices and count the first prompt alone; older ones send a list of replies."""
    whole = [completion(part(50), n_read=2), completion(part(51), index=1)]
    value = whole if form == "one by one" else {**whole[0], "choices": [one["choices"][0] for one in whole]}
    first, second = endpoint._read(value, [TEXT[:2], TEXT], 3)
    assert (max(first.known.logprobs.values()), 50 in first.known.logprobs) == (-0.5, True)
    assert 51 in second.known.logprobs
    with pytest.raises(BadReply, match="choices"):
        endpoint._read([whole[0], {"error": "busy"}], [TEXT[:2], TEXT], 3)
    with pytest.raises(BadReply, match="several models"):
        endpoint._read([whole[0], {**whole[1], "model": "other"}], [TEXT[:2], TEXT], 3)


def test_an_end_token(endpoint):
    (reply,) = endpoint._read(completion(part(tiny.EOS), finish="stop"), [TEXT], 3)
    assert reply.known.logprobs[tiny.EOS] == -0.5
    assert reply.ended


def test_probabilities_after_sampling_are_refused(endpoint):
    """``post_sampling_probs``, which nothing asks for, has other names and other numbers."""
    top = [{"id": 50, "token": "x", "bytes": [120], "prob": 0.6}]
    after = {"id": 50, "token": "x", "bytes": [120], "prob": 0.6, "top_probs": top}
    with pytest.raises(BadReply, match="OpenAI's form"):
        endpoint._read(completion(after), [TEXT], 1)


def test_no_log_probabilities(endpoint):
    with pytest.raises(NoLogprobs):
        endpoint._read(completion(), [TEXT], 3)


def test_bytes_name_a_token_that_has_no_id(endpoint):
    """As OpenAI's chat route writes it."""
    index, byte = next(
        (ids[0], spelled[0])
        for spelled, ids in endpoint.spelling.ids.items()
        if isinstance(spelled, bytes) and len(spelled) == 1 and spelled[0] >= 0x80 and len(ids) == 1
    )
    one = {"token": "\ufffd", "bytes": [byte], "logprob": -0.5}
    (reply,) = endpoint._read(completion({**one, "top_logprobs": [one]}), [TEXT], 1)
    assert reply.known.logprobs == {index: -0.5}


def test_a_penalty_is_turned_off_by_its_own_word(endpoint, monkeypatch):
    sent = []

    def create(**words):
        sent.append(words["extra_body"])
        return SimpleNamespace(http_response=SimpleNamespace(text="{}"))

    raw = SimpleNamespace(with_raw_response=SimpleNamespace(create=create))
    monkeypatch.setattr(endpoint, "client", SimpleNamespace(completions=raw, close=lambda: None))
    endpoint._post(TEXT, 1, 4, {})
    assert sent == [{"repetition_penalty": 1.0, "repeat_penalty": 1.0}]
