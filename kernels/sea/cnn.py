"""The small convolutional network over (queries x slices), with heads as channels (arXiv 2310.01777, section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.kernels.visibility import accumulation_dtype

REACH = 4  # rows above that a 3 x 3 kernel of dilation 2 sees


class Affine(NamedTuple):
    """Weight and bias of a linear map, a convolution or a norm."""

    weight: Tensor
    bias: Tensor


class CausalCnn(NamedTuple):
    """Norm over M / cs; two convolutions 3 x 3, ch H -> ch H; one 1 x 1, ch H -> H; norm over M."""

    norm: Affine
    first: Affine
    second: Affine
    last: Affine
    out_norm: Affine


class Cnn(NamedTuple):
    """Three convolutions 3 x 3: ch H -> 4 H, 4 H -> 4 H, 4 H -> H."""

    first: Affine
    second: Affine
    last: Affine


def causal_cnn(
    rows: Tensor, cnn: CausalCnn, real: Tensor, above: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Turn rows of M / cs numbers into logits over M slices; row i sees the 8 rows above it, and none below.

    Both convolutions have dilation 2. Padding rows are 0 before each of them, so that leading padding is nothing.

    Args:
        rows: ``[B, ch H, T, M / cs]``.
        cnn: the weights.
        real: boolean ``[B or 1, T]``, False at padding.
        above: the last 4 rows before these, as the first and as the second convolution sees them; None for none.

    Returns:
        Logits ``[B, H, T, M]`` in float32 (float64), and behind the 4 rows above them, those that either convolution
        saw, ``[B, ch H, 4 + T, M / cs]``.
    """
    M = cnn.out_norm.weight.shape[0]
    padding = ~real[:, None, :, None]
    outer, inner = (None, None) if above is None else above
    rows = _normed(rows, cnn.norm).masked_fill(padding, 0.0)
    rows, outer = _dilated(rows, cnn.first, outer)
    rows, inner = _dilated(rows.masked_fill(padding, 0.0), cnn.second, inner)
    wide = rows.repeat_interleave(M // rows.shape[-1], dim=-1)
    logits = F.conv2d(wide, *cnn.last)
    logits = logits.to(accumulation_dtype(logits.dtype))  # 16-bit logits tie often
    return _normed(logits, cnn.out_norm), (outer, inner)


def bidirectional_cnn(rows: Tensor, cnn: Cnn, M: int, real: Tensor) -> Tensor:
    """Turn rows of M / cs numbers into logits over M slices, each row seeing those around it.

    The first convolution halves the rows; they are doubled before the last, and resized to the n real tokens. As
    this depends on n, padding is taken out first, wherever it lies, and appended padding changes nothing.

    Args:
        rows: ``[B, ch H, L, M / cs]``.
        cnn: the weights.
        M: number of slices.
        real: boolean ``[B or 1, L]``, False at padding.

    Returns:
        Logits ``[B, H, L, M]`` in float32 (float64); those of padding rows mean nothing.
    """
    B, _, L, _ = rows.shape
    real = real.expand(B, L)
    n = real.sum(-1)  # [B]
    order = torch.argsort(~real, dim=-1, stable=True)
    rows = _above(_rows_at(rows, order), n)
    rows = F.relu(F.conv2d(rows, *cnn.first, stride=(2, 1), padding=1))
    halves = (n + 1) // 2
    rows = F.relu(F.conv2d(_above(rows, halves), *cnn.second, padding=1))
    rows = rows.repeat_interleave(2, dim=2)
    rows = F.conv2d(_above(rows, 2 * halves), *cnn.last, padding=1)
    rows = rows.to(accumulation_dtype(rows.dtype))
    rows = F.interpolate(rows, size=(rows.shape[2], M), mode="bilinear")
    rank = (real.long().cumsum(-1) - 1).clamp(min=0)
    return _resized(rows, 2 * halves, n, rank)


def _resized(rows: Tensor, have: Tensor, want: Tensor, rank: Tensor) -> Tensor:
    """Sample ``have`` rows at ``want`` places, linearly, and take the places of each rank, ``[B, L]``."""
    ratio = (have.to(rows.dtype) / want.clamp(min=1)).unsqueeze(-1)
    at = ((rank + 0.5) * ratio - 0.5).clamp(min=0)
    low = at.floor().long()
    high = torch.minimum(low + 1, (have - 1).clamp(min=0).unsqueeze(-1))
    share = (at - low)[:, None, :, None]
    return _rows_at(rows, low) * (1 - share) + _rows_at(rows, high) * share


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows by their index, ``[B, L]``."""
    return rows.gather(2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def _above(rows: Tensor, n: Tensor) -> Tensor:
    """Set the rows from n on to 0."""
    beyond = torch.arange(rows.shape[2], device=rows.device) >= n.unsqueeze(-1)
    return rows.masked_fill(beyond[:, None, :, None], 0.0)


def _dilated(rows: Tensor, layer: Affine, above: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolve with taps at the rows i - 4, i - 2, i and the columns - 2, 0, 2; return also the rows it sees."""
    if above is None:
        above = rows.new_zeros(*rows.shape[:2], REACH, rows.shape[3])
    rows = torch.cat((above.to(rows.dtype), rows), dim=2)
    return F.relu(F.conv2d(rows, *layer, padding=(0, 2), dilation=2)), rows


def _normed(rows: Tensor, norm: Affine) -> Tensor:
    weight, bias = (tensor.to(rows.dtype) for tensor in norm)
    return F.layer_norm(rows, weight.shape, weight, bias)
