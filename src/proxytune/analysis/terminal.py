"""An explanation as text: the answer with its tokens marked, and the table of the largest moves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from proxytune.analysis.explanation import KINDS, Explanation, base_choice, expert_choice, probability
from proxytune.recipe.alpha import MAX_ALPHA
from proxytune.tables import Table

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["legend", "marked", "moves_table", "shaded", "totals_lines"]

MARKS = {"changed": ("⟦", "⟧"), "strengthened": ("⟨", "⟩")}  # without colours
LEVELS = (0.5, 1.5)  # nats; from each value on, the shade is darker
# People who cannot see red or green can distinguish orange and blue; everyone can distinguish bold and underlined.
STYLES = {
    # color(16) is black everywhere; a terminal's "black" may be grey, above all in bold.
    "changed": tuple(f"bold color(16) on color({shade})" for shade in (223, 215, 208)),
    "strengthened": tuple(f"underline color(16) on color({shade})" for shade in (153, 117, 75)),
    "given": ("dim",) * 3,
}
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
UNKNOWN = "unknown"


def marked(why: Explanation) -> str:
    """The answer with a pair of brackets around each token that steering changed or strengthened."""
    parts = []
    for piece in why.pieces:
        before, after = MARKS.get(why.kind(piece.first), ("", ""))
        parts.append(before + visible(piece.text) + after)
    return "".join(parts)


def shaded(why: Explanation) -> Text:
    """The answer for a terminal with styles. The further steering moved a token, the darker it is."""
    from rich.text import Text

    text = Text()
    for piece in why.pieces:
        kl = why.tokens[piece.first].get("kl") or 0.0
        level = sum(kl >= bound for bound in LEVELS)
        text.append(visible(piece.text), STYLES.get(why.kind(piece.first), ("",) * 3)[level])
    return text


def visible(text: str) -> str:
    """Text without control characters, which a terminal would execute."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def legend(why: Explanation, *, styled: bool) -> str:
    """The meaning of the marks in the answer."""
    if not why.steered:
        return "This log does not record what steering did."
    plain = {kind: "".join(pair) for kind, pair in MARKS.items()}
    signs = {"changed": "bold, orange", "strengthened": "underlined, blue"} if styled else plain
    found = [f"{sign}: {kind}, {KINDS[kind]}." for kind, sign in signs.items() if why.totals.kinds.get(kind)]
    given = [f"The first {why.n_given} tokens were given."] if why.n_given else []
    return "\n".join([*(found or ["Steering changed no token."]), *given])


def moves_table(why: Explanation, k: int) -> Table:
    """The k tokens that steering moved furthest, with what the base and each expert would have written."""
    if not why.steered:
        return _log_table(why, k)
    several = len(why.alpha) > 1
    experts = {name: f"expert {name}" if several else "expert" for name in why.alpha}
    rows = []
    for at in why.moves(k):
        token = why.tokens[at]
        rows.append(
            (
                str(at + 1),
                quoted(token["token"]),
                _short(token.get("kl")),
                _choice(base_choice(token), "base_logprob"),
                *(_choice(expert_choice(token, name), "expert_logprob", name) for name in experts),
                f"{_short(probability(token, 'base_logprob'))} → {_short(probability(token, 'mixture_logprob'))}",
                why.kind(at),
                "" if several else _from_alpha(token, next(iter(why.alpha)), next(iter(why.alpha.values()))),
            )
        )
    heads = ("token", "written", "KL", "base", *experts.values(), "base → steered", "what", "from alpha")
    return Table(
        heads,
        rows,
        title="The largest moves",
        legend={
            "KL": "how far steering moved all probabilities here, in nats",
            "base → steered": "the written token's probability in the base and steered",
            "from alpha": "the smallest alpha from which on greedy decoding writes it here, after the same text",
        },
    )


def _log_table(why: Explanation, k: int) -> Table:
    rows = []
    for at in why.moves(k):
        token = why.tokens[at]
        others = [each for each in token.get("candidates") or () if each["id"] != token["id"]]
        best = max(others, key=lambda each: each.get("mixture_logprob") or -1e9, default=None)
        rows.append(
            (
                str(at + 1),
                quoted(token["token"]),
                _short(probability(token, "mixture_logprob")),
                _choice(best, "mixture_logprob"),
            )
        )
    return Table(("token", "written", "probability", "likeliest other"), rows, title="The least probable tokens")


def totals_lines(why: Explanation) -> str:
    """The totals in a few lines."""
    if not why.steered:
        return f"{len(why.tokens)} tokens"
    totals = why.totals
    counts = ", ".join(f"{count} {kind}" for kind, count in totals.kinds.items())
    mean = "" if totals.kl is None else f"; mean KL {totals.kl:.2f} nats"
    lines = [f"{len(why.tokens)} tokens: {counts or 'none'}{mean}"]
    if totals.conflict is not None:
        lines.append(totals.conflict)
    for word, pairs in (("promoted", totals.promoted), ("demoted", totals.demoted)):
        if pairs:
            lines.append(f"most {word}: " + ", ".join(f"{quoted(text)} {shift:+.2f}" for text, shift in pairs))
    return "\n".join(lines)


# -- cells ----------------------------------------------------------------------------------------------------
def quoted(text: str) -> str:
    """A token's text in quotes, with visible spaces and line ends."""
    return visible(json.dumps(text, ensure_ascii=False))


def _choice(each: Mapping[str, Any] | None, field: str, name: str | None = None) -> str:
    """A candidate and its probability in a member."""
    if each is None:
        return UNKNOWN
    return f"{quoted(each['token'])} {_short(probability(each if name is None else each[field], name or field))}"


def _from_alpha(token: Mapping[str, Any], expert: str, alpha: float) -> str:
    """The alpha from which on the written token is the greedy choice; "" if it is not, as in sampling."""
    steps = [step for step in (token.get("flips") or {}).get(expert, ()) if step[0] <= alpha <= MAX_ALPHA]
    return f"{steps[-1][0]:.2f}" if steps and steps[-1][1] == token["id"] else ""


def _short(value: float | None) -> str:
    """A number, or a dash if it is infinite or unknown."""
    return "–" if value is None else f"{value:.2f}"
