"""From the arguments of routing attention to what is scored and who meets whom."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing.attend import Scored
from attnrewrite.kernels.routing.clusters import affinity, check_valid, routing_features
from attnrewrite.kernels.routing.selection import Selection, select_clusters, select_windows
from attnrewrite.kernels.visibility import accumulation_dtype, additive, check_shape, four_dimensional

RULES = ("argmax_window", "topw")
LOGITS = ("raw", "normed")


class Options(NamedTuple):
    """The arguments of routing attention that are no tensors."""

    rule: str = "argmax_window"
    window_size: int | None = None
    shared_qk: bool = False
    logits: str = "raw"
    is_causal: bool = False
    scale: float | None = None
    window: int | None = None
    paper_causal: bool = False


class Routed(NamedTuple):
    """The tensors of routing attention."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    centroids: Tensor  # [Hkv, C, D]
    attn_mask: Tensor | None = None  # [B, 1, 1, S], or a bias
    center_query: Tensor | None = None  # [Hkv, D]
    center_key: Tensor | None = None  # [Hkv, D]
    routing_query: Tensor | None = None  # [B, H, L, D]
    routing_key: Tensor | None = None  # [B, Hkv, S, D]
    valid: Tensor | None = None  # [B, S]
    key_cluster: Tensor | None = None  # [B, Hkv, S]
    position: Tensor | None = None  # 0-d

    @property
    def first(self) -> int | Tensor:
        """Where the first query stands among the keys."""
        if self.key_cluster is None:
            return 0
        return self.key.shape[2] - self.query.shape[2] if self.position is None else self.position


