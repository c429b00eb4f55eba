"""SEA attention in plain PyTorch: the specification of every other implementation.

What comes before it, the estimate, is in estimator.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.sea.arguments import check_arguments, key_padding
from attnrewrite.kernels.sea.pairs import of_bias, of_key, of_query, softmax_by_head, sum_by_head
from attnrewrite.kernels.sea.pooling import estimate_mean, estimate_pool, visible_mean
from attnrewrite.kernels.sea.selection import selected_pairs
from attnrewrite.kernels.sea.slices import Rows, Rule, visible_rows
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision, repeat_kv


def sea_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    budget: int,
    budget_rule: str = "exact",
    grouping: str = "causal_per_batch",
    scale_prob: Tensor | None = None,
    mix: Tensor | None = None,
    strict_window: bool = True,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> Tensor:
    """Attention to the keys that an estimate of the attention matrix selects (SEA, arXiv 2310.01777, section 3).

    Query i sees n keys, cut into M slices of equal width; column m of its estimate stands for slice m. The best
    slices are kept, ``budget`` k tokens at most of each, the newest first and evenly spread. With S the keys kept for
    head h, and pooled the mean of the visible values (causal) or their mean weighted by the mean estimate (else)::

        sparse_i = scale_prob_i  sum over j in S of softmax_S(scale q_i . k_j + bias_ij) v_j
        out_i    = mix_i sparse_i + (1 - mix_i) pooled_i

    The selection is hard: it passes no gradient. A head without keys has sparse 0, a query without keys gives 0. A
    row's NaN in ``estimated`` makes the row NaN. Memory grows with L, never with its square.

    Args:
        query: ``[B, H, L, D]``, any floating-point dtype.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        estimated: logits, ``[B, H, L, M]``; their softmax over M is the estimate. Any floating-point dtype, best
            float32, because 16-bit numbers tie; of equal slices the one of lower head, then column, wins.
        attn_mask: boolean (True = real token), broadcastable to ``[B, 1, 1, L]``: padding is neither seen, nor
            counted, nor a query. Or a bias broadcastable to ``[B, H, L, L]``, added at the selected pairs; -inf in
            a bias of shape ``[B or 1, 1, 1, L]`` is padding, in any other it only takes the pair out of the softmax.
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H; KV head g serves the query heads of its group of H / Hkv.
        window: with ``is_causal``, query i sees key j iff also i - j < window; the slices cut the window.
        budget: k, keys per query and head, 1 at least.
        budget_rule: "exact" keeps every key of a query that sees k or fewer, and counts no empty slice; "paper" is
            the authors' code.
        grouping: "causal_per_batch" lets the slices of all heads compete for H k keys per query; "per_query" gives
            k to each head.
        scale_prob: broadcastable to ``[B, H, L]``, after its sigmoid; 1 if None.
        mix: the same; without it nothing is pooled.
        strict_window: True refuses a window, because an estimate's running sums also hold keys behind it.
        padding: boolean ``[B or 1, L]``, True = real token: padding beside a bias.
        pooling: without ``is_causal``: "width" shares the weight of a slice among its keys, so that all weights sum
            to 1; "paper" gives it whole to each of them, as in the authors' code.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``, differentiable in every float input; ``estimated`` gets a
        gradient through the pooled value alone, so only without ``is_causal`` and with ``mix``.

    Raises:
        LoweringError: AR402, arguments that do not fit together, and masks that vary between queries or heads.
    """
    rule = Rule(budget, budget_rule, grouping)
    check_arguments(
        query,
        key,
        value,
        estimated,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
        rule=rule,
        scale_prob=scale_prob,
        mix=mix,
        strict_window=strict_window,
        padding=padding,
        pooling=pooling,
    )
    padding, bias = key_padding(attn_mask, key.shape[2], padding)
    rows = visible_rows(
        query.shape[2], key.shape[2], is_causal=is_causal, window=window, padding=padding, device=query.device
    )
    with full_precision(query.device):
        sparse = sparse_attention(query, key, value, estimated, rows, rule, bias=bias, scale=scale, dropout_p=dropout_p)
        return completed(sparse, value, estimated, rows, scale_prob, mix, pooling).to(query.dtype)


def completed(
    sparse: Tensor,
    value: Tensor,
    estimated: Tensor,
    rows: Rows,
    scale_prob: Tensor | None,
    mix: Tensor | None,
    pooling: str,
) -> Tensor:
    """Mix the sparse result ``[B, H, L, Dv]`` with the pooled values."""
    pooled = None
    if mix is not None:
        values = value.to(sparse.dtype)
        pooled = visible_mean(values, rows) if rows.is_causal else _estimate_mean(values, estimated, rows, pooling)
    return mixed(sparse, pooled, rows, scale_prob, mix)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    rows: Rows,
    rule: Rule,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return attention to the selected keys alone, ``[B, H, L, Dv]`` in float32 (float64 for float64 inputs).

    The queries may be the last L of S positions.
    """
    dtype = accumulation_dtype(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    estimated = rows.blank(estimated)
    H, factor = query.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for part, pairs in selected_pairs(estimated, rows, rule, max(key.shape[-1], value.shape[-1])):
        scores = (of_query(query[:, :, part], pairs) * of_key(key, pairs, H)).sum(-1) * factor  # [B, R, T]
        if bias is not None:
            scores = scores + of_bias(bias, pairs, part.start).to(dtype)
        weights = softmax_by_head(scores, pairs, H)
        if dropout_p > 0.0:
            weights = torch.dropout(weights, dropout_p, train=True)
        parts.append(sum_by_head(weights.unsqueeze(-1) * of_key(value, pairs, H), pairs, H))
    return torch.cat(parts, dim=1).transpose(1, 2) + unknown(estimated, rule).to(dtype)


def mixed(sparse: Tensor, pooled: Tensor | None, rows: Rows, scale_prob: Tensor | None, mix: Tensor | None) -> Tensor:
    """Return mix scale_prob sparse + (1 - mix) pooled, and exactly 0 for queries that see no key."""
    size = sparse.shape[:3]
    out = sparse
    if scale_prob is not None:
        out = out * rows.blank(scale_prob.to(sparse.dtype).expand(size)).unsqueeze(-1)
    if mix is not None and pooled is not None:
        share = rows.blank(mix.to(sparse.dtype).expand(size)).unsqueeze(-1)
        out = share * out + (1 - share) * repeat_kv(pooled, sparse.shape[1])
    return torch.where((rows.count > 0)[:, None, :, None], out, 0.0)


def _estimate_mean(value: Tensor, estimated: Tensor, rows: Rows, pooling: str) -> Tensor:
    probabilities = torch.softmax(rows.blank(estimated).to(value.dtype), dim=-1)
    return estimate_mean(value, estimate_pool(probabilities, rows, pooling))


def unknown(estimated: Tensor, rule: Rule) -> Tensor:
    """Return NaN for rows whose estimate is no distribution, else 0: a choice among NaN would hide them."""
    wide = estimated.detach().to(accumulation_dtype(estimated.dtype))
    known = torch.logsumexp(wide, dim=-1).abs() < float("inf")  # [B, H, L]
    if rule.grouping == "causal_per_batch":
        known = known.all(1, keepdim=True)
    return torch.where(known, 0.0, float("nan")).unsqueeze(-1)
