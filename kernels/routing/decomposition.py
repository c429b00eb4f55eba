"""The operators ``attnrewrite::routing_attention``, in dense form, and ``routing_ready`` in operators of torch.

A graph for other compilers has static shapes and no searches, so here membership is a mask ``[B, H, G, L, S]`` over all
pairs in place of lists of positions: G = C groups for ``topw``, one for ``argmax_window``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.largest import among_largest
from attnrewrite.kernels.routing.attend import Scored, pair_weights, unseen_as_zero
from attnrewrite.kernels.routing.prepare import Options, Routed, Vectors, both, score_vectors, scored_from, valid_tokens
from attnrewrite.kernels.routing.selection import assigned, wanted_width
from attnrewrite.kernels.visibility import full_precision, repeat_kv, visible


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    attn_mask: Tensor | None = None,
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
    valid: Tensor | None = None,
    key_cluster: Tensor | None = None,
    position: Tensor | None = None,
    rule: str = "argmax_window",
    window_size: int | None = None,
    shared_qk: bool = False,
    logits: str = "raw",
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    paper_causal: bool = False,
) -> Tensor:
    """Compute what the operator computes, with all pairs scored; a NaN reaches all queries that see its token."""
    routed = Routed(
        query,
        key,
        value,
        centroids,
        attn_mask,
        center_query,
        center_key,
        routing_query,
        routing_key,
        valid,
        key_cluster,
        position,
    )
    options = Options(rule, window_size, shared_qk, logits, is_causal, scale, window, paper_causal)
    with full_precision(query.device):
        vectors = score_vectors(routed, options)
        valid = both(valid, valid_tokens(attn_mask, *key.shape[::2]))
        scored = scored_from(routed, options, vectors)
        if rule == "argmax_window":
            meets = _windows(vectors, options, valid, scored.first)
        else:
            meets = _clusters(vectors, options, valid)
        return _attend(scored, meets).to(query.dtype)


def routing_ready(centroids: Tensor, steps: Tensor) -> Tensor:
    """Return the centroids; that they are set is checked when a program is made, not when it runs."""
    return centroids.clone()


def _attend(scored: Scored, meets: Tensor) -> Tensor:
    """Return the mean over the groups of each query of its attention there, ``[B, H, L, Dv]``; 0 if it has none."""
    H, L, S = *scored.query.shape[1:3], scored.key.shape[2]
    seen = visible(
        L,
        S,
        is_causal=scored.is_causal,
        window=scored.window,
        attn_mask=scored.bias,
        device=scored.query.device,
        first=scored.first,
    )
    if seen is not None:
        meets = meets & (seen if seen.dim() == 2 else seen.unsqueeze(2))
    key, value = (repeat_kv(states, H).unsqueeze(2) for states in (scored.key, scored.value))
    key, value = unseen_as_zero(meets, key, value)
    bias = None if scored.bias is None else scored.bias.unsqueeze(2)
    itself = _own(L, S, scored.first, key.device) if scored.shared_qk else None
    weights = pair_weights(scored.query.unsqueeze(2), key, meets, scored.scale, bias, itself)
    hits = meets.any(dim=-1).sum(dim=2).clamp(min=1)  # [B, H, L]
    return (weights @ value).sum(dim=2) / hits.unsqueeze(-1)


def _own(L: int, S: int, first: int | Tensor, device: torch.device) -> Tensor:
    """Return which key is each query's own, ``[L, S]``."""
    return torch.arange(L, device=device).unsqueeze(-1) + first == torch.arange(S, device=device)


def _windows(vectors: Vectors, options: Options, valid: Tensor | None, first: int | Tensor) -> Tensor:
    """Return the pairs of ``select_windows``, ``[B, H, 1, L, S]``."""
    L, keys = vectors.query_affinity.shape[2], vectors.key_affinity
    position = torch.arange(L, device=keys.device) + first
    asked, offered, real = assigned(vectors.query_affinity, keys, valid, position)
    offered = offered.repeat_interleave(asked.shape[1] // offered.shape[1], dim=1)
    width = wanted_width(options.window_size, vectors.query_affinity)
    before = width if options.is_causal else width - width // 2
    behind = position.unsqueeze(-1) >= torch.arange(keys.shape[2], device=keys.device)  # [L, S], key j not after i
    same = asked.unsqueeze(-1) == offered.unsqueeze(-2)
    earlier = same & behind
    later_of_them = earlier.sum(-1, keepdim=True) - earlier.cumsum(-1)  # keys of the cluster in (j, i]
    meets = earlier & (later_of_them < before)
    if not options.is_causal:
        later = same & ~behind
        meets = meets | (later & (later.cumsum(-1) <= width // 2))
    if not options.shared_qk:
        meets = meets | _own(L, keys.shape[2], first, keys.device)
    if real is not None:
        meets = meets & real[:, None, :, None]
    return meets.unsqueeze(2)


def _clusters(vectors: Vectors, options: Options, valid: Tensor | None) -> Tensor:
    """Return the pairs of ``select_clusters``, ``[B, H, C, L, S]``."""
    queries, keys = vectors.query_affinity, vectors.key_affinity
    asking = _members(queries, options.window_size, valid if queries.shape[2] == keys.shape[2] else None)
    offered = _members(keys, options.window_size, valid)
    offered = offered.repeat_interleave(asking.shape[1] // offered.shape[1], dim=1)
    return asking.unsqueeze(-1) & offered.unsqueeze(-2)


def _members(affinities: Tensor, window_size: int | None, valid: Tensor | None) -> Tensor:
    """Return who belongs to which cluster, ``[B, H, C, N]``, as ``strongest`` lists them."""
    ranked = affinities.mT
    if valid is not None:
        ranked = ranked.masked_fill(~valid[:, None, None], float("-inf"))
    # Tensors and not numbers: torch-mlir knows no smaller of two sizes.
    wanted, all_of_them = (
        torch.full((1,), size, device=ranked.device)
        for size in (wanted_width(window_size, affinities), affinities.shape[2])
    )
    members = among_largest(ranked, torch.minimum(wanted, all_of_them))
    return members if valid is None else members & valid[:, None, None]
