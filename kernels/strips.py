"""Attention over strips of queries, forward and backward: what all dense variants are made of.

A strip is a block of rows of the score matrix, for all heads and the keys that its rows can see. Only one strip of
scores exists at a time; backward makes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels.sdpa.reference import alibi, masked_softmax, sink_softmax
from attnrewrite.kernels.visibility import accumulation_dtype, additive, four_dimensional, visible

BUDGET = 1 << 22
"""Scores in one strip: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Options:
    """How a score becomes a weight: ``dropout(softmax(cap(scale * q . k) - slope |i - j| + bias))`` over visible keys.

    ``mask_self`` gives the diagonal the finite logit -5e4: a query attends to itself only where it sees nothing else.
    Dropout draws from ``seed`` alone, so that backward drops the same weights. Query i stands at position
    ``i + offset`` among the keys. ``sinks`` ``[H]`` are logits without a key, ``slopes`` ``[H]`` those of ALiBi.
    """

    scale: float
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask_self: bool = False
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    def kept(self, weights: Tensor, rows: slice) -> Tensor | None:
        """Return what dropout multiplies the weights of these rows by: 0 or 1 / (1 - p). None without dropout."""
        if self.dropout_p == 0.0:
            return None
        source = torch.Generator(weights.device).manual_seed(self.seed + rows.start)
        drawn = torch.rand(weights.shape, generator=source, device=weights.device, dtype=weights.dtype)
        return (drawn >= self.dropout_p).to(weights.dtype) / max(1.0 - self.dropout_p, torch.finfo(weights.dtype).tiny)


