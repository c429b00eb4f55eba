"""How much of a head's attention its routing keeps: the share of dense weights on the pairs that meet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.routing.attend import blocks, rows, seen
from attnrewrite.kernels.routing.prepare import Options, Routed, prepare


class Captured(NamedTuple):
    """Sums over queries of the dense weight that is kept, ``[H]`` each, and the number of queries."""

    routing: Tensor
    local: Tensor
    random: Tensor
    queries: Tensor  # 0-d


def met_pairs(routed: Routed, options: Options) -> Tensor:
    """Return which keys each query meets in any cluster, ``[B, H, L, S]`` boolean. Dense: for measurements."""
    scored, selection = prepare(routed, options)
    (B, H, L, _), S = routed.query.shape, routed.key.shape[2]
    met = torch.zeros(B * H * L * S, dtype=torch.bool, device=routed.query.device)
    for block in blocks(scored, selection):
        pair = rows(block.queries, H, L).unsqueeze(-1) * S + block.keys.clamp(min=0).unsqueeze(-2)
        met[pair[seen(scored, block)]] = True
    return met.reshape(B, H, L, S)


def near_pairs(
    L: int, S: int, window: int, *, is_causal: bool, device: torch.device | None = None, first: int | Tensor = 0
) -> Tensor:
    """Return which keys lie within ``window`` positions, ``[L, S]``: i - window < j <= i, or |i - j| < window.

    ``first`` is the position of query 0 among the keys.
    """
    lag = torch.arange(L, device=device).unsqueeze(-1) + first - torch.arange(S, device=device)
    return (lag < window) & (lag >= 0 if is_causal else lag > -window)


def captured(weights: Tensor, met: Tensor, near: Tensor, valid: Tensor | None = None) -> Captured:
    """Sum up the weight on the pairs that meet, on near pairs, and on as many random pairs as meet.

    The random pairs are those of an average draw from the visible keys that holds the query's own key where routing
    holds it.

    Args:
        weights: ``[B, H, L, S]``, rows of dense attention.
        met: ``[B, H, L, S]`` boolean.
        near: ``[L, S]`` boolean.
        valid: ``[B, L]`` boolean; padded queries (False) do not count.
    """
    real = weights.new_ones(weights.shape[0], weights.shape[2]) if valid is None else valid.to(weights.dtype)
    own = torch.eye(*weights.shape[2:], dtype=torch.bool, device=weights.device) & met
    shown = weights > 0
    drawn = (met & ~own & shown).sum(-1)
    available = (~own & shown).sum(-1)
    itself = (weights * own).sum(-1)
    chance = itself + (weights.sum(-1) - itself) * drawn / available.clamp(min=1)

    def total(kept: Tensor) -> Tensor:  # [B, H, L] -> [H]
        return (kept * real.unsqueeze(1)).sum((0, 2))

    return Captured(total((weights * met).sum(-1)), total((weights * near).sum(-1)), total(chance), real.sum())
