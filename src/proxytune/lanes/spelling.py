"""How servers write tokens: from the texts in a reply to the ids that they can mean.

One id has several spellings (its text, the tokenizer's own name, its bytes if these are not text), and one spelling may
fit several ids. A spelling that fits several ids is not resolved, because the reply does not say which one it means.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["Spelling"]

AS_ID = re.compile(r"token_id:(\d+)")
ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


class Spelling:
    """The spellings of a tokenizer's ids.

    Args:
        tokenizer: a transformers tokenizer.
        n_vocab: ids from here on do not exist.
    """

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        names = {index: token for token, index in tokenizer.get_vocab().items() if index < n_vocab}
        ids = sorted(names)
        texts = dict(zip(ids, tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)))
        own = _bytes_of(tokenizer, names)
        found: dict[str | bytes, set[int]] = {}
        for index in ids:
            for spelled in (names[index], texts[index], own.get(index)):
                if spelled:
                    found.setdefault(spelled, set()).add(index)
        self.ids = {spelled: tuple(sorted(of)) for spelled, of in found.items()}

    def meant(self, token: str) -> tuple[int, ...]:
        """The ids that a token in a reply can mean: one, several, or none."""
        if (numbered := AS_ID.fullmatch(token)) is not None:
            index = int(numbered[1])
            return (index,) if index < self.n_vocab else ()
        if token.startswith("bytes:"):
            escaped = token.removeprefix("bytes:").encode()
            own = self.ids.get(ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), escaped), ())
            return own or self.ids.get(token, ())
        return tuple(sorted({*self.ids.get(token, ()), *self.ids.get(token.encode(), ())}))


def _bytes_of(tokenizer: Any, names: dict[int, str]) -> dict[int, bytes]:
    """The bytes of each id, if the tokenizer's own names contain them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None or backend.decoder is None else repr(backend.decoder)
    added = set(tokenizer.get_added_vocab())
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    own = {}
    for index, name in names.items():
        if name in added:
            own[index] = name.encode()
        elif "ByteLevel" in decoder and all(character in table for character in name):
            own[index] = bytes(table[character] for character in name)
        elif "ByteFallback" in decoder and re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            own[index] = bytes([int(name[3:5], 16)])
        elif "▁" in decoder:
            own[index] = name.replace("▁", " ").encode()
    return own