def options(
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    mask_self: bool = False,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Options:
    """Collect what an operator is given; ``seed`` is what ``draw_seed`` drew."""
    drawn = 0 if seed is None else int(seed)
    return Options(scale, is_causal, window, softcap, mask_self, dropout_p, drawn, sinks=sinks, slopes=slopes)


def as_given(found: Sequence[Tensor | None], given: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Return gradients in the dtypes of what they are by; empty ones for those that there are not."""
    pairs = zip(found, given, strict=True)
    return [like.new_empty(0) if by is None or x is None else by.to(x.dtype) for by, x in pairs]


def draw_seed(query: Tensor, dropout_p: float) -> Tensor | None:
    """Draw the seed of dropout from torch's global generator of the query's device; None without dropout."""
    return torch.randint(0, 1 << 48, (), device=query.device) if dropout_p > 0.0 else None


def flops(B: int, H: int, L: int, S: int, width: int) -> int:
    """Return the FLOPs of products of the whole score matrix with ``width`` features in all, masked pairs included."""
    return 2 * B * H * L * S * width


@dataclass
class Strip:
    """Rows ``rows`` and keys ``cols`` of the score matrix. Tensors are ``[B, H, rows, cols]``, or broadcast to it."""

    rows: slice
    cols: slice
    logits: Tensor
    seen: Tensor | None
    slope: Tensor | None
    """Derivative of the logits by ``scale * q . k``, or None where it is 1."""


def spans(B: int, H: int, L: int, S: int, how: Options) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each strip, and the keys that they can see."""
    height = max(1, min(L, BUDGET // max(1, B * H * S)))
    for start in range(0, L, height):
        stop = min(L, start + height)
        first = 0 if how.window is None else min(S, max(0, start + how.offset - how.window + 1))
        yield slice(start, stop), slice(first, min(S, stop + how.offset) if how.is_causal else S)


def strip(query: Tensor, key: Tensor, attn_mask: Tensor | None, how: Options, rows: slice, cols: slice) -> Strip:
    """Compute one strip. ``query`` ``[B, H, L, D]`` and ``key`` ``[B, Hkv, S, D]`` are in the accumulation dtype."""
    scores = per_group(query[:, :, rows], key[:, :, cols].mT) * how.scale
    slope = None
    if how.softcap is not None:
        bent = torch.tanh(scores / how.softcap)
        scores, slope = how.softcap * bent, 1 - bent * bent
    mask = None if attn_mask is None else _part(attn_mask, rows, cols)
    bias = additive(mask)
    logits = scores if bias is None else scores + bias.to(scores.dtype)
    if how.slopes is not None:
        logits = logits + alibi(how.slopes, lag(rows, cols, how.offset, scores.device), scores.dtype)
    if how.mask_self:
        itself = lag(rows, cols, how.offset, scores.device) == 0
        logits = logits.masked_fill(itself, -5e4)
        slope = (torch.ones_like(scores) if slope is None else slope).masked_fill(itself, 0.0)
    return Strip(rows, cols, logits, seen(rows, cols, attn_mask, how, scores.device), slope)


def forward(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, how: Options) -> Tensor:
    """Return the output ``[B, H, L, Dv]`` in the dtype of ``query``.

    torch's fused operator would be faster on a CPU, but gives 0 for a row of NaN.
    """
    (B, H, L, _), S, Dv = query.shape, key.shape[2], value.shape[3]
    dtype = accumulation_dtype(query.dtype)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    out = query.new_empty(B, H, L, Dv)
    for rows, cols in spans(B, H, L, S, how):
        part = strip(q, k, attn_mask, how, rows, cols)
        weights = masked_softmax(part.logits, part.seen, how.sinks)
        kept = how.kept(weights, rows)
        out[:, :, rows] = per_group(weights if kept is None else weights * kept, v[:, :, cols]).to(out.dtype)
    return out


@dataclass
class Gradients:
    """Gradients in the accumulation dtype, filled strip by strip; ``bias`` only for an additive mask that needs it."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @classmethod
    def zeros(cls, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, how: Options) -> Gradients:
        """Return gradients of 0, for tensors in the accumulation dtype."""
        others = (None if x is None else query.new_zeros(x.shape) for x in (bias, how.sinks, how.slopes))
        return cls(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), *others)

    def through_weights(
        self, part: Strip, logits: Tensor, upstream: Tensor, value: Tensor, delta: Tensor, how: Options
    ) -> Tensor:
        """Add what reaches values and sinks, and return the gradient by the ``logits`` of one strip."""
        if self.sinks is None or how.sinks is None:
            weights = masked_softmax(logits, part.seen)
        else:
            weights, taken = sink_softmax(logits, part.seen, how.sinks).tensor_split((logits.shape[-1],), -1)
            self.sinks -= (taken * delta[:, :, part.rows]).sum((0, 2, 3))
        kept = how.kept(weights, part.rows)
        upstream, by_weight = upstream[:, :, part.rows], per_group(upstream[:, :, part.rows], value[:, :, part.cols].mT)
        used, by_weight = (weights, by_weight) if kept is None else (weights * kept, by_weight * kept)
        self.value[:, :, part.cols] += to_groups(used, upstream, value.shape[1])
        return weights * (by_weight - delta[:, :, part.rows])

    def add_scores(self, part: Strip, by_logit: Tensor, query: Tensor, key: Tensor, how: Options) -> None:
        """Add what reaches query, key, bias and slopes through the logits of one strip."""
        if self.slopes is not None:
            apart = lag(part.rows, part.cols, how.offset, by_logit.device).abs()
            self.slopes -= (by_logit * apart).sum((0, 2, 3))
        if self.bias is not None:
            into = _part(self.bias, part.rows, part.cols)
            into += by_logit.sum_to_size(into.shape)
        by_score = (by_logit if part.slope is None else by_logit * part.slope) * how.scale
        self.query[:, :, part.rows] += per_group(by_score, key[:, :, part.cols])
        self.key[:, :, part.cols] += to_groups(by_score, query[:, :, part.rows], key.shape[1])


def backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    attn_mask: Tensor | None,
    how: Options,
    bias_needs_grad: bool = False,
) -> Gradients:
    """Return the gradients of ``sum(upstream * out)``.

    With p the weights and dP = dO vᵀ: ds = p (dP - rowsum(dO O)), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ dO.
    """
    (B, H, L, _), S = query.shape, key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    q, k, v, g = (x.to(dtype) for x in (query, key, value, upstream))
    delta = (g * out.to(dtype)).sum(-1, keepdim=True)  # [B, H, L, 1]
    total = Gradients.zeros(q, k, v, attn_mask if bias_needs_grad else None, how)
    for rows, cols in reversed(list(spans(B, H, L, S, how))):
        part = strip(q, k, attn_mask, how, rows, cols)
        by_logit = total.through_weights(part, part.logits, g, v, delta, how)
        total.add_scores(part, by_logit, q, k, how)
    return total


def per_group(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``[B, H, M, K]`` with ``[B, Hkv, K, N]``: each KV head serves the query heads of its group."""
    B, H, M, K = left.shape
    Hkv, N = right.shape[1], right.shape[3]
    return (left.reshape(B, Hkv, H // Hkv * M, K) @ right).view(B, H, M, N)


def to_groups(left: Tensor, right: Tensor, Hkv: int) -> Tensor:
    """Multiply ``[B, H, M, N]``, transposed, with ``[B, H, M, K]``, summed over each group: ``[B, Hkv, N, K]``."""
    B, H, M, N = left.shape
    rows = H // Hkv * M
    return left.reshape(B, Hkv, rows, N).mT @ right.reshape(B, Hkv, rows, right.shape[3])


def seen(rows: slice, cols: slice, attn_mask: Tensor | None, how: Options, device: torch.device) -> Tensor | None:
    """Return which of the keys ``cols`` the queries ``rows`` see, broadcastable to a strip; None if all."""
    mask = None if attn_mask is None else _part(attn_mask, rows, cols)
    allowed = visible(rows.stop - rows.start, cols.stop - cols.start, attn_mask=mask, device=device)
    if not how.is_causal:
        return allowed
    behind = lag(rows, cols, how.offset, device)
    near = behind >= 0 if how.window is None else (behind >= 0) & (behind < how.window)
    return near if allowed is None else near & allowed


def lag(rows: slice, cols: slice, offset: int | Tensor, device: torch.device) -> Tensor:
    """Return how far key j lies behind query i, which stands at position i + offset, ``[rows, cols]``."""
    i, j = (torch.arange(x.start, x.stop, device=device) for x in (rows, cols))
    return i.unsqueeze(-1) + offset - j


def one_head(attn_mask: Tensor, head: int) -> Tensor:
    """Return the mask of one head, ``[B or 1, 1, L or 1, S or 1]``."""
    mask = four_dimensional(attn_mask)
    return mask if mask.shape[1] == 1 else mask[:, head : head + 1]


def seen_by_head(attn_mask: Tensor | None, head: int) -> Tensor | None:
    """Return the keys that a mask lets one head see, ``[B or 1, 1, L or 1, S or 1]``; biases are no part of it."""
    if attn_mask is None:
        return None
    mask = one_head(attn_mask, head)
    return mask if additive(mask) is None else mask != float("-inf")


def _part(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    mask = four_dimensional(mask)
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[:, :, :, cols]
