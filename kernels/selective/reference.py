"""Selective attention in plain PyTorch, dense form: the specification of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax, weighted_values
from attnrewrite.kernels.visibility import (
    check_attention,
    check_shape,
    four_dimensional,
    full_precision,
    visible,
)


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    selection_head: int = 0,
    gamma: float | Tensor = 1.0,
    protect_first: bool = True,
    softcap: float | None = None,
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention in which earlier queries vote keys out, for all heads alike (arXiv 2410.02703).

    With L the logits (after soft cap, ALiBi and bias), h the selection head, and M the pairs that may vote::

        S[i,j] = max(L[h,i,j], 0) where M[i,j], else 0        a vote of query i against key j
        F[i,j] = sum over k < i of S[k,j]                     strictly earlier queries
        O      = softmax_j(L - gamma F) V                     over visible keys, same F for all heads

    M holds the visible pairs with i != j and j not protected. Key j is protected iff it is itself the
    earliest key that query j sees: the first token, also under left padding and in each of several packed
    documents. Votes and their sums are float32 (float64 for float64 inputs). A query that sees no key casts
    no vote and gives 0. With ``is_causal=False`` the order of the queries still decides whose votes count.

    Args:
        query: ``[B, H, L, D]``, any floating-point dtype.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        attn_mask: boolean (True = visible), broadcastable to ``[B, 1, L, L]``, or a bias added to the logits
            (-inf = invisible), broadcastable to ``[B, H, L, L]``. Where the -inf of a bias differ between
            heads, votes and protected keys follow the selection head.
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H; the selection head uses the KV head of its group.
        window: with ``is_causal``, query i sees key j, and may vote on it, iff also i - j < window.
        selection_head: the query head whose logits are the votes.
        gamma: number or 0-d tensor; strength of the votes. 0 gives plain attention.
        protect_first: False lets queries vote on every key but their own.
        softcap: bounds the logits before bias, mask and votes.
        vote_query: ``[B, L, Ds]``, any floating-point dtype. With ``vote_key`` the votes come from a selector of their
            own: ``Z = Ds ** -0.5 vote_query vote_keyᵀ`` takes the place of L[h], without bias, ALiBi or soft cap.
        vote_key: ``[B, L, Ds]``.
        sinks: ``[H]``, as in ``attention``; nobody votes on them.
        alibi_slopes: ``[H]``, as in ``attention``.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``, differentiable in every float input including ``gamma``.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_selective(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        window,
        selection_head,
        gamma,
        softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    check_selector(query, key, vote_query, vote_key)
    L = query.shape[2]
    seen = visible(L, L, is_causal=is_causal, window=window, attn_mask=attn_mask, device=query.device)
    with full_precision(query.device):
        logits = attention_logits(
            query, key, attn_mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes
        )  # [B, H, L, L]
        voting = (
            logits[:, selection_head] if vote_query is None else selector_logits(vote_query, vote_key, logits.dtype)
        )
        penalty, _ = selection_penalty(voting, seen_by(seen, selection_head), protect_first=protect_first)
        weights = masked_softmax(logits - gamma * penalty.unsqueeze(1), seen, sinks)
        return weighted_values(weights, value, dropout_p).to(query.dtype)


def selective_memory(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    selection_head: int = 0,
    gamma: float | Tensor = 1.0,
    protect_first: bool = True,
    softcap: float | None = None,
    vote_query: Tensor | None = None,
    vote_key: Tensor | None = None,
    tau: float = 1.0,
) -> Tensor:
    """How many keys each query of ``selective_attention`` still needs: a soft count, to be made small in training.

    With F the votes that a key has received from earlier queries::

        M[i] = sum over visible keys j of 1 - min(gamma F[i,j], tau) / tau

    A key on which nobody has voted counts 1, one whose penalty has reached ``tau`` counts 0. A query that sees a key
    sees its own, which has no votes, so that M is at least 1; it is 0 for a query that sees none.

    ``query`` is ``[B, H, L, D]``, ``key`` ``[B, Hkv, L, D]``, ``tau`` a number greater than 0; all other arguments are
    those of ``selective_attention``; ALiBi comes as a bias.

    Returns:
        ``[B, L]`` in float32 (float64 for float64 inputs), differentiable in every float input.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    L = query.shape[2]
    seen = visible(L, L, is_causal=is_causal, window=window, attn_mask=attn_mask, device=query.device)
    own = seen_by(seen, selection_head)
    with full_precision(query.device):
        logits = attention_logits(query, key, attn_mask, scale=scale, softcap=softcap)
        voting = (
            logits[:, selection_head] if vote_query is None else selector_logits(vote_query, vote_key, logits.dtype)
        )
        penalty, _ = selection_penalty(voting, own, protect_first=protect_first)
        kept = 1 - (gamma * penalty).clamp(max=tau) / tau
        return (kept if own is None else torch.where(own, kept, 0.0)).sum(-1)


