"""Symmetric and pairwise attention in plain PyTorch, dense form: the specification of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax, weighted_values
from attnrewrite.kernels.visibility import accumulation_dtype, check_attention, check_shape, full_precision, visible

SELF = -5e4
"""The logit of a token with itself under ``mask_self``: finite, so it counts only where nothing else is visible."""


def symmetric_attention(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    softcap: float | None = None,
    mask_self: bool = False,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention whose queries and keys are one tensor r, or r with a matrix per head between them (arXiv 2406.06366).

    ``softmax_j(scale * (r_i S) . r_j) v_j`` over the visible keys j: symmetric with S = I (``pair=None``), where the
    scores are a symmetric matrix before masks; pairwise with a free S. ``r S`` is accumulated in float32 and rounded
    once. With rotary embedding, S comes before the rotation: rotate ``pairwise_query(r, S)`` and r, and call
    ``attention``; symmetric attention takes the rotated r.

    Args:
        shared: ``[B, Hkv, L, D]``, any floating-point dtype.
        value: ``[B, Hkv, L, Dv]``.
        pair: ``[H, D, D]``, S of every query head; H is a multiple of Hkv.
        attn_mask: broadcastable to ``[B, H, L, L]``: boolean (True = visible) or additive (-inf = invisible).
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow H > Hkv; needs ``pair``, as one r alone would give equal queries to a whole group.
        window: with ``is_causal``, key j is visible to query i iff also i - j < window.
        softcap: bounds the logits before bias and mask.
        mask_self: a token attends to itself only where it sees no other.
        sinks: ``[H]``, as in ``attention``.
        alibi_slopes: ``[H]``, as in ``attention``.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``shared``, differentiable in every float input.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_symmetric(
        shared,
        value,
        pair,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    query, L = shared if pair is None else pairwise_query(shared, pair), shared.shape[2]
    seen = visible(L, L, is_causal=is_causal, window=window, attn_mask=attn_mask, device=shared.device)
    with full_precision(shared.device):
        logits = attention_logits(query, shared, attn_mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
        if mask_self:
            logits = torch.where(torch.eye(L, dtype=torch.bool, device=logits.device), SELF, logits)
        return weighted_values(masked_softmax(logits, seen, sinks), value, dropout_p).to(shared.dtype)


def pairwise_query(shared: Tensor, pair: Tensor) -> Tensor:
    """Return the queries ``r S``, ``[B, H, L, D]`` in the dtype of r = ``shared`` ``[B, Hkv, L, D]``.

    ``pair`` is S, ``[H, D, D]``.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_pair(shared, pair)
    Hkv, D = shared.shape[1], shared.shape[3]
    dtype = accumulation_dtype(shared.dtype)
    with full_precision(shared.device):
        grouped = pair.to(dtype).view(Hkv, -1, D, D)  # [Hkv, G, D, D]
        return (shared.to(dtype).unsqueeze(2) @ grouped).flatten(1, 2).to(shared.dtype)


def through_pair(by_query: Tensor, shared: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Return what reaches r and S through the queries ``r S``."""
    B, Hkv, L, D = shared.shape
    by_query = by_query.view(B, Hkv, -1, L, D)  # [B, Hkv, G, L, D]
    grouped = pair.to(by_query.dtype).view(Hkv, -1, D, D)
    by_shared = (by_query @ grouped.mT).sum(2)
    by_pair = (shared.to(by_query.dtype).unsqueeze(2).mT @ by_query).sum(0)  # [Hkv, G, D, D]
    return by_shared, by_pair.view_as(pair).to(pair.dtype)


def check_symmetric(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    *,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Raise AR402 unless the arguments of symmetric attention fit together."""
    check_attention(shared, shared, value)
    if pair is not None:
        check_pair(shared, pair)
    heads = shared.shape[1] if pair is None else pair.shape[0]
    check_attention(
        shared[:, :1].expand(-1, heads, -1, -1),
        shared,
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


def check_pair(shared: Tensor, pair: Tensor) -> None:
    """Raise AR402 unless there is one matrix per query head, and the query heads are shared out evenly."""
    if shared.dim() != 4:
        raise error("AR402", f"shared has {shared.dim()} dimensions; needed are 4, [B, Hkv, L, D]")
    heads, D = shared.shape[1], shared.shape[3]
    H = pair.shape[0] if pair.dim() else 0
    check_shape("pair", pair, "H x D x D", (H, D, D))
    if H == 0 or H % heads:
        raise error("AR402", f"pair is for {H} heads, not a multiple of the {heads} heads of shared")
