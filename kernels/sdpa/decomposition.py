"""torch's fused attention in operators that compilers other than torch's know: the reference, step by step."""

from __future__ import annotations

from torch import Tensor

from attnrewrite.kernels.sdpa.reference import eager_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch computes, in the memory order that its fused kernels give: ``[B, L, H, Dv]``, transposed.

    A graph has been traced with that order, and views in it would fit no other one.
    """
    out = eager_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
