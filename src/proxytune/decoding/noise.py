"""Sampling that depends on a seed, a row and a position, and on nothing else.

A draw from p is a race: with e ~ Exp(1) for each token, ``argmax p / e`` is distributed as p. Here the noise e belongs
to a row and a position of its text, so a row's tokens depend neither on the batch it is in, nor on where a job was
interrupted, nor on drafts: a draft is ``argmax q / e``, the token that is written is ``argmax p / e``, and the draft is
accepted where both agree. So no decision about drafting can change the samples. The price is acceptance: two draws with
the same e agree with a probability of at least (1 − TV) / (1 + TV), while rejection sampling accepts with 1 − TV (TV:
the total variation distance between p and q; 2408.07978 calls this drafter-invariant speculative decoding).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from proxytune.decoding.cost import MAX_DRAFTS
from proxytune.errors import ProxyTuneError

__all__ = ["Noise", "RowSampler", "row_seed", "row_seeds"]


def row_seed(seed: int, row: int | str) -> int:
    """A seed for one row: neighbours must not get related streams, so it is hashed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


def row_seeds(seed: Any, n_rows: int) -> list[int]:
    """One seed for each row, from one number for all of them or a list of one number per row.

    Raises:
        ProxyTuneError: for anything else.
    """

    def is_number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    if is_number(seed):
        return [row_seed(seed, row) for row in range(n_rows)]
    if not isinstance(seed, (list, tuple)) or not all(map(is_number, seed)):
        raise ProxyTuneError(f"seed must be a number from 0 to 2^63 - 1, or a list with one per row, not {seed!r}")
    if len(seed) != n_rows:
        raise ProxyTuneError(f"{len(seed)} seeds for {n_rows} rows; give one number for all rows, or one per row")
    return list(seed)


class Noise:
    """The noise of each row and position.

    Each row has one stream, read in order of position. The last positions are kept: as many as one cycle of drafts
    needs.

    Args:
        seeds: one per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.n_drawn = [0] * len(seeds)  # positions
        self.kept: list[deque[Tensor]] = [deque(maxlen=MAX_DRAFTS + 1) for _ in seeds]

    def at(self, row: int, position: int, like: Tensor) -> Tensor:
        """The noise of one row at one position of its new text, shape = (n_vocab,), the last dimension of ``like``."""
        while self.n_drawn[row] <= position:
            e = torch.empty(like.shape[-1]).exponential_(generator=self.generators[row])
            self.kept[row].append(e.clamp_(min=torch.finfo(e.dtype).tiny).to(like.device))  # 0 / 0 would win a race
            self.n_drawn[row] += 1
        return self.kept[row][position - self.n_drawn[row]]

    def select(self, rows: Sequence[int]) -> None:
        """Continue with some rows alone."""
        for name in ("generators", "n_drawn", "kept"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def race(self, p: Tensor, positions: Sequence[int]) -> Tensor:
        """``p / e``, whose argmax is a draw from p.

        Args:
            p: distributions, shape = (n_rows, k, n_vocab), float32.
            positions: for each row, the position of its first distribution; the others follow.
        """
        return torch.stack(
            [
                torch.stack([p[row, j] / self.at(row, position + j, p) for j in range(p.shape[1])])
                for row, position in enumerate(positions)
            ]
        )


class RowSampler(LogitsProcessor):
    """The same draws in transformers' own greedy loop: scores whose argmax is the draw. Called once per token.

    Args:
        seeds: one per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.noise = Noise(seeds)
        self.n_calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shape (n_batch, n_vocab), in and out."""
        p = torch.softmax(scores.float(), dim=-1)
        raced = self.noise.race(p[:, None], [self.n_calls] * p.shape[0])[:, 0]
        self.n_calls += 1
        return raced
