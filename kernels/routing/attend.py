"""Attention over a selection, a few groups at a time, so that nothing of size N x N exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.routing.selection import Block, Selection
from attnrewrite.kernels.sdpa.reference import masked_softmax

SELF_LOGIT = -5e4
"""Logit of a token with itself where query and key are shared: finite, so it wins only against nothing."""

ELEMENTS = 2**22
"""How many gathered numbers are held at a time."""


@dataclass(frozen=True)
class Scored:
    """What is scored, all float32 (float64), and which pairs of a selection count."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    bias: Tensor | None  # broadcastable to [B, H, L, S], of four dimensions
    scale: float
    is_causal: bool = False
    window: int | None = None
    shared_qk: bool = False
    first: int | Tensor = 0  # the position of query 0 among the keys


class Gathered(NamedTuple):
    """The vectors and softmax weights of some groups; rows count in tensors flattened to two dimensions."""

    query_rows: Tensor  # [B, H, G, M]
    key_rows: Tensor  # [B, H, G, K]
    query: Tensor  # [B, H, G, M, D]
    key: Tensor  # [B, H, G, K, D]
    value: Tensor  # [B, H, G, K, Dv]
    weights: Tensor  # [B, H, G, M, K]
    fixed: Tensor | None  # [B, H, G, M, K], pairs whose logit does not depend on the vectors


def attend(scored: Scored, selection: Selection, dropout_p: float = 0.0) -> Tensor:
    """Return the mean over the groups of each query of its attention there, ``[B, H, L, Dv]``; 0 if it has none."""
    B, H, L, _ = scored.query.shape
    total = scored.value.new_zeros(B * H * L, scored.value.shape[-1])
    for block in blocks(scored, selection):
        part = gathered(scored, block)
        weights = torch.dropout(part.weights, dropout_p, train=True) if dropout_p > 0.0 else part.weights
        slots = torch.matmul(weights, part.value)  # [B, H, G, M, Dv], 0 for a query that sees no key
        total.index_add_(0, part.query_rows.flatten(), slots.flatten(0, 3))
    return total.reshape(B, H, L, -1) / slot_count(scored, selection)


def slot_count(scored: Scored, selection: Selection) -> Tensor:
    """Return in how many groups each query sees a key, 1 at least, ``[B, H, L, 1]``."""
    B, H, L, _ = scored.query.shape
    hits = scored.query.new_zeros(B * H * L)
    for block in blocks(scored, selection):
        live = seen(scored, block).any(dim=-1)
        hits.index_add_(0, rows(block.queries, H, L).flatten(), live.flatten().to(hits.dtype))
    return hits.clamp(min=1).reshape(B, H, L, 1)


def blocks(scored: Scored, selection: Selection) -> Iterator[Block]:
    """Yield the selection in blocks of as many groups as memory allows."""
    B, H, _, D = scored.query.shape
    groups, M, K = selection.sizes
    # A loop cannot be traced over a length that is not known.
    if torch.compiler.is_compiling() or type(groups) is not int:
        yield selection.block(0, groups)
        return
    wide = D + scored.value.shape[-1]
    step = max(1, ELEMENTS // (B * H * (K * wide + M * (wide + K))))
    for start in range(0, groups, step):
        yield selection.block(start, min(start + step, groups))


def gathered(scored: Scored, block: Block) -> Gathered:
    """Gather the vectors of a block and weigh its pairs."""
    queries, keys, _ = block
    H, L = scored.query.shape[1:3]
    Hkv, S = scored.key.shape[1:3]
    query_rows, key_rows = rows(queries, H, L), rows(keys, Hkv, S)
    visible = seen(scored, block)
    query = take(scored.query, query_rows)
    key, value = unseen_as_zero(visible, take(scored.key, key_rows), take(scored.value, key_rows))
    bias = None if scored.bias is None else scored.bias[pair_index(scored.bias, queries, keys)]
    fixed = queries.unsqueeze(-1) + scored.first == keys.unsqueeze(-2) if scored.shared_qk else None
    weights = pair_weights(query, key, visible, scored.scale, bias, fixed)
    return Gathered(query_rows, key_rows, query, key, value, weights, fixed)


def unseen_as_zero(visible: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Replace keys and values that no query of their group sees: they may hold anything, and 0 times NaN is NaN."""
    used = visible.any(dim=-2).unsqueeze(-1)  # [..., K, 1]
    return torch.where(used, key, 0.0), torch.where(used, value, 0.0)


def pair_weights(
    query: Tensor, key: Tensor, visible: Tensor, scale: float, bias: Tensor | None, fixed: Tensor | None
) -> Tensor:
    """Return the softmax weights ``[..., M, K]`` of queries ``[..., M, D]`` over keys ``[..., K, D]``."""
    logits = torch.matmul(query, key.mT) * scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if fixed is not None:
        logits = torch.where(fixed, SELF_LOGIT, logits)
    return masked_softmax(logits, visible)


def seen(scored: Scored, block: Block) -> Tensor:
    """Return which pairs of a block count, ``[B, H, G, M, K]``."""
    queries, keys, met = block
    i, j = queries.unsqueeze(-1), keys.unsqueeze(-2)
    pairs = (i >= 0) & (j >= 0)
    if met is not None:
        pairs = pairs & met
    if scored.is_causal:
        pairs = pairs & (j <= i + scored.first)
    if scored.window is not None:
        pairs = pairs & (i + scored.first - j < scored.window)
    if scored.bias is not None:
        pairs = pairs & (scored.bias[pair_index(scored.bias, queries, keys)] != float("-inf"))
    return pairs


def rows(positions: Tensor, heads: int, length: int) -> Tensor:
    """Turn positions ``[B, H, ...]`` into row numbers of a ``[B * heads * length, D]`` tensor; -1 into some row."""
    B, H = positions.shape[:2]
    batch = torch.arange(B, device=positions.device).unsqueeze(-1) * heads
    head = torch.arange(H, device=positions.device) // (H // heads)
    first = (batch + head) * length  # [B, H]
    return first[(...,) + (None,) * (positions.dim() - 2)] + positions.clamp(min=0)


def take(states: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows of ``states`` ``[B, heads, N, D]``, shaped ``[*numbers, D]``."""
    return states.flatten(0, 2).index_select(0, numbers.flatten()).reshape(*numbers.shape, states.shape[-1])


def pair_index(bias: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Return the index that reads a bias of four dimensions, some of size 1, at the pairs of a block."""
    B, H = queries.shape[:2]
    # With dimensions: an index without any is read as a number, which cannot be traced.
    zero = torch.zeros((1,) * 5, dtype=torch.int64, device=bias.device)
    full = (
        torch.arange(B, device=bias.device).reshape(B, 1, 1, 1, 1),
        torch.arange(H, device=bias.device).reshape(1, H, 1, 1, 1),
        queries.clamp(min=0).unsqueeze(-1),
        keys.clamp(min=0).unsqueeze(-2),
    )
    return tuple(zero if size == 1 else index for size, index in zip(bias.shape, full, strict=True))
