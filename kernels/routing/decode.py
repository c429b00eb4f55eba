"""Routing attention token by token: rule ``argmax_window``, causal, with a queue of keys per cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing.attend import pair_weights, take, unseen_as_zero
from attnrewrite.kernels.routing.clusters import nearest
from attnrewrite.kernels.routing.prepare import Options, Routed, Vectors, check_routing, score_vectors, valid_tokens
from attnrewrite.kernels.routing.selection import rank_after, ranks, take_ranks
from attnrewrite.kernels.visibility import check_attention, check_shape, full_precision, repeat_kv


class RoutingState(NamedTuple):
    """The last ``window_size`` keys of every cluster, oldest first; its size does not grow with the sequence."""

    keys: Tensor  # [B, Hkv, C, W, D], as scored
    values: Tensor  # [B, Hkv, C, W, Dv]
    positions: Tensor  # [B, Hkv, C, W], int64; -1 where there is no key yet
    length: Tensor  # 0-d int64, tokens so far, padded ones included


def empty_state(
    B: int,
    Hkv: int,
    C: int,
    window_size: int,
    D: int,
    Dv: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> RoutingState:
    """Return the state before the first token; ``logits="normed"`` needs float32 (float64 for float64 inputs)."""
    keys = torch.zeros(B, Hkv, C, window_size, D, dtype=dtype, device=device)
    values = torch.zeros(B, Hkv, C, window_size, Dv, dtype=dtype, device=device)
    positions = torch.full((B, Hkv, C, window_size), -1, device=device)
    return RoutingState(keys, values, positions, torch.zeros((), dtype=torch.int64, device=device))


def prefilled_state(
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    window_size: int,
    attn_mask: Tensor | None = None,
    *,
    shared_qk: bool = False,
    logits: str = "raw",
    center_key: Tensor | None = None,
    routing_key: Tensor | None = None,
) -> RoutingState:
    """Return the state after a whole sequence, the same as after one ``routing_decode`` per token.

    Args:
        key: ``[B, Hkv, S, D]``, after position embedding; with ``shared_qk`` the query.
        value: ``[B, Hkv, S, Dv]``.
        centroids: ``[Hkv, C, D]``.
        window_size: keys kept per cluster.
        attn_mask: boolean, ``[B, 1, 1, S]``, False = padded.
        shared_qk: as in ``routing_attention``.
        logits: as in ``routing_attention``.
        center_key: as in ``routing_attention``; with ``shared_qk`` pass ``center_query`` here.
        routing_key: as in ``routing_attention``; with ``shared_qk`` pass ``routing_query`` here.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_attention(key, key, value, attn_mask)
    options = Options("argmax_window", window_size, shared_qk, logits, is_causal=True)
    # Keys alone: as queries of shared_qk they are routed and normed once.
    routed = Routed(key, key, value, centroids, attn_mask, center_key, routing_query=routing_key)
    _check_padding(attn_mask)
    check_routing(routed, options)
    vectors = score_vectors(routed, options._replace(shared_qk=True))
    B, Hkv, S, _ = key.shape
    C = centroids.shape[1]
    ranked = ranks(nearest(vectors.key_affinity, valid_tokens(attn_mask, B, S)))
    first = torch.arange(C, device=key.device).expand(B, Hkv, C) * S
    low, high = rank_after(ranked, first - 1), rank_after(ranked, first + S - 1)  # [B, Hkv, C]
    positions = take_ranks(ranked % S, low, high, window_size)
    kept = (positions >= 0).unsqueeze(-1)
    head = torch.arange(B * Hkv, device=key.device).reshape(B, Hkv, 1, 1) * S
    numbers = head + positions.clamp(min=0)
    stored = (vectors.key if logits == "normed" else vectors.key.to(key.dtype), value)
    keys, values = (torch.where(kept, take(states, numbers), 0.0) for states in stored)
    return RoutingState(keys, values, positions, torch.full((), S, device=key.device))


