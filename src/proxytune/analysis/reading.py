"""Explanations from files: our traces, and what other programs log in OpenAI's form.

What a log does not record is left out, never set to 0. The views show it as unknown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.analysis.explanation import Explanation
from proxytune.answers.files import read_json
from proxytune.answers.traces import SCHEMA, is_trace
from proxytune.errors import ProxyTuneError

__all__ = ["read_explanations", "read_traces"]

UNKNOWN_LOG = -9999.0  # OpenAI's value for a token that is not among the most probable ones
NUMBERS = ("base_logprob", "mixture_logprob", "base_rank", "base_entropy", "entropy", "kl")


class Wrong(Exception):
    """What is wrong with one value. The caller adds its place."""


def read_explanations(path: Path) -> list[Callable[[], Explanation]]:
    """The answers of a file, in order, as functions that read one answer each.

    The file holds traces (one JSON object per line, as ``proxytune generate --trace`` writes them), or responses of
    OpenAI's chat completions or completions with log-probabilities: one object, a list, or one per line. Each choice of
    a response is an answer.

    Raises:
        ProxyTuneError: for a file that is neither.
    """
    answers: list[tuple[Callable[[Mapping[str, Any]], Explanation], Mapping[str, Any]]] = []
    for number, value in enumerate(_values(path), start=1):
        schema = value.get("schema") if isinstance(value, Mapping) else None
        choices = value.get("choices") if isinstance(value, Mapping) else None
        if is_trace(value):
            answers.append((_of_trace, value))
        elif isinstance(schema, str) and schema.startswith("proxytune.trace/"):
            raise ProxyTuneError(f"{path}: its traces are {schema}, and this version of proxytune reads {SCHEMA}")
        elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
            answers += [(_of_choice, choice) for choice in choices]
        elif isinstance(value, Mapping) and value.get("error"):
            error = value["error"]
            said = (error.get("message") or error) if isinstance(error, Mapping) else error
            raise ProxyTuneError(f"{path}: object {number} is a server's error: {said}")
        else:
            raise ProxyTuneError(
                f"{path}: object {number} is neither a trace of `generate --trace` nor an OpenAI response with choices"
            )
    if not answers:
        raise ProxyTuneError(f"{path} holds no answer")

    def reader(number: int, read: Callable[[Mapping[str, Any]], Explanation], value: Any) -> Callable[[], Explanation]:
        def made() -> Explanation:
            try:
                return read(value)
            except Wrong as error:
                raise ProxyTuneError(f"{path}: answer {number}: {error}") from error

        return made

    return [reader(number, *answer) for number, answer in enumerate(answers, start=1)]


def read_traces(path: Path) -> Iterator[Explanation]:
    """The answers of a file of traces, one after another.

    Raises:
        ProxyTuneError: names the line that is not a trace.
    """
    for row in read_json(path):
        try:
            if not is_trace(row.value):
                raise Wrong(f"it is not a trace ({SCHEMA}); --trace of generate, chat and eval writes traces")
            yield _of_trace(row.value)
        except Wrong as error:
            raise ProxyTuneError(f"{row.where} of {path}: {error}") from error


def _values(path: Path) -> list[Any]:
    """The objects of a file: one over many lines, a list of them, or one per line."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return [row.value for row in read_json(path)]
    return value if isinstance(value, list) else [value]


# -- our traces -----------------------------------------------------------------------------------------------
def _of_trace(value: Mapping[str, Any]) -> Explanation:
    alpha = _mapping(value, "alpha", "the trace")
    if not all(_is_number(each) for each in alpha.values()):
        raise Wrong("its alpha is not a number for each expert")
    tokens = _list(value, "tokens", "the trace")
    for name in ("prompt", "text"):
        if not isinstance(value.get(name), str):
            raise Wrong(f"its {name} is not a text")
    made = [_token(token, list(alpha), alpha, f"tokens[{at}]") for at, token in enumerate(tokens)]
    return Explanation(value["prompt"], value["text"], alpha, made)


