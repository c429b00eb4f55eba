"""The operator ``attnrewrite::ssa_attention`` in operators of torch: the reference, with torch's fused attention."""

from __future__ import annotations

from torch import Tensor

from attnrewrite.kernels.ssa import reference


def ssa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_temperature: Tensor,
    value_temperature: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Compute what the operator computes; dropout draws other numbers."""
    return reference.ssa_attention(
        query,
        key,
        value,
        query_temperature,
        value_temperature,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        True,
        window,
        softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    ).contiguous()
