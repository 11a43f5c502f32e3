"""The faults of a server that speaks OpenAI's completions route: from a good reply to a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def hurry(monkeypatch: Any) -> None:
    """Waits between tries are short."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.002)
    monkeypatch.setattr("proxytune.lanes.completions.PAUSE", 0.001)


def spoiled(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reply in which ``change`` was done to the first choice's log-probabilities."""

    def spoil(made: Any) -> Any:
        change(made["choices"][0]["logprobs"])
        return made

    return spoil


def top(logprobs: Any) -> Any:
    return logprobs["top_logprobs"][-1]


# name -> from a good reply to what is sent in its place
PASSING: dict[str, Callable[[Any], Any]] = {
    "drop": lambda made: "drop",
    "a 500": lambda made: (500, "oops"),
    "a 503": lambda made: (503, "overloaded"),
    "a 429": lambda made: (429, "slow down", {"Retry-After": "0.01"}),
    "no JSON": lambda made: (200, json.dumps(made)[:-20]),
    "HTML": lambda made: (200, "<html>busy</html>"),
    "no choices": lambda made: {**made, "choices": []},
    "an empty object": lambda made: {},
    "a list": lambda made: [],
    "a choice too many": lambda made: {**made, "choices": made["choices"] * 2},
    "another prompt": lambda made: {**made, "usage": {"prompt_tokens": 3}},
    "another text": spoiled(lambda lp: lp.update(text_offset=[3])),
    "no log-probabilities": spoiled(lambda lp: lp.update(tokens=[], token_logprobs=[], top_logprobs=[])),
    "two tokens": spoiled(lambda lp: lp.update(tokens=lp["tokens"] * 2)),
    "another token": spoiled(lambda lp: lp.update(tokens=[min(top(lp), key=top(lp).get)])),
    "other values": spoiled(lambda lp: top(lp).update({token: value / 2 for token, value in top(lp).items()})),
    "a positive one": spoiled(lambda lp: top(lp).update({next(iter(top(lp))): 1.0})),
    "too many": spoiled(lambda lp: top(lp).update({"a": -30.0, "b": -30.0, "c": -30.0})),
    "a token twice": lambda made: (
        200,
        json.dumps(made).replace('"top_logprobs": [{', '"top_logprobs": [{"a": -9, "a": -9, '),
    ),
    "texts for numbers": spoiled(lambda lp: top(lp).update({next(iter(top(lp))): "high"})),
}


def padded(made: Any) -> Any:
    """The reply without all tokens but the drawn one, which is what vLLM sends if a batch mixes kinds of requests."""
    for column in columns(made):
        column.update({token: -9999.0 for token in list(column)[1:]})
    return made


def first_two(made: Any) -> Any:
    """The reply without all tokens but two, as if the others had the same texts."""
    for column in columns(made):
        for token in list(column)[2:]:
            del column[token]
    return made


def columns(made: Any) -> list[dict[str, Any]]:
    """The most probable tokens at each place, in all choices."""
    return [column for choice in made["choices"] for column in choice["logprobs"]["top_logprobs"] if column is not None]