def _token(value: Any, names: Sequence[str], alpha: Mapping[str, float], where: str) -> dict[str, Any]:
    token = _named(value, where)
    token |= {name: _number(value, name, where) for name in NUMBERS}
    changed, origin = value.get("changed"), value.get("origin")
    if not isinstance(changed, bool | None) or not isinstance(origin, str | None):
        raise Wrong(f"{where}: changed is not true or false, or origin is not a word")
    offsets = _by_expert(value, "offsets", names, where)
    candidates = [
        _candidate(each, names, f"{where}.candidates[{at}]")
        for at, each in enumerate(_list(value, "candidates", where, []))
    ]
    known = [each for each in (token["mixture_logprob"], token["base_logprob"], *offsets.values()) if each is not None]
    if len(known) == 2 + len(names):
        # The mixture is base + the sum of offsets + one number for all tokens, which follows from the written token.
        constant = known[0] - sum(known[1:])
        for each in candidates:
            _complete(each, alpha, constant)
    return {
        **token,
        "changed": changed,
        "origin": origin,
        "offsets": offsets,
        "candidates": candidates,
        "flips": _flips(value, names, where),
        "conflict": _conflict(value, where),
    }


def _candidate(value: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    made = _named(value, where)
    made |= {name: _number(value, name, where) for name in NUMBERS[:2] if name in value}
    for name in ("delta", "expert_logprob"):
        made[name] = _by_expert(value, name, names, where)
    return {**made, "masked": bool(value.get("masked"))}


def _complete(each: dict[str, Any], alpha: Mapping[str, float], constant: float) -> None:
    """Compute a candidate's log-probability in the mixture, if the trace has none."""
    if "mixture_logprob" in each or each["masked"]:
        return
    parts = [each.get("base_logprob"), *(each["delta"].get(name) for name in alpha)]
    if None not in parts:
        pushes = (weight * each["delta"][name] for name, weight in alpha.items())
        each["mixture_logprob"] = each["base_logprob"] + sum(pushes) + constant


def _conflict(value: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    found = value.get("conflict")
    if found is None:
        return None
    if not isinstance(found, Mapping) or not _is_number(found.get("distance")):
        raise Wrong(f"{where}: its conflict has no distance")
    cosine = found.get("cosine")
    if cosine is not None and not _is_number(cosine):
        raise Wrong(f"{where}: the cosine of its conflict is not a number")
    return {"cosine": cosine, "distance": found["distance"], "disagree": bool(found.get("disagree"))}


def _flips(value: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, list[list[Any]]]:
    flips = _mapping(value, "flips", where, {})
    for steps in flips.values():
        if not isinstance(steps, list) or not all(
            isinstance(step, list) and len(step) == 2 and _is_number(step[0]) and _is_id(step[1]) for step in steps
        ):
            raise Wrong(f"{where}: flips are not lists of [alpha, id]")
    return {name: flips[name] for name in names if name in flips}


# -- other programs' logs -------------------------------------------------------------------------------------
def _of_choice(choice: Mapping[str, Any]) -> Explanation:
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        asked = '"logprobs": 5' if "text" in choice else '"logprobs": true, "top_logprobs": 5'
        raise Wrong(f"it has no logprobs; ask the server for them ({asked})")
    ids = _Ids()
    message = choice.get("message")
    if isinstance(logprobs.get("content"), list):
        tokens = [_chat_token(each, ids, f"content[{at}]") for at, each in enumerate(logprobs["content"])]
        text = message.get("content") if isinstance(message, Mapping) else None
    elif isinstance(logprobs.get("tokens"), list):
        tokens, text = list(_completion_tokens(logprobs, ids)), choice.get("text")
    else:
        raise Wrong("its logprobs have neither content (chat completions) nor tokens (completions)")
    return Explanation(None, text if isinstance(text, str) else ids.text(tokens), {}, tokens)


class _Ids:
    """Numbers for tokens without ids in a log: one for each text, or each sequence of bytes."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def token(self, raw: bytes) -> dict[str, Any]:
        return {"id": self.known.setdefault(raw, len(self.known)), "token": raw.decode("utf-8", "replace")}

    def text(self, tokens: Sequence[Mapping[str, Any]]) -> str:
        """The text of tokens, with parts of characters joined."""
        raw = list(self.known)
        return b"".join(raw[token["id"]] for token in tokens).decode("utf-8", "replace")


def _chat_token(value: Any, ids: _Ids, where: str) -> dict[str, Any]:
    written = _logged(value, ids, where)
    others = [
        _logged(each, ids, f"{where}.top_logprobs[{at}]")
        for at, each in enumerate(_list(value, "top_logprobs", where, []))
    ]
    return _with_candidates(written, others)


def _logged(value: Any, ids: _Ids, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("token"), str):
        raise Wrong(f"{where} has no token, or one that is not a text")
    raw = value.get("bytes")
    if raw is not None and not (isinstance(raw, list) and all(_is_id(each) and each < 256 for each in raw)):
        raise Wrong(f"{where}: bytes is not a list of bytes")
    made = ids.token(_raw(value["token"]) if raw is None else bytes(raw))
    return {**made, **_log(_number(value, "logprob", where))}


def _completion_tokens(logprobs: Mapping[str, Any], ids: _Ids) -> Iterator[dict[str, Any]]:
    texts = logprobs["tokens"]
    logs, tops = (
        logprobs[name] if logprobs.get(name) is not None else [None] * len(texts)
        for name in ("token_logprobs", "top_logprobs")
    )
    if not all(isinstance(each, list) and len(each) == len(texts) for each in (logs, tops)):
        raise Wrong("tokens, token_logprobs and top_logprobs are not lists of one length")
    for at, (text, log, top) in enumerate(zip(texts, logs, tops)):
        where = f"tokens[{at}]"
        if not isinstance(text, str) or not isinstance(top, Mapping | None):
            raise Wrong(f"{where} is not a text, or its top_logprobs are not an object")
        written = {**ids.token(_raw(text)), **_log(_number({"logprob": log}, "logprob", where))}
        tried: Mapping[str, Any] = top or {}
        others = [{**ids.token(_raw(name)), **_log(_number(tried, name, where))} for name in tried]
        yield _with_candidates(written, others)


def _with_candidates(written: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """A token with its candidates, including itself. Of several candidates with the same text only the most probable is
    kept."""
    unique: dict[int, dict[str, Any]] = {}
    for each in (written, *others):
        unique.setdefault(each["id"], each)
    ordered = sorted(unique.values(), key=lambda each: -each.get("mixture_logprob", -math.inf))
    return {**written, "candidates": ordered}


def _log(value: float | None) -> dict[str, float]:
    return {} if value is None or value <= UNKNOWN_LOG else {"mixture_logprob": value}


def _raw(text: str) -> bytes:
    r"""A token's bytes; completions write a part of a character as ``bytes:\xf0\x9f``."""
    if re.fullmatch(r"bytes:(\\x[0-9a-fA-F]{2})+", text):
        return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    return text.encode("utf-8", "surrogatepass")


# -- values ---------------------------------------------------------------------------------------------------
def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _named(value: Any, where: str) -> dict[str, Any]:
    """A token's id and text."""
    if not isinstance(value, Mapping) or not _is_id(value.get("id")) or not isinstance(value.get("token"), str):
        raise Wrong(f"{where} must have an id (a number from 0) and a token (a text)")
    return {"id": value["id"], "token": value["token"]}


def _number(value: Mapping[str, Any], name: str, where: str) -> float | None:
    found = value.get(name)
    if isinstance(found, float) and not math.isfinite(found):
        return None
    if found is not None and not _is_number(found):
        raise Wrong(f"{where}: {name} is {found!r}, which is not a number")
    return found


def _mapping(value: Mapping[str, Any], name: str, where: str, default: Any = None) -> Mapping[str, Any]:
    found = value.get(name, default)
    if not isinstance(found, Mapping):
        raise Wrong(f"{where}: {name} is not an object")
    return found


def _list(value: Mapping[str, Any], name: str, where: str, default: Any = None) -> list[Any]:
    found = value.get(name)
    found = default if found is None else found
    if not isinstance(found, list):
        raise Wrong(f"{where}: {name} is not a list")
    return found


def _by_expert(value: Mapping[str, Any], name: str, names: Sequence[str], where: str) -> dict[str, float | None]:
    found = _mapping(value, name, where, {})
    return {each: _number(found, each, f"{where}: {name}") for each in names if each in found}
