"""SSA attention in plain PyTorch: the specification of every other implementation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.visibility import (
    accumulation_dtype,
    check_attention,
    check_broadcast,
    check_shape,
    full_precision,
)


def temperature(projection: Tensor, gate: Tensor | None, gain: float | Tensor, positions: Tensor) -> Tensor:
    """Return the inverse temperature of every token and head: one part from the token, one from its position.

    ``tau_h = tanh(f_h) + 1 + gain log(position)`` with natural logarithm, exact (erf) GELU and
    ``f_h = sum_d GELU(projection)_hd gate_hd``, or with gates on the features of all heads
    ``f_h = sum_gd GELU(projection)_gd gate_hgd`` (arXiv 2411.12892, token-aware and position-aware temperature).
    Larger is sharper. With gate and gain 0 it is exactly 1.

    Args:
        projection: ``[B, H, L, D]``, the raw query (value) projection, before position embedding and norm.
        gate: ``[H, D]``; ``[H, H, D]``, of all heads' features for each head; ``[1, H, D]``, of all heads' features
            and the same for each head; None leaves the token's part out.
        gain: number or 0-d tensor; the factor of the logarithm, after any sigmoid.
        positions: 1-based, integer or float, broadcastable to ``[B, H, L]``; below 1 (padding) counts as 1.

    Returns:
        ``[B, H, L]`` in float32 (float64 for float64 projections).

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    _check_temperature(projection, gate, gain, positions)
    dtype = accumulation_dtype(projection.dtype)
    place = 1 + gain * torch.log(positions.to(dtype).clamp(min=1))
    if gate is None:
        return place.expand(projection.shape[:3])
    return torch.tanh(_of_token(F.gelu(projection.to(dtype)), gate.to(dtype))) + place


def _of_token(features: Tensor, gate: Tensor) -> Tensor:
    """Return f, ``[B, H, L]``."""
    if gate.dim() == 2:
        # A product and a sum, not a contraction: autocast would take that one back to 16 bit.
        return (features * gate.unsqueeze(-2)).sum(dim=-1)
    with full_precision(features.device):
        found = gate.flatten(1) @ features.transpose(-1, -2).flatten(1, 2)  # [H or 1, H D] @ [B, H D, L]
    return found.expand(features.shape[:3])


def ssa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
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
    """Attention with an inverse temperature per query and one per value (SSA, arXiv 2411.12892).

    ``softmax_j(cap(scale * tau_i q_i . k_j) + bias_ij) rho_j v_j`` over the visible keys j, where tau is
    ``query_temperature`` and rho ``value_temperature``: plain attention of ``tau q``, ``k`` and ``rho v``.
    Keys, bias and the softmax normaliser are not scaled. The products are float32, rounded back once.

    Args:
        query: ``[B, H, L, D]``, any floating-point dtype; after position embedding and query norm.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        query_temperature: ``[B, H, L]``, best in float32.
        value_temperature: ``[B, Hkv, S]``, best in float32.
        attn_mask: broadcastable to ``[B, H, L, S]``: boolean (True = visible) or additive (-inf = invisible).
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits beside the temperature; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H; KV head g serves the query heads of its group of H / Hkv.
        window: with ``is_causal``, key j is visible to query i iff also i - j < window.
        softcap: bounds the logits, after the temperature and before bias and mask.
        sinks: ``[H]``, as in ``attention``.
        alibi_slopes: ``[H]``, as in ``attention``; not scaled.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``, differentiable in every float input.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_ssa(query, key, value, query_temperature, value_temperature, enable_gqa=enable_gqa)
    return attention(
        scaled(query, query_temperature),
        key,
        scaled(value, value_temperature),
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


def check_ssa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> None:
    """Raise AR402 unless the arguments of SSA attention fit together."""
    check_attention(query, key, value, attn_mask, **options)
    check_shape("query_temperature", query_temperature, "B x H x L", tuple(query.shape[:3]))
    check_shape("value_temperature", value_temperature, "B x Hkv x S", tuple(value.shape[:3]))


def scaled(states: Tensor, factor: Tensor) -> Tensor:
    """Return ``states`` ``[..., D]`` times one factor per token, multiplied in float32 and rounded once."""
    dtype = accumulation_dtype(states.dtype)
    return (states.to(dtype) * factor.to(dtype).unsqueeze(-1)).to(states.dtype)


def through_scaled(upstream: Tensor, states: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by both factors of ``scaled``."""
    by_states = (upstream * factor.to(upstream.dtype).unsqueeze(-1)).to(states.dtype)
    return by_states, (upstream * states.to(upstream.dtype)).sum(-1).to(factor.dtype)


def _check_temperature(projection: Tensor, gate: Tensor | None, gain: float | Tensor, positions: Tensor) -> None:
    if projection.dim() != 4 or not projection.is_floating_point():
        raise error(
            "AR402",
            f"projection has {projection.dim()} dimensions of {projection.dtype}; needed: 4, float",
            hint="projection is [B, H, L, D]",
        )
    B, H, L, D = projection.shape
    if gate is not None and gate.dim() == 3:
        check_shape("gate", gate, "H or 1 x H x D", (1 if gate.shape[0] == 1 else H, H, D))
    elif gate is not None:
        check_shape("gate", gate, "H x D", (H, D))
    check_broadcast("positions", positions, (B, H, L))
    if isinstance(gain, Tensor) and gain.dim() != 0:
        raise error("AR402", f"gain has {gain.dim()} dimensions; needed is a number or 0-d tensor", hint="")
