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
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with a causal window, a soft cap, sinks and ALiBi.

    ``softmax_j(cap(scale * q_i . k_j) - slope |i - j| + bias_ij) v_j`` over the visible keys j, where
    ``cap(x) = softcap * tanh(x / softcap)``.

    A query that sees no key gives 0. Unlike torch's function this one takes ``is_causal`` and ``attn_mask`` together;
    without soft cap, sinks and slopes it calls torch's function, so the result has that function's rounding.

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
        sinks: ``[H]``, one more logit per head, which takes weight from the keys and has no value (StreamingLLM, arXiv
            2309.17453; gpt-oss). A query that sees no key still gives 0.
        alibi_slopes: ``[H]``; adds ``-slope * |i - j|`` to the logits, as ALiBi does (arXiv 2108.12409).

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    fused = softcap is None and sinks is None and alibi_slopes is None
    if generated(query, value, fused=fused and window is None and (attn_mask is None or not is_causal)):
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
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
        numbers = (dropout_p, is_causal, scale, window, softcap)
        return dense_attention(query, key, value, attn_mask, *numbers, sinks=sinks, alibi_slopes=alibi_slopes)
    if not fused:
        return eager_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            window,
            softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
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
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
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
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    L, S = query.shape[2], key.shape[2]
    seen = visible(L, S, is_causal=is_causal, window=window, attn_mask=attn_mask, device=query.device)
    with full_precision(query.device):
        logits = attention_logits(query, key, attn_mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
        return weighted_values(masked_softmax(logits, seen, sinks), value, dropout_p).to(query.dtype)


def attention_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Return ``cap(scale * q . k) - slope |i - j| + bias``, ``[B, H, L, S]`` in float32 (float64): no boolean mask."""
    dtype = accumulation_dtype(query.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    keys = repeat_kv(key.to(dtype), query.shape[1])  # [B, H, S, D]
    logits = torch.matmul(query.to(dtype), keys.transpose(-2, -1)) * factor  # [B, H, L, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        i, j = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
        logits = logits + alibi(alibi_slopes, i.unsqueeze(-1) - j, dtype)
    bias = additive(attn_mask)
    return logits if bias is None else logits + bias.to(dtype)


def alibi(slopes: Tensor, lag: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what slopes ``[H]`` add to the logits of pairs that lie ``lag`` ``[L, S]`` apart, ``[H, L, S]``."""
    return -slopes.to(dtype).view(-1, 1, 1) * lag.abs()


def masked_softmax(logits: Tensor, seen: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the visible keys, exactly 0 on the others; a row without a visible key is all 0.

    ``sinks`` ``[H]`` take part in the sum of ``[B, H, L, S]``, and not in the result.
    """
    return _softmax(logits, seen) if sinks is None else sink_softmax(logits, seen, sinks)[..., :-1]


def sink_softmax(logits: Tensor, seen: Tensor | None, sinks: Tensor) -> Tensor:
    """Return the weights of ``masked_softmax`` and behind them those of the sinks, ``[B, H, L, S + 1]``."""
    column = sinks.to(logits.dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
    seen = None if seen is None else torch.nn.functional.pad(seen, (0, 1), value=True)
    return _softmax(torch.cat((logits, column), -1), seen)


def _softmax(logits: Tensor, seen: Tensor | None) -> Tensor:
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