def routing_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    state: RoutingState,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    *,
    shared_qk: bool = False,
    logits: str = "raw",
    center_query: Tensor | None = None,
    center_key: Tensor | None = None,
    routing_query: Tensor | None = None,
    routing_key: Tensor | None = None,
) -> tuple[Tensor, RoutingState]:
    """Compute the next row of causal ``routing_attention`` (rule ``argmax_window``) and the state after it.

    The window size is that of the state. ``topw`` has no decoding that equals its forward pass.

    Args:
        query: ``[B, H, 1, D]``, the next token.
        key: ``[B, Hkv, 1, D]``. Not used with ``shared_qk``: pass the query.
        value: ``[B, Hkv, 1, Dv]``.
        centroids: ``[Hkv, C, D]``.
        state: from ``empty_state``, ``prefilled_state`` or the step before; not changed.
        attn_mask: boolean, ``[B, 1, 1, 1]``: False where the token is padding, which gives 0 and is not kept.
        scale: as in ``routing_attention``, and so are all that follow.
        enable_gqa: allow Hkv < H.
        window: only the last ``window`` positions are visible.
        shared_qk: the query is the key, too.
        logits: ``"raw"`` or ``"normed"``.
        center_query: ``[Hkv, D]``.
        center_key: ``[Hkv, D]``.
        routing_query: ``[B, H, 1, D]``.
        routing_key: ``[B, Hkv, 1, D]``.

    Returns:
        ``[B, H, 1, Dv]`` in the dtype of ``query``, and the next state.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_attention(query, key, value, attn_mask, is_causal=True, enable_gqa=enable_gqa, window=window)
    options = Options("argmax_window", None, shared_qk, logits, True, scale, window)
    routed = Routed(query, key, value, centroids, attn_mask, center_query, center_key, routing_query, routing_key)
    _check_padding(attn_mask)
    check_routing(routed, options)
    _check_state(routed, state)
    with full_precision(query.device):
        vectors = score_vectors(routed, options)
        valid = valid_tokens(attn_mask, query.shape[0], 1)
        pushed = _push(state, vectors, value, valid)
        return _attend(options, vectors, value, pushed, valid).to(query.dtype), pushed


def _push(state: RoutingState, vectors: Vectors, value: Tensor, valid: Tensor | None) -> RoutingState:
    """Append the token to the queue of its cluster, whose oldest key falls out."""
    C = state.keys.shape[2]
    cluster = nearest(vectors.key_affinity, valid)  # [B, Hkv, 1]
    here = (cluster == torch.arange(C, device=cluster.device))[..., None]  # [B, Hkv, C, 1]
    position = state.length.expand(cluster.shape)
    return RoutingState(
        _shifted(state.keys, vectors.key, here.unsqueeze(-1)),
        _shifted(state.values, value, here.unsqueeze(-1)),
        _shifted(state.positions, position, here),
        state.length + 1,
    )


def _shifted(queue: Tensor, newest: Tensor, here: Tensor) -> Tensor:
    """Shift the queues ``[B, Hkv, C, W, ...]`` marked by ``here`` and end them with ``newest`` ``[B, Hkv, 1, ...]``."""
    last = newest.to(queue.dtype).unsqueeze(3).expand(*queue.shape[:3], 1, *queue.shape[4:])
    return torch.where(here, torch.cat((queue[:, :, :, 1:], last), dim=3), queue)


def _attend(options: Options, vectors: Vectors, value: Tensor, state: RoutingState, valid: Tensor | None) -> Tensor:
    """Attend from the newest token to the queue of its query's cluster and, unless shared, to itself."""
    query, dtype = vectors.query, vectors.query.dtype
    H = query.shape[1]
    keys, values, positions = _queues(state, nearest(vectors.query_affinity), H)
    now = state.length - 1
    visible, fixed = positions >= 0, None
    if options.window is not None:
        visible = visible & (now - positions < options.window)
    keys, values = keys.to(dtype), values.to(dtype)
    if options.shared_qk:
        fixed = (positions == now).unsqueeze(-2)
    else:
        keys = torch.cat((keys, repeat_kv(vectors.key, H)), dim=2)
        values = torch.cat((values, repeat_kv(value.to(dtype), H)), dim=2)
        visible = torch.cat((visible, positions[..., -1:] != now), dim=-1)
    if valid is not None:
        visible = visible & valid.unsqueeze(1)
    visible = visible.unsqueeze(-2)  # [B, H, 1, K]
    keys, values = unseen_as_zero(visible, keys, values)
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    return torch.matmul(pair_weights(query, keys, visible, scale, None, fixed), values)


def _queues(state: RoutingState, cluster: Tensor, H: int) -> tuple[Tensor, ...]:
    """Return keys, values and positions of one cluster per query head, ``[B, H, W, ...]``; ``cluster`` [B, H, 1]."""
    B, Hkv = state.positions.shape[:2]
    batch = torch.arange(B, device=cluster.device).unsqueeze(-1)
    head = torch.arange(H, device=cluster.device) // (H // Hkv)
    return tuple(part[batch, head, cluster.squeeze(-1)] for part in state[:3])


def _check_padding(attn_mask: Tensor | None) -> None:
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise error(
            "AR402",
            f"attn_mask has dtype {attn_mask.dtype}; decoding takes padding, torch.bool, and no bias",
            hint="pass False where a token is padding",
        )


def _check_state(routed: Routed, state: RoutingState) -> None:
    if routed.query.shape[2] != 1:
        raise error("AR402", f"query has {routed.query.shape[2]} positions; a step decodes one", hint="")
    B, Hkv, _, D = routed.key.shape
    C, W = state.positions.shape[2:] if state.positions.dim() == 4 else (-1, -1)
    wanted = (B, Hkv, routed.centroids.shape[1], W)
    check_shape("state.keys", state.keys, "B x Hkv x C x W x D", (*wanted, D))
    check_shape("state.values", state.values, "B x Hkv x C x W x Dv", (*wanted, routed.value.shape[-1]))
    if tuple(state.positions.shape) != wanted:
        raise error("AR402", f"state.positions has {C} clusters; centroids have {wanted[2]}", hint="")
