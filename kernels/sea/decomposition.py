"""The operators ``attnrewrite::sea_attention``, in dense form, and ``sea_one_document`` in operators of torch.

A graph for other compilers has static shapes and no searches, so here the selection is a mask ``[B, H, L, L]`` over all
pairs in place of lists of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.largest import among_largest
from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax, weighted_values
from attnrewrite.kernels.sea.arguments import key_padding
from attnrewrite.kernels.sea.reference import completed, unknown
from attnrewrite.kernels.sea.selection import slice_ranking
from attnrewrite.kernels.sea.slices import Rows, Rule, boundaries, slice_of, slices_kept, visible_rows
from attnrewrite.kernels.visibility import full_precision


def sea_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    budget: int,
    budget_rule: str,
    grouping: str,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> Tensor:
    """Compute what the operator computes, with all pairs scored; a NaN among the keys reaches all queries."""
    rule, L = Rule(budget, budget_rule, grouping), query.shape[2]
    padding, bias = key_padding(attn_mask, L, padding)
    rows = visible_rows(L, L, is_causal=is_causal, window=window, padding=padding, device=query.device)
    with full_precision(query.device):
        selected = _selected(rows.blank(estimated), rows, rule)
        if bias is not None:
            selected = selected & (bias != float("-inf"))
        logits = attention_logits(rows.blank(query), _real(key, rows), bias, scale=scale)
        sparse = weighted_values(masked_softmax(logits, selected), _real(value, rows))
        sparse = sparse + unknown(rows.blank(estimated), rule).to(sparse.dtype)
        return completed(sparse, value, estimated, rows, scale_prob, mix, pooling).to(query.dtype).contiguous()


def sea_one_document(features: Tensor, documents: Tensor) -> Tensor:
    """Return the features; a program raises no error, so where there are several documents they are NaN."""
    return torch.where(documents.all(), features, float("nan"))


def _selected(estimated: Tensor, rows: Rows, rule: Rule) -> Tensor:
    """Return the pairs of ``selected_pairs`` as a mask, ``[B, H, L, L]``."""
    B, H, L, M = estimated.shape
    edges = boundaries(rows.count, M)  # [B or 1, L, M + 1]
    kept = _kept(estimated, rows.count, edges, rule)
    before = rows.real.long().cumsum(-1) - 1  # rank of each key
    rank = before.unsqueeze(1) - rows.first.unsqueeze(-1)  # [B or 1, L, L], among what the query sees
    seen = (rank >= 0) & (rank < rows.count.unsqueeze(-1)) & rows.real.unsqueeze(1)
    column = slice_of(rank.clamp(min=0), rows.count.unsqueeze(-1), M).clamp(max=M - 1)
    picked = seen & _spread(rank, edges.gather(-1, column), edges.gather(-1, column + 1), rule.budget)
    column = column.unsqueeze(1).expand(B, H, L, L)
    return kept.gather(-1, column) & picked.unsqueeze(1)


def _kept(estimated: Tensor, count: Tensor, edges: Tensor, rule: Rule) -> Tensor:
    """Return which slices are within the budget, ``[B, H, L, M]``."""
    B, H, L, M = estimated.shape
    heads = rule.competing(H)
    ranking = slice_ranking(estimated, edges.diff(dim=-1), rule)  # [B, L, H / heads, heads M]
    limit = slices_kept(count, heads, M, rule)[..., None, None].expand(B, L, H // heads, 1)
    return among_largest(ranking, limit).reshape(B, L, H, M).transpose(1, 2)


def _spread(rank: Tensor, left: Tensor, right: Tensor, budget: int) -> Tensor:
    """Return which keys are among the c = min(width, budget) of their slice, ``right - 1 - floor(u width / c)``, u < c.

    u follows from the distance d to the right end: it is the first with ``u width >= d c``.
    """
    width = (right - left).clamp(min=1)
    c = width.clamp(max=budget)
    distance = right - 1 - rank
    u = (distance * c + width - 1) // width
    return u * width // c == distance


def _real(states: Tensor, rows: Rows) -> Tensor:
    """Set what lies at padding to 0: it may be NaN, and 0 times NaN is NaN."""
    return states.masked_fill(~rows.real[:, None, :, None], 0.0) if rows.padded else states
