"""At which alphas greedy decoding would choose another token: the upper envelope of a line for each token.

Token j's line is ``start_j + alpha * slope_j``. Of a whole vocabulary nearly all lines lie far below the highest, so
:func:`contenders` leaves those out on the device, and :func:`flips` walks along the few that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.recipe.alpha import MAX_ALPHA

__all__ = ["best", "contenders", "flips", "top"]

CHUNK = 64  # ids that are looked at together


def contenders(start: Tensor, slope: Tensor, end: float = MAX_ALPHA) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens whose line may be the highest at some alpha from 0 to ``end``.

    Args:
        start: each token's logit at alpha 0, (n_rows, n_vocab), float32, -inf where it can't be chosen.
        slope: what alpha 1 adds to it, same shape; -inf where every alpha above 0 excludes the token.

    Returns:
        Ids, starts and slopes, (n_rows, 1 + n_lines) each. The first is the token that leads at alpha 0; among equals,
        the one with the lowest id. Some of the others may never lead.
    """
    leader = best(start)
    above = (slope * 0.0).nan_to_num_(nan=-torch.inf).add_(start)  # the starts of lines that alphas above 0 allow
    # A line lies below `first` at 0 and below `last` at the far end. If it is above both anywhere, it is so where they
    # cross. The far end lies after `end`, so that a line that is reached just there counts.
    far = 1.001 * end
    first, last = best(above), best(torch.add(above, slope, alpha=far))
    pair = torch.cat([first, last], dim=1)
    at_0, rise = above.gather(1, pair), slope.gather(1, pair)
    cross = ((at_0[:, :1] - at_0[:, 1:]) / (rise[:, 1:] - rise[:, :1])).nan_to_num(0.0).clamp(0.0, far)
    heights = torch.addcmul(above, cross, slope.clamp(min=torch.finfo(slope.dtype).min))
    rounding = 1e-5 * (1.0 + at_0.abs() + far * rise.abs()).sum(dim=1, keepdim=True)
    least = (heights.gather(1, pair).amin(dim=1, keepdim=True) - rounding).clamp(min=torch.finfo(start.dtype).min)
    n_lines = int(torch.ge(heights, least, out=torch.empty_like(heights)).sum(dim=1).max())
    ids = torch.cat([leader, top(heights, max(n_lines, 1))[1]], dim=1)
    return ids, start.gather(1, ids), slope.gather(1, ids)


def flips(
    ids: Sequence[float], starts: Sequence[float], slopes: Sequence[float], end: float = MAX_ALPHA
) -> tuple[tuple[float, int], ...]:
    """Which line is highest for each alpha from 0 to ``end``, of one row of :func:`contenders`.

    Returns:
        Pairs (alpha, id): from this alpha on, this token leads; ascending from 0. A token that leads only at 0 is
        followed by another pair at 0.
    """
    steps = [(0.0, int(ids[0]))]
    lines = [(start, slope, -id_) for id_, start, slope in zip(ids, starts, slopes) if start + slope > -math.inf]
    if not lines:
        return tuple(steps)
    at, leading = 0.0, max(lines, key=lambda line: (line[0], line[2]))
    if -leading[2] != steps[0][1]:
        steps.append((0.0, int(-leading[2])))
    while steeper := [line for line in lines if line[1] > leading[1]]:
        # Line j overtakes line i, which leads at alpha, where start_i + alpha slope_i = start_j + alpha slope_j.
        meets = [max((leading[0] - start) / (slope - leading[1]), at) for start, slope, _ in steeper]
        at = min(meets)
        if at > end:
            break
        # If several lines meet there, the steepest one leads from then on.
        leading = max((line[1], line[2], line) for line, meet in zip(steeper, meets) if meet == at)[2]
        steps.append((at, int(-leading[2])))
    return tuple(steps)


# -- the largest of many, without a pass that costs as much as a sort -------------------------------------------
def best(values: Tensor) -> Tensor:
    """The id of each row's largest value; among equals, the lowest id. (n_rows, n_vocab) -> (n_rows, 1)."""
    chunks = _chunks(values)
    at = chunks.amax(dim=-1).argmax(dim=-1, keepdim=True)
    inside = chunks.gather(1, at[..., None].expand(-1, -1, CHUNK)).argmax(dim=-1)
    return at * CHUNK + inside


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, largest first, and their ids: (n_rows, n_vocab) -> (n_rows, k) each."""
    chunks = _chunks(values)
    if chunks.shape[1] <= k:
        found = values.topk(k, dim=-1)
        return found.values, found.indices
    # They lie in the k chunks with the largest maxima.
    at = chunks.amax(dim=-1).topk(k, dim=-1).indices
    found = chunks.gather(1, at[..., None].expand(-1, -1, CHUNK)).flatten(1).topk(k, dim=-1)
    return found.values, at.gather(1, found.indices // CHUNK) * CHUNK + found.indices % CHUNK


def _chunks(values: Tensor) -> Tensor:
    """(n_rows, n_vocab) -> (n_rows, n_chunks, CHUNK), with -inf after the last id."""
    missing = -values.shape[-1] % CHUNK
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return values.unflatten(-1, (-1, CHUNK))