class Vectors(NamedTuple):
    """Query and key as scored, float32 (float64), and the affinities of both; of cached keys the clusters."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hkv, S, D]
    query_affinity: Tensor  # [B, H, L, C]
    key_affinity: Tensor  # [B, Hkv, S, C]; with shared_qk the same tensor; [B, Hkv, S] where they are known


def prepare(routed: Routed, options: Options) -> tuple[Scored, Selection]:
    """Return what is scored and the selection. The arguments have been checked."""
    vectors = score_vectors(routed, options)
    valid = both(routed.valid, valid_tokens(routed.attn_mask, *routed.key.shape[::2]))
    return scored_from(routed, options, vectors), _select(vectors, options, valid, routed.first)


def scored_from(routed: Routed, options: Options, vectors: Vectors) -> Scored:
    """Return what is scored: the vectors, the values and what is added to the logits."""
    bias = additive(routed.attn_mask)
    return Scored(
        vectors.query,
        vectors.key,
        routed.value.to(vectors.query.dtype),
        None if bias is None else four_dimensional(bias),
        routed.query.shape[-1] ** -0.5 if options.scale is None else options.scale,
        options.is_causal,
        options.window,
        options.shared_qk,
        routed.first,
    )


def score_vectors(routed: Routed, options: Options) -> Vectors:
    """Return the vectors of the logits, with their gradient, and the affinities, without."""
    normed, dtype = options.logits == "normed", accumulation_dtype(routed.query.dtype)
    query, query_affinity = _one_side(
        routed.query, routed.routing_query, routed.center_query, routed.centroids, normed, dtype
    )
    if routed.key_cluster is not None:
        center = routed.center_query if options.shared_qk else routed.center_key
        key = routing_features(routed.key, center) if normed else routed.key.to(dtype)
        return Vectors(query, key, query_affinity, routed.key_cluster.long().contiguous())
    if options.shared_qk:
        return Vectors(query, query, query_affinity, query_affinity)
    key, key_affinity = _one_side(routed.key, routed.routing_key, routed.center_key, routed.centroids, normed, dtype)
    return Vectors(query, key, query_affinity, key_affinity)


def _one_side(
    states: Tensor, instead: Tensor | None, center: Tensor | None, centroids: Tensor, normed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features = routing_features(states if instead is None else instead, center)
    affinities = affinity(features.detach(), centroids.detach())
    # Comparisons would swallow a NaN of the routing alone; so it goes to the logits.
    broken = affinities.isnan().any(dim=-1, keepdim=True)
    return torch.where(broken, float("nan"), features if normed else states.to(dtype)), affinities


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return where both hold; None holds everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _select(vectors: Vectors, options: Options, valid: Tensor | None, first: int | Tensor) -> Selection:
    queries, keys = vectors.query_affinity, vectors.key_affinity
    if options.rule == "argmax_window":
        windows = select_windows(
            queries, keys, options.window_size, is_causal=options.is_causal, valid=valid, first=first
        )
        return replace(windows, alone=None) if options.shared_qk else windows
    query_valid = valid if queries.shape[2] == keys.shape[2] else None
    return select_clusters(queries, keys, options.window_size, query_valid, valid)


def valid_tokens(attn_mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """Return which keys are no padding, ``[B, S]``, or None if the mask is absent or a bias per query or head."""
    if attn_mask is None:
        return None
    mask = four_dimensional(attn_mask)
    if mask.shape[1:3] != (1, 1):
        return None
    real = mask if mask.dtype == torch.bool else mask != float("-inf")
    return real[:, 0, 0].expand(B, S)


def check_routing(routed: Routed, options: Options) -> None:
    """Raise AR402 unless the arguments that only routing attention has fit together."""
    for name, value, known in (("rule", options.rule, RULES), ("logits", options.logits, LOGITS)):
        if value not in known:
            raise error("AR402", f"{name} is {value!r}; needed is {known[0]!r} or {known[1]!r}", hint="")
    if options.window_size is not None and options.window_size < 1:
        raise error("AR402", f"window_size is {options.window_size}; a cluster takes one token at least", hint="")
    _check_tensors(routed)
    _check_mask(routed.attn_mask)
    check_valid(routed.valid, *routed.key.shape[::2])
    _check_lengths(routed, options)
    _check_sharing(routed, options)
    if options.logits == "normed" and (routed.routing_query is not None or routed.routing_key is not None):
        raise error(
            "AR402",
            "logits is 'normed' and routing_query or routing_key is given; the normed vectors are those routed",
            hint="norm query and key before their position embedding and pass logits='raw'",
        )


def _check_tensors(routed: Routed) -> None:
    B, H, L, D = routed.query.shape
    Hkv, S = routed.key.shape[1:3]
    clusters = routed.centroids.shape[1] if routed.centroids.dim() == 3 else 0
    wanted = {
        "centroids": ("Hkv x C x D", (Hkv, max(clusters, 1), D)),
        "center_query": ("Hkv x D", (Hkv, D)),
        "center_key": ("Hkv x D", (Hkv, D)),
        "routing_query": ("B x H x L x D", (B, H, L, D)),
        "routing_key": ("B x Hkv x S x D", (B, Hkv, S, D)),
    }
    for name, (letters, shape) in wanted.items():
        tensor = getattr(routed, name)
        if tensor is None:
            continue
        check_shape(name, tensor, letters, shape)
        if tensor.device != routed.query.device:
            raise error("AR402", f"query is on {routed.query.device} and {name} on {tensor.device}", hint="")


def _check_mask(attn_mask: Tensor | None) -> None:
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return
    H, L = four_dimensional(attn_mask).shape[1:3]
    if (H, L) != (1, 1):
        raise error(
            "AR402",
            f"attn_mask is boolean with {H} heads and {L} queries; needed is 1 of each, as membership has no query",
            hint="pass padding as [B, 1, 1, S], and use is_causal and window for the rest",
        )


def _check_lengths(routed: Routed, options: Options) -> None:
    L, S = routed.query.shape[2], routed.key.shape[2]
    if L < 1 or S < 1:
        raise error("AR402", f"query has {L} positions and key {S}; needed is one at least", hint="")
    if routed.key_cluster is not None:
        _check_cached(routed, options)
    elif L != S and (options.rule != "topw" or options.is_causal or options.shared_qk):
        raise error(
            "AR402",
            f"query has {L} positions and key {S}; only rule='topw', not causal and not shared, takes two sequences",
            hint="pass query, key and value of the same length",
        )
    if options.rule == "topw" and options.is_causal and not options.paper_causal:
        raise error(
            "AR402",
            "rule is 'topw' and is_causal is True; later tokens would decide which earlier ones a cluster takes",
            hint="use rule='argmax_window', or accept the leak with paper_causal=True",
        )


def _check_cached(routed: Routed, options: Options) -> None:
    (B, Hkv, S, _), L = routed.key.shape, routed.query.shape[2]
    cluster, position = routed.key_cluster, routed.position
    assert cluster is not None
    if tuple(cluster.shape) != (B, Hkv, S) or cluster.is_floating_point():
        size = " x ".join(str(n) for n in cluster.shape)
        detail = f"key_cluster is {size} of {cluster.dtype}; needed is B x Hkv x S = {B} x {Hkv} x {S} of integers"
        raise error("AR402", detail, hint="")
    if position is not None and (position.dim() != 0 or position.is_floating_point()):
        raise error("AR402", f"position has {position.dim()} dimensions of {position.dtype}; it is an integer", hint="")
    if options.rule != "argmax_window" or not options.is_causal or routed.routing_key is not None:
        detail = "key_cluster is for rule='argmax_window' with is_causal=True, in place of routing_key"
        raise error("AR402", detail, hint="")
    if L > S or (L != S and options.window_size is None):
        detail = f"query has {L} positions and key {S}, with window_size {options.window_size}"
        raise error("AR402", detail, hint="key holds those of the queries, too; name a window_size")


def _check_sharing(routed: Routed, options: Options) -> None:
    H, Hkv = routed.query.shape[1], routed.key.shape[1]
    if not options.shared_qk:
        return
    if Hkv != H:
        raise error("AR402", f"shared_qk is True, query has {H} heads and key {Hkv}; needed are as many", hint="")
    if routed.routing_key is not None or routed.center_key is not None:
        raise error("AR402", "shared_qk is True, so routing_key and center_key have no use", hint="leave them out")
