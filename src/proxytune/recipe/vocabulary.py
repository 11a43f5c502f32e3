"""Compares tokenizers: are they the same, and where do they differ?

Logits can be added only where a row means the same token in every member. So tokens are compared by identity
(id -> string), not by the size of the vocabulary:

- ids that all members have logits for are mixed, unless two of them give one id two strings: that is a mismatch, and
  is refused;
- names of one token that the recipe lists under its id are no mismatch;
- ids beyond some member's logits (32000 against 32016) are *extra*: they are reported, and never chosen.

An id that is a token in one member and a mere padding row in another is mixed: its row there is all but constant.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxytune.errors import VocabularyError

__all__ = ["VocabularyReport", "compare"]

SHOWN = 3  # how many differing ids a message names
MANY = 64  # so many differences are no renaming, but another tokenizer


@dataclass(frozen=True)
class VocabularyReport:
    """What :func:`compare` found.

    Attributes:
        shared: ids below it are in every member's logits, and are mixed.
        extra: member name -> how many of its logit rows lie at or above ``shared`` (never chosen).
        mismatches: (id, member, token in the base, token in the member), in order of id.
        unchecked: members without a tokenizer, whose tokens are taken on trust.
        renamed: the mismatches that the recipe accepts.
    """

    shared: int
    extra: dict[str, int]
    mismatches: list[tuple[int, str, str, str]]
    unchecked: list[str]
    renamed: list[tuple[int, str, str, str]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What is said of each member's extra ids."""
        return [
            f"{name} has {extra} ids that another member lacks (from {self.shared} on); they are never chosen"
            for name, extra in self.extra.items()
        ]

    def raise_for_mismatch(self) -> None:
        """Raise :class:`VocabularyError`, naming the first differing ids and both their tokens."""
        if not self.mismatches:
            return
        member = self.mismatches[0][1]
        of_member = [m for m in self.mismatches if m[1] == member]
        shown = "; ".join(f"id {i} is {ours!r} in the base and {theirs!r}" for i, _, ours, theirs in of_member[:SHOWN])
        raise VocabularyError(
            f"member {member!r} does not share the base's vocabulary ({len(of_member)} ids differ): {shown}. "
            f"Choose members with the same tokenizer{self._remedy()}"
        )

    def _remedy(self) -> str:
        """The field that accepts these very differences, where they may be renamed tokens."""
        names: dict[str, list[str]] = {}
        for index, _, ours, theirs in sorted([*self.mismatches, *self.renamed]):
            known = names.setdefault(str(index), [ours])
            known += [theirs] if theirs not in known else []
        if len(names) > MANY:
            return ""
        text = json.dumps(names, ensure_ascii=False)
        return (
            f'; or, if these are the same tokens under other names, put "renamed_tokens": {text} into the recipe\'s '
            f"config.json, or say --renamed-tokens {shlex.quote(text)} to proxytune new"
        )


def compare(
    tokenizers: Mapping[str, Any], widths: Mapping[str, int], renamed: Mapping[str, Collection[str]] | None = None
) -> VocabularyReport:
    """Compare every member with the base, id by id.

    Args:
        tokenizers: member name -> its tokenizer, or None if it has none. The key ``base`` comes first.
        widths: member name -> number of its logits (``config.vocab_size``).
        renamed: id (as JSON has it, a string) -> the names of one token under it, which are no mismatch.
    """
    shared = min(widths.values())
    strings = {
        name: {index: token for token, index in tokenizer.get_vocab().items()}
        for name, tokenizer in tokenizers.items()
        if tokenizer is not None
    }
    base = strings.get("base", {})
    differences = [
        (index, name, base[index], theirs[index])
        for name, theirs in strings.items()
        for index in sorted(base.keys() & theirs.keys())
        if index < shared and base[index] != theirs[index]
    ]
    accepted = [one for one in differences if {one[2], one[3]} <= set((renamed or {}).get(str(one[0]), ()))]
    return VocabularyReport(
        shared=shared,
        extra={name: width - shared for name, width in widths.items() if width > shared},
        mismatches=[one for one in differences if one not in accepted],
        unchecked=[name for name in widths if name not in strings],
        renamed=accepted,
    )