def selector_logits(vote_query: Tensor, vote_key: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the logits ``[B, L, S]`` of a selector's queries ``[B, L, Ds]`` and keys ``[B, S, Ds]``."""
    assert vote_key is not None
    found: Tensor = vote_query.to(dtype) @ vote_key.to(dtype).mT * vote_query.shape[-1] ** -0.5
    return found


def selection_penalty(logits: Tensor, seen: Tensor | None, *, protect_first: bool = True) -> tuple[Tensor, Tensor]:
    """Return the penalty F of every pair, and the state: the votes that each key has received in the end.

    Args:
        logits: ``[B, L, L]``, the logits of the selection head, before any penalty.
        seen: visible pairs, broadcastable to ``[B, L, L]``; None if all are.
        protect_first: whether the first visible key is exempt from votes.

    Returns:
        F ``[B, L, L]``, where F[:, i] sums the votes of the queries before i, and the state ``[B, L]``, which
        sums those of all queries.
    """
    votes = torch.where(_may_vote(logits, seen, protect_first), torch.relu(logits), 0.0)  # [B, L, L]
    received = torch.cumsum(votes, dim=1)
    # Shifted by a row rather than less the row's own votes: F[j+1, j] must be 0 without rounding.
    penalty = torch.cat((torch.zeros_like(received[:, :1]), received[:, :-1]), dim=1)
    return penalty, received[:, -1]


def _may_vote(logits: Tensor, seen: Tensor | None, protect_first: bool) -> Tensor:
    L = logits.shape[-1]
    position = torch.arange(L, device=logits.device)
    itself = position.unsqueeze(-1) == position  # [L, L]
    if seen is None:
        seen = torch.ones_like(itself)
    seen = seen.expand(*seen.shape[:-2], L, L)
    if not protect_first:
        return seen & ~itself
    earlier = position.unsqueeze(-1) > position  # [L, L]
    sees_itself, sees_earlier = (seen & itself).any(dim=-1), (seen & earlier).any(dim=-1)
    protected = sees_itself & ~sees_earlier  # [..., L], of a query, hence of the key at its position
    return seen & ~itself & ~protected.unsqueeze(-2)


def seen_by(seen: Tensor | None, head: int) -> Tensor | None:
    """Take one head's slice of a mask that broadcasts to ``[B, H, L, L]``."""
    if seen is None:
        return None
    seen = four_dimensional(seen)
    return seen[:, head if seen.shape[1] > 1 else 0]


def check_selective(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    window: int | None,
    selection_head: int,
    gamma: float | Tensor,
    softcap: float | None,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Raise AR402 unless the arguments of selective attention fit together."""
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
    if L != S:
        raise error(
            "AR402",
            f"query has {L} positions and key {S}; votes need the two to be one sequence",
            hint="pass query, key and value of the same length, or call selective_decode",
        )
    check_selection(query, attn_mask, selection_head, gamma)


def check_selector(query: Tensor, key: Tensor, vote_query: Tensor | None, vote_key: Tensor | None) -> None:
    """Raise AR402 unless a selector is absent, or its queries and keys fit together and to those of the attention."""
    if vote_query is None and vote_key is None:
        return
    if vote_query is None or vote_key is None:
        raise error("AR402", "one of vote_query and vote_key is missing", hint="pass both, or neither")
    (B, _, L, _), S, width = query.shape, key.shape[2], vote_query.shape[-1]
    check_shape("vote_query", vote_query, "B x L x Ds", (B, L, width))
    check_shape("vote_key", vote_key, "B x S x Ds", (B, S, width))


def check_selection(query: Tensor, attn_mask: Tensor | None, selection_head: int, gamma: float | Tensor) -> None:
    """Raise AR402 unless the selection head exists, gamma is one number, and a boolean mask is for all heads."""
    H = query.shape[1]
    if not 0 <= selection_head < H:
        raise error("AR402", f"selection_head is {selection_head}; query has heads 0 to {H - 1}", hint="")
    if isinstance(gamma, Tensor) and gamma.dim() != 0:
        raise error("AR402", f"gamma has {gamma.dim()} dimensions; needed is a number or 0-d tensor", hint="")
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return
    heads = four_dimensional(attn_mask).shape[1]
    if heads != 1:
        raise error(
            "AR402",
            f"attn_mask is boolean with {heads} heads; needed is 1, as one set of votes serves all heads",
            hint="pass a mask that broadcasts to [B, 1, L, L]",
        )
