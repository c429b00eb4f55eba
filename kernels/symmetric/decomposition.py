"""The operator ``attnrewrite::symmetric_attention`` in operators of torch: the reference, in dense form."""

from __future__ import annotations

from torch import Tensor

from attnrewrite.kernels.symmetric import reference


def symmetric_attention(
    shared: Tensor,
    value: Tensor,
    pair: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    mask_self: bool,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Compute what the operator computes; dropout draws other numbers."""
    return reference.symmetric_attention(
        shared,
        value,
        pair,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        pair is not None,
        window,
        softcap=softcap,
        mask_self=mask_self,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
