"""The operator ``attnrewrite::selective_attention`` in operators of torch: the reference, in dense form."""

from __future__ import annotations

from torch import Tensor

from attnrewrite.kernels.selective import reference


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    selection_head: int,
    protect_first: bool,
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Compute what the operator computes; dropout draws other numbers."""
    return reference.selective_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        True,
        window,
        selection_head=selection_head,
        gamma=gamma,
        protect_first=protect_first,
        softcap=softcap,
        vote_query=vote_query,
        vote_key=vote_key,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
