"""The gradient of routing attention in closed form: weights are computed again, nothing is recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.routing.attend import Gathered, Scored, blocks, gathered, slot_count
from attnrewrite.kernels.routing.clusters import centered, inverse_deviation
from attnrewrite.kernels.routing.prepare import Options, Routed, prepare
from attnrewrite.kernels.routing.selection import Selection
from attnrewrite.kernels.routing.tiles import tiled
from attnrewrite.kernels.visibility import full_precision


@torch.no_grad()
def routing_attention_backward(grad: Tensor, routed: Routed, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each in the shape and dtype of its tensor.

    Args:
        grad: ``[B, H, L, Dv]``, of the output.
        routed: the tensors given to the forward pass; membership is found again from them.
        options: the options given to it.
    """
    with full_precision(grad.device):
        scored, selection = prepare(routed, options)
        selection = tiled(selection)
        dquery, dkey, dvalue = attend_backward(scored, selection, grad.to(scored.query.dtype))
        shared = options.shared_qk and routed.key_cluster is None
        if shared:
            dquery, dkey = dquery + dkey, torch.zeros_like(routed.key)
        if options.logits == "normed":
            dquery = features_backward(dquery, routed.query, routed.center_query)
            center = routed.center_query if options.shared_qk else routed.center_key
            dkey = dkey if shared else features_backward(dkey, routed.key, center)
    return dquery.to(routed.query.dtype), dkey.to(routed.key.dtype), dvalue.to(routed.value.dtype)


def attend_backward(scored: Scored, selection: Selection, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of what ``attend`` scores: query, key and value, in its dtype."""
    upstream = (grad / slot_count(scored, selection)).flatten(0, 2)  # [B H L, Dv]
    totals = [torch.zeros_like(states).flatten(0, 2) for states in (scored.query, scored.key, scored.value)]
    for block in blocks(scored, selection):
        part = gathered(scored, block)
        reached = upstream.index_select(0, part.query_rows.flatten()).reshape(*part.query_rows.shape, -1)
        numbers = (part.query_rows, part.key_rows, part.key_rows)
        for total, number, found in zip(totals, numbers, block_backward(part, reached, scored.scale), strict=True):
            total.index_add_(0, number.flatten(), found.flatten(0, 3))
    dquery, dkey, dvalue = totals
    return dquery.reshape(scored.query.shape), dkey.reshape(scored.key.shape), dvalue.reshape(scored.value.shape)


def block_backward(part: Gathered, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gathered queries, keys and values, given ``grad`` ``[B, H, G, M, Dv]``."""
    P = part.weights
    dP = torch.matmul(grad, part.value.mT)
    dS = P * (dP - (P * dP).sum(dim=-1, keepdim=True)) * scale
    if part.fixed is not None:
        dS = dS.masked_fill(part.fixed, 0.0)
    return torch.matmul(dS, part.key), torch.matmul(dS.mT, part.query), torch.matmul(P.mT, grad)


def features_backward(grad: Tensor, states: Tensor, center: Tensor | None) -> Tensor:
    """Return the gradient of ``routing_features`` in ``states``: ``(g - mean g - r mean(g r)) / std``."""
    shifted = centered(states, center)
    inverse = inverse_deviation(shifted)
    features = shifted * inverse
    along = (grad * features).mean(dim=-1, keepdim=True)
    return inverse * (grad - grad.mean(dim=-1, keepdim=True) - features * along)
