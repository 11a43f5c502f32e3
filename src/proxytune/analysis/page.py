"""An explanation as one HTML page that needs no network and no other file.

The page is page.html with page.css and page.js put into it, and the explanation as JSON. No text of an answer becomes
HTML: the script reads the JSON and sets text only, and the content security policy allows this script alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from proxytune.analysis.explanation import KINDS, Explanation, expert_choice, probability

__all__ = ["framed", "page"]

MOVES = 10  # in the table
DIGITS = 4  # of log-probabilities


def page(why: Explanation) -> str:
    """The page."""
    template, style, script = (_part(f"page.{kind}") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # The data come last, so that nothing in them is replaced.
    for name, text in (("POLICY", policy), ("STYLE", style), ("SCRIPT", script), ("DATA", _json(_data(why)))):
        template = template.replace(f"%{name}%", text, 1)
    return template


def framed(why: Explanation) -> str:
    """The page in a frame of its own, which cannot reach the notebook around it."""
    return (
        f'<iframe title="Why each token was chosen" sandbox="allow-scripts" srcdoc="{html.escape(page(why))}" '
        'style="width: 100%; height: 42em; border: 1px solid #8888"></iframe>'
    )


def _part(name: str) -> str:
    return files("proxytune.analysis").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """The hash of a script or style for the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that cannot end a script element, whatever it contains."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


# -- what the script reads ------------------------------------------------------------------------------------
def _data(why: Explanation) -> dict[str, Any]:
    names = list(why.alpha)
    return {
        "prompt": why.prompt,
        "steered": why.steered,
        "experts": names,
        "alpha": [why.alpha[name] for name in names],
        "kinds": {kind: KINDS[kind] for kind in KINDS if kind in why.totals.kinds},
        "pieces": [[piece.text, piece.first, piece.n_tokens, int(piece.special)] for piece in why.pieces],
        "texts": _texts(why.tokens),
        "tokens": [_token(why, at, names) for at in range(len(why.tokens))],
        "moves": why.moves(MOVES),
        "command": _command(why),
        "own": [[name, text] for name, text in why.own.items()],
        "totals": {
            "count": why.totals.n_tokens,
            "kinds": why.totals.kinds,
            "kl": why.totals.kl,
            "conflict": why.totals.conflict,
            "promoted": [[text, round(shift, DIGITS)] for text, shift in why.totals.promoted],
            "demoted": [[text, round(shift, DIGITS)] for text, shift in why.totals.demoted],
        },
    }


def _command(why: Explanation) -> list[list[str]] | None:
    """The words before and after the place for further options; None if there is no command."""
    words = list(why.command)
    at = words.index("--") if "--" in words else len(words)
    return [words[:at], words[at:]] if words else None


def _texts(tokens: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Id -> text, for every token that the page names."""
    found: dict[int, str] = {}
    for token in tokens:
        found |= {each["id"]: each["token"] for each in (token, *(token.get("candidates") or ()))}
        found |= token.get("texts") or {}
    return found


def _token(why: Explanation, at: int, names: Sequence[str]) -> dict[str, Any]:
    """One token, without what is unknown; a candidate is a list, since there are many."""
    token = why.tokens[at]
    fields = ("base_logprob", "mixture_logprob", "base_rank", "base_entropy", "entropy", "kl", "origin")
    choices = [expert_choice(token, name) for name in names]
    flips = token.get("flips") or {}
    return {
        "id": token["id"],
        "kind": why.kind(at),
        **{name: _short(token[name]) for name in fields if token.get(name) is not None},
        "offsets": [_short((token.get("offsets") or {}).get(name)) for name in names],
        "choices": [
            each and [each["id"], _short(probability(each["expert_logprob"], name))]
            for each, name in zip(choices, names)
        ],
        "candidates": [
            [
                each["id"],
                _short(each.get("base_logprob")),
                _short(each.get("mixture_logprob")),
                [_short((each.get("delta") or {}).get(name)) for name in names],
                int(bool(each.get("masked"))),
            ]
            for each in token.get("candidates") or ()
        ],
        "flips": [[[_short(alpha), id_] for alpha, id_ in flips.get(name) or ()] for name in names],
    }


def _short(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
