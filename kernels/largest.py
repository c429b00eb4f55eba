"""Membership among the largest of a row, made of operators that every compiler has: no stable sort, no index."""

from __future__ import annotations

import torch
from torch import Tensor


def among_largest(scores: Tensor, count: Tensor) -> Tensor:
    """Return which entries are among the ``count`` largest of their row, ties to the lower index; NaN is largest.

    The same entries as the first ``count`` of ``sort(descending=True, stable=True).indices``.

    Args:
        scores: ``[..., N]``, float.
        count: integers from 1 to N, broadcastable to ``[..., 1]``.

    Returns:
        ``[..., N]``, boolean.
    """
    ranked = torch.where(scores.isnan(), float("inf"), scores)
    last = (count - 1).expand(*ranked.shape[:-1], 1)
    least = ranked.sort(dim=-1, descending=True).values.gather(-1, last)
    above, tied = ranked > least, ranked == least
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
