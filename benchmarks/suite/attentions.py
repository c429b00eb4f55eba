"""The attentions by name, causal, with made-up extra tensors: what the memory and time entries run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite import functional
from attnrewrite.kernels.sdpa.reference import attention_logits
from attnrewrite.kernels.selective import reference as selective
from attnrewrite.kernels.symmetric import reference as symmetric

CLUSTERS_OF, PIXELS, BUDGET = 128, 128, 64
NAMES = ("selective", "ssa", "symmetric", "routing", "sea")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as eager models write it, with whole score matrices."""
    logits = attention_logits(query, key, None, scale=None, softcap=None)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(later, float("-inf")).softmax(-1).to(value.dtype) @ value


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's fused attention."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def ours(name: str, like: Tensor) -> Attend:
    """Return the library's function for queries like ``like`` [B, H, N, D]."""
    B, H, N, D = like.shape
    if name == "selective":
        return functional.selective_attention
    if name == "symmetric":
        return lambda q, k, v: functional.symmetric_attention(k, v, is_causal=True)
    if name == "ssa":
        tau_q, tau_v = torch.rand(B, H, N), torch.rand(B, H, N)
        return lambda q, k, v: functional.ssa_attention(q, k, v, tau_q, tau_v, is_causal=True)
    if name == "routing":
        centroids = torch.randn(H, max(1, N // CLUSTERS_OF), D)
        return lambda q, k, v: functional.routing_attention(q, k, v, centroids, is_causal=True, window_size=CLUSTERS_OF)
    estimated = torch.randn(B, H, N, PIXELS)
    return lambda q, k, v: functional.sea_attention(q, k, v, estimated, is_causal=True, budget=BUDGET)


def dense(name: str, like: Tensor) -> Attend:
    """Return the same in its dense form; routing and SEA have none, so there it is the attention they replace."""
    B, H, N, _ = like.shape
    if name == "selective":
        return selective.selective_attention
    if name == "symmetric":
        return lambda q, k, v: symmetric.symmetric_attention(k, v, is_causal=True)
    if name == "ssa":
        tau_q, tau_v = torch.rand(B, H, N), torch.rand(B, H, N)
        return lambda q, k, v: plain(q * tau_q[..., None], k, v * tau_v[..., None])
    return plain
