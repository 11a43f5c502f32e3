"""Members with prompts of their own in vLLM, which knows one sequence of tokens per request. It needs no vLLM.

The *outer* prompt of a request is as long as the longest prompt of its members: L ids. It is the base's prompt, filled
up before its last id. (No member reads what fills it. It is the base's last id again, so that penalties, which look at
the set of a prompt's ids, see the same set.) A member whose prompt has n ids reads the outer position p as its own
position::

    p - begin      if p - begin < n - 1    its prompt, but for the last id
    p - (L - n)    if p >= L - 1           its last id, then the answer
    nothing        elsewhere

Its keys and values stand at its own positions, from the block on in which position ``begin`` lies. ``begin`` is 0, or
for short prompts a whole number of blocks (:func:`begin_of`). So every member reads the same batch, less the rows
that it does not need: :class:`Reading`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from proxytune.vllm.alpha import Row

__all__ = ["KEY", "Reading", "as_extra_args", "begin_of", "block_keys", "ids_in", "outer_prompt", "reading"]

KEY = "proxytune.ids."  # and the name of a part: its prompt in a request's ``extra_args``, which reach every process

Ids = Sequence[int]
Array = np.ndarray[Any, Any]


def as_extra_args(base: Ids, own: Mapping[str, Ids]) -> dict[str, list[int]]:
    """What a request carries: the prompts of the parts that do not read the outer prompt. Empty if all read the base's.

    Args:
        own: part -> its prompt, for every part, the base too.
    """
    if max(map(len, own.values())) > len(base):
        return {KEY + part: list(ids) for part, ids in own.items()}
    return {KEY + part: list(ids) for part, ids in own.items() if list(ids) != list(base)}


def ids_in(extra_args: Mapping[str, Any] | None) -> dict[str, Ids]:
    """Part -> its prompt, in a request that :func:`as_extra_args` made."""
    return {name[len(KEY) :]: ids for name, ids in (extra_args or {}).items() if name.startswith(KEY)}


def outer_prompt(base: Ids, own: Mapping[str, Ids]) -> list[int]:
    """The prompt that vLLM's scheduler sees."""
    longest = max([len(base), *map(len, own.values())])
    return [*base[:-1], *[base[-1]] * (longest - len(base)), base[-1]]


def begin_of(n: Any, n_outer: Any, block: int) -> Any:
    """Where a prompt of ``n`` ids begins in one of ``n_outer``, numbers or arrays.

    A prompt of less than half the length begins as late as it can, at the beginning of a block. So the first blocks
    hold nothing of it, and other requests whose long prompts begin in the same way can share them.
    """
    begin = np.minimum((n_outer - 1) // block - (n - 1) // block, (n_outer - n) // block) * block
    return np.where(2 * n >= n_outer, 0, begin)


def block_keys(own: Mapping[str, Ids], n_outer: int, request: int, start: int, end: int) -> list[tuple[str, Any]]:
    """What a block of the cache depends on besides the outer ids: two blocks are the same only if their keys are.

    A block that may hold the beginning of an answer is its request's alone: a shorter member writes it there while
    another request could already read it.

    Args:
        request: a number of its own, which no other request ever has. start, end: the block's outer positions.
    """
    keys: list[tuple[str, Any]] = []
    for part, ids in sorted(own.items()):
        begin = int(begin_of(len(ids), n_outer, end - start))
        if end <= begin:
            keys.append((part, "unused"))  # unlike a block that the part has read
        elif len(ids) < n_outer and end - begin > len(ids) - 1:
            keys.append((part, request))
        else:
            keys.append((part, tuple(ids[max(start - begin, 0) : end - begin])))
    return keys


@dataclass(frozen=True)
class Reading:
    """How one part reads a batch. n is the number of the rows that it reads; host arrays.

    Attributes:
        requests: its requests, by their places in the batch; those of which it reads nothing are left out.
        starts: (len(requests) + 1,), where each one's rows begin. lengths: of each one the tokens that it has read
            after this batch. begins: of each one the outer position that is its first place in the cache.
        rows: (n,), the batch's row that is read. positions: (n,), its own position there. of_row: (n,), which of
            ``requests`` it belongs to.
        back: for every row of the batch the row of the part, 0 where it has none.
        told: (rows of the part, ids that are read there in place of the batch's).
        as_it_is: whether rows and requests are the batch's.
    """

    requests: Array
    starts: Array
    lengths: Array
    begins: Array
    rows: Array
    positions: Array
    of_row: Array
    back: Array
    told: tuple[Array, Array]
    as_it_is: bool


def reading(part: str, rows: Sequence[Row], block: int, longest_decode: int = 1) -> Reading | None:
    """How a part reads a batch; None if it reads it as it is, at the same positions.

    Args:
        block: tokens per block of the cache.
        longest_decode: requests with at most so many rows come first, as attention backends want them that treat them
            apart.
    """
    prompts = [row.request.prompts.get(part) for row in rows]
    if all(ids is None for ids in prompts):
        return None
    n_outer = np.array([row.n_prompt for row in rows])
    n = np.array([row.n_prompt if ids is None else len(ids) for row, ids in zip(rows, prompts)])
    read, batch = np.array([row.n_read for row in rows]), np.array([row.n for row in rows])
    gap, begin = n_outer - n, begin_of(n, n_outer, block)

    def n_own(p: Array) -> Array:
        """How many of its own tokens come before an outer position."""
        return np.maximum(np.maximum(np.minimum(p - begin, n - 1), p - gap), 0)

    first, last = n_own(read), n_own(read + batch)
    count = last - first
    requests = np.flatnonzero(count)
    requests = requests[np.argsort(count[requests] > longest_decode, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(count[requests])])
    of_row = np.repeat(np.arange(len(requests)), count[requests])
    which = requests[of_row]
    positions = np.arange(starts[-1]) - starts[of_row] + first[which]
    outer = positions + np.where(positions < n[which] - 1, begin[which], gap[which])
    taken = outer - read[which] + (np.cumsum(batch) - batch)[which]
    back = np.zeros(batch.sum(), dtype=np.int64)
    back[taken] = np.arange(len(taken))
    at, ids_there = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for place, request in enumerate(requests):
        ids = prompts[request]
        if ids is not None and first[request] < n[request]:
            shown = ids[first[request] : last[request]]
            at.append(starts[place] + np.arange(len(shown)))
            ids_there.append(np.asarray(shown))
    return Reading(
        requests=requests,
        starts=starts,
        lengths=last[requests],
        begins=begin[requests],
        rows=taken,
        positions=positions,
        of_row=of_row,
        back=back,
        told=(np.concatenate(at), np.concatenate(ids_there)),
        as_it_is=len(taken) == len(back) and bool((taken == np.arange(len(back))).all()),
    )
