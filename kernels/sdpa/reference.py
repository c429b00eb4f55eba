"""Plain attention in plain PyTorch: the specification, and what runs where no kernel is generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.visibility import (
    accumulation_dtype,
    additive,
    check_attention,
    four_dimensional,
    full_precision,
    repeat_kv,
    visible,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with a causal window and a soft cap.

    ``softmax_j(cap(scale * q_i . k_j) + bias_ij) v_j`` over the visible keys j, where
    ``cap(x) = softcap * tanh(x / softcap)``.

    A query that sees no key gives 0. Unlike torch's function this one takes ``is_causal`` and ``attn_mask``
    together; without ``softcap`` it calls torch's function, so the result has that function's rounding.

    Args:
        query: ``[B, H, L, D]``, any floating-point dtype.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        attn_mask: broadcastable to ``[B, H, L, S]``: boolean (True = visible) or additive (-inf = invisible).
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H; KV head g serves the query heads of its group of H / Hkv.
        window: with ``is_causal``, key j is visible to query i iff also i - j < window.
        softcap: bounds the logits before bias and mask; computed in float32 (float64 for float64 inputs).

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    plain = softcap is None and window is None and (attn_mask is None or not is_causal)
    if generated(query, value, fused=plain):
        from attnrewrite.kernels.dense.op import dense_attention  # defines an operator, which takes its time

        check_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
        )
        return dense_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, window, softcap)
    if softcap is not None:
        return eager_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap)
    check_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
    )
    if window is not None or (is_causal and attn_mask is not None):
        attn_mask, is_causal = _combined_mask(query, key, attn_mask, is_causal, window), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``attention`` step by step, with logits and weights in float32 (float64 for float64 inputs)."""
    check_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
    )
    L, S = query.shape[2], key.shape[2]
    seen = visible(L, S, is_causal=is_causal, window=window, attn_mask=attn_mask, device=query.device)
    with full_precision(query.device):
        logits = attention_logits(query, key, attn_mask, scale=scale, softcap=softcap)
        return weighted_values(masked_softmax(logits, seen), value, dropout_p).to(query.dtype)


def attention_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return ``cap(scale * q . k) + bias``, ``[B, H, L, S]`` in float32 (float64), with no boolean mask."""
    dtype = accumulation_dtype(query.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    keys = repeat_kv(key.to(dtype), query.shape[1])  # [B, H, S, D]
    logits = torch.matmul(query.to(dtype), keys.transpose(-2, -1)) * factor  # [B, H, L, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    bias = additive(attn_mask)
    return logits if bias is None else logits + bias.to(dtype)


def masked_softmax(logits: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax over the visible keys, exactly 0 on the others; a row without a visible key is all 0."""
    if seen is None:
        return torch.softmax(logits, dim=-1)
    # The lowest finite number, not -inf: a row without a visible key must not make NaN, not even in backward.
    lowest = torch.finfo(logits.dtype).min
    weights = torch.softmax(torch.where(seen, logits, lowest), dim=-1)
    return torch.where(seen, weights, 0.0)


def weighted_values(weights: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Return ``dropout(weights) @ value``, ``[B, H, L, Dv]`` in the dtype of ``weights``."""
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return torch.matmul(weights, repeat_kv(value.to(weights.dtype), weights.shape[1]))


def _combined_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, window: int | None
) -> Tensor | None:
    bias = additive(attn_mask)
    boolean = attn_mask if bias is None else None
    L, S = query.shape[2], key.shape[2]
    seen = visible(L, S, is_causal=is_causal, window=window, attn_mask=boolean, device=query.device)
    if bias is None or seen is None:
        return seen
    return four_dimensional(torch.where(seen, bias, float("-inf")))
