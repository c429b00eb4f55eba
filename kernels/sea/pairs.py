"""Attention over a list of (head, key) pairs per query: gathers, a softmax per head, sums per head."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.sea.selection import Pairs


def of_query(states: Tensor, pairs: Pairs) -> Tensor:
    """Gather each pair's own query row: ``[B, H, R, ...]`` -> ``[B, R, T, ...]``."""
    row = torch.arange(states.shape[2], device=states.device).unsqueeze(-1)
    return states[_batch(pairs), pairs.head, row]


def of_key(states: Tensor, pairs: Pairs, H: int) -> Tensor:
    """Gather each pair's key or value: ``[B, Hkv, S, D]`` -> ``[B, R, T, D]``, 0 in empty slots.

    0 and not whatever lies there: a NaN at a position that a query does not select must not reach it.
    """
    group = pairs.head // (H // states.shape[1])
    return states[_batch(pairs), group, pairs.key].masked_fill(~pairs.used.unsqueeze(-1), 0.0)


def of_bias(bias: Tensor, pairs: Pairs, start: int) -> Tensor:
    """Gather each pair's bias from a mask of four dimensions that broadcasts: -> ``[B, R, T]``."""
    return bias[bias_index(bias, pairs, start)]


def bias_index(bias: Tensor, pairs: Pairs, start: int) -> tuple[Tensor, ...]:
    """Return where each pair finds its bias; a dimension of size 1 serves all."""
    row = torch.arange(start, start + pairs.head.shape[1], device=bias.device).unsqueeze(-1)
    full = (_batch(pairs), pairs.head, row, pairs.key)
    return tuple(torch.zeros_like(at) if n == 1 else at for at, n in zip(full, bias.shape, strict=True))


def sum_by_head(terms: Tensor, pairs: Pairs, H: int) -> Tensor:
    """Sum what belongs to the same head: ``[B, R, T, ...]`` -> ``[B, R, H, ...]``; empty slots must hold 0."""
    index = pairs.head if terms.dim() == 3 else pairs.head.unsqueeze(-1).expand_as(terms)
    return terms.new_zeros(*terms.shape[:2], H, *terms.shape[3:]).scatter_add(2, index, terms)


def softmax_by_head(scores: Tensor, pairs: Pairs, H: int) -> Tensor:
    """Softmax over the pairs of the same query and head, ``[B, R, T]``; exactly 0 in empty slots."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~pairs.used, lowest)
    # From the lowest finite number, not -inf: a head whose biases are all -inf must give 0, not NaN.
    floor = scores.new_full((*scores.shape[:2], H), lowest)
    largest = floor.scatter_reduce(2, pairs.head, scores.detach(), "amax")
    weights = torch.exp(scores - largest.gather(2, pairs.head)).masked_fill(~pairs.used, 0.0)
    total = sum_by_head(weights, pairs, H)
    return weights / torch.where(total == 0, 1.0, total).gather(2, pairs.head)


def _batch(pairs: Pairs) -> Tensor:
    return torch.arange(pairs.head.shape[0], device=pairs.head.device)[:, None, None]
