"""The gradient of SEA attention in closed form: recomputed from the inputs, a few queries at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.sea.arguments import key_padding
from attnrewrite.kernels.sea.pairs import bias_index, of_bias, of_key, of_query, softmax_by_head, sum_by_head
from attnrewrite.kernels.sea.pooling import (
    estimate_mean,
    estimate_mean_gradient,
    estimate_pool,
    visible_mean,
    visible_mean_gradient,
)
from attnrewrite.kernels.sea.selection import Pairs, selected_pairs
from attnrewrite.kernels.sea.slices import Rows, Rule, visible_rows
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision, repeat_kv


class Gradients(NamedTuple):
    """One gradient per float input, in its shape and dtype; None where the input is absent or has none."""

    query: Tensor
    key: Tensor
    value: Tensor
    estimated: Tensor | None
    attn_mask: Tensor | None
    scale_prob: Tensor | None
    mix: Tensor | None


def sea_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    *,
    rule: Rule,
    scale_prob: Tensor | None = None,
    mix: Tensor | None = None,
    padding: Tensor | None = None,
    pooling: str = "width",
) -> Gradients:
    """Return the gradients of ``sea_attention`` without dropout, from that of its output.

    With s = scale_prob, x = mix, e_t = grad_i . v_t of pair t and E = sum_t a_t e_t per query and head::

        da_t = x s e_t    ds_t = a_t (da_t - x s E)    dq_i = scale sum_t ds_t k_t    dk_t += scale ds_t q_i
        dv_t += x s a_t grad_i    d(scale_prob) = x E    dx = s E - grad_i . pooled_i    d(pooled_i) = (1 - x) grad_i

    Args:
        grad: ``[B, H, L, Dv]``; the other arguments are those of ``sea_attention``, not checked again.
        query: ``[B, H, L, D]``.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        estimated: ``[B, H, L, M]``.
        attn_mask: padding or bias.
        is_causal: as in the forward pass.
        scale: as in the forward pass.
        window: as in the forward pass.
        rule: budget, counting and grouping.
        scale_prob: as in the forward pass.
        mix: as in the forward pass.
        padding: as in the forward pass.
        pooling: as in the forward pass.
    """
    dtype = accumulation_dtype(query.dtype)
    padding, bias = key_padding(attn_mask, key.shape[2], padding)
    rows = visible_rows(
        query.shape[2], key.shape[2], is_causal=is_causal, window=window, padding=padding, device=query.device
    )
    with full_precision(query.device):
        s, x = (rows.blank(_factor(tensor, query, dtype)) for tensor in (scale_prob, mix))  # [B, H, L]
        grad, estimated = rows.blank(grad.to(dtype)), rows.blank(estimated)
        inputs = (query.to(dtype), key.to(dtype), value.to(dtype))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        d_query, d_key, d_value, d_bias, E = sparse_gradients(grad, *inputs, estimated, rows, rule, bias, factor, s * x)
        d_estimated, d_mix = None, None
        if mix is not None:
            pooled, d_pooled, d_estimated = _pooled_gradients(grad, inputs[2], estimated, rows, x, pooling)
            d_value = d_value + d_pooled
            d_mix = s * E - (grad * pooled).sum(-1)
    if d_bias is not None and attn_mask is not None:
        d_bias = d_bias.reshape(attn_mask.shape).to(attn_mask.dtype)
    return Gradients(
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        None if d_estimated is None else d_estimated.to(estimated.dtype),
        d_bias,
        _reduced(x * E, scale_prob),
        _reduced(d_mix, mix),
    )


def sparse_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimated: Tensor,
    rows: Rows,
    rule: Rule,
    bias: Tensor | None,
    scale: float,
    share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of query, key, value and bias, and E, of ``share`` times ``sparse_attention``."""
    H = query.shape[1]
    d_query, d_key, d_value = torch.empty_like(query), query.new_zeros(key.shape), query.new_zeros(value.shape)
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=query.dtype)
    E = torch.empty_like(grad[..., 0])  # [B, H, L]
    for part, pairs in selected_pairs(estimated, rows, rule, max(key.shape[-1], value.shape[-1])):
        q, k, v = of_query(query[:, :, part], pairs), of_key(key, pairs, H), of_key(value, pairs, H)  # [B, R, T, D]
        scores = (q * k).sum(-1) * scale
        if bias is not None:
            scores = scores + of_bias(bias, pairs, part.start).to(scores.dtype)
        weights = softmax_by_head(scores, pairs, H)  # [B, R, T]
        g = of_query(grad[:, :, part], pairs)
        e = (g * v).sum(-1)
        summed = sum_by_head(weights * e, pairs, H)  # [B, R, H]
        taken = of_query(share[:, :, part], pairs)
        d_scores = weights * taken * (e - summed.gather(2, pairs.head))
        d_scores = d_scores.masked_fill(~pairs.used, 0.0)
        E[:, :, part] = summed.transpose(1, 2)
        d_query[:, :, part] = scale * sum_by_head(d_scores.unsqueeze(-1) * k, pairs, H).transpose(1, 2)
        _add_at(d_key, (scale * d_scores).unsqueeze(-1) * q, pairs, H)
        _add_at(d_value, (weights * taken).unsqueeze(-1) * g, pairs, H)
        if d_bias is not None:
            d_bias.index_put_(bias_index(d_bias, pairs, part.start), d_scores, accumulate=True)
    return d_query, d_key, d_value, d_bias, E


def _pooled_gradients(
    grad: Tensor, value: Tensor, estimated: Tensor, rows: Rows, x: Tensor, pooling: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the pooled value, and the gradients of value and estimate through it."""
    B, Hkv, L, Dv = value.shape
    H = grad.shape[1]
    d_pooled = (1 - x).unsqueeze(-1) * grad  # [B, H, L, Dv]
    if rows.is_causal:
        pooled = repeat_kv(visible_mean(value, rows), H)
        return pooled, visible_mean_gradient(d_pooled.reshape(B, Hkv, H // Hkv, L, Dv).sum(2), rows), None
    probabilities = torch.softmax(estimated.to(value.dtype), dim=-1)
    pool = estimate_pool(probabilities, rows, pooling)
    d_value, d_estimated = estimate_mean_gradient(d_pooled.sum(2, keepdim=True), value, probabilities, pool, rows)
    return estimate_mean(value, pool), d_value, d_estimated


def _add_at(total: Tensor, terms: Tensor, pairs: Pairs, H: int) -> None:
    """Add each pair's term to its key: ``[B, R, T, D]`` into ``[B, Hkv, S, D]``."""
    B, Hkv, S, D = total.shape
    batch = torch.arange(B, device=total.device)[:, None, None]
    at = (batch * Hkv + pairs.head // (H // Hkv)) * S + pairs.key
    # An empty slot lies at some key: its term must be 0 even where that query holds a NaN.
    terms = terms.masked_fill(~pairs.used.unsqueeze(-1), 0.0)
    total.view(-1, D).index_add_(0, at.flatten(), terms.reshape(-1, D))


def _factor(tensor: Tensor | None, query: Tensor, dtype: torch.dtype) -> Tensor:
    full = query.shape[:3]
    return torch.ones(full, dtype=dtype, device=query.device) if tensor is None else tensor.to(dtype).expand(full)


def _reduced(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Sum a gradient over what was broadcast."""
    return None if grad is None or tensor is None else grad.sum_to_size(tensor.shape).to(tensor.dtype)
