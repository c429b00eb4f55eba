"""The value that the sparse result is mixed with: a mean of what the query sees (arXiv 2310.01777, section 3).

Causal: the plain mean of the visible values. Else: the values weighted by the queries' mean estimate, each slice's
weight shared among its tokens ("width"), or given to each of them ("paper", as in the authors' code).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.sea.slices import Rows, boundaries, slice_of
from attnrewrite.kernels.visibility import repeat_kv


def visible_mean(value: Tensor, rows: Rows) -> Tensor:
    """Return the mean of the values that each query sees, ``[B, Hkv, L, Dv]``; 0 where it sees none.

    Args:
        value: ``[B, Hkv, S, Dv]`` in the dtype of the sums.
        rows: causal, of the last L positions; without a window L = S.
    """
    L, S, W = rows.count.shape[-1], value.shape[2], rows.window
    reach = L if W is None else min(S, L + W - 1)  # the last positions that a query may see
    real = rows.real[:, None, S - reach :, None]
    recent = value[:, :, S - reach :].masked_fill(~real, 0.0)
    sums = torch.nn.functional.pad(recent.cumsum(2), (0, 0, 1, 0))  # [B, Hkv, reach + 1, Dv]
    total = sums[:, :, reach - L + 1 :]
    if W is not None:
        last = torch.arange(reach - L + 1, reach + 1, device=value.device)
        total = total - sums[:, :, (last - W).clamp(min=0)]
    return total / rows.count.clamp(min=1)[:, None, :, None]


def visible_mean_gradient(grad: Tensor, rows: Rows) -> Tensor:
    """Return the gradient of ``value`` from that of the mean, ``[B, Hkv, L, Dv]``, where L = S."""
    L, W = grad.shape[2], rows.window
    share = grad / rows.count.clamp(min=1)[:, None, :, None]
    share = share.masked_fill((rows.count == 0)[:, None, :, None], 0.0)
    sums = torch.nn.functional.pad(share.cumsum(2), (0, 0, 1, 0))  # [B, Hkv, L + 1, Dv]
    start = torch.arange(L, device=grad.device)
    stop = torch.full_like(start, L) if W is None else (start + W).clamp(max=L)
    return (sums[:, :, stop] - sums[:, :, start]).masked_fill(~rows.real[:, None, :, None], 0.0)


class Pool(NamedTuple):
    """How the queries' mean estimate weighs the keys, where all queries see the same n keys.

    ``column`` and ``real`` are ``[B or 1, S]``, the slice of each key and whether it is visible; ``share``,
    ``[B or 1, 1, M]``, is 1 / width, 0 for empty slices; ``mean``, ``[B, H, M]``, the mean estimate. ``whole`` gives
    the weight of a slice to each of its keys.
    """

    column: Tensor
    real: Tensor
    share: Tensor
    mean: Tensor
    whole: bool

    def per_token(self, per_slice: Tensor) -> Tensor:
        """Spread ``[B, H, M]`` over the keys: ``[B, H, S]``, 0 for padding."""
        B, H, _ = per_slice.shape
        column = self.column.unsqueeze(1).expand(B, H, -1)
        return per_slice.gather(-1, column).masked_fill(~self.real.unsqueeze(1), 0.0)

    def per_slice(self, per_token: Tensor) -> Tensor:
        """Sum ``[B, H, S]`` over each slice: ``[B, H, M]``."""
        B, H, _ = per_token.shape
        column = self.column.unsqueeze(1).expand(B, H, -1)
        real = per_token.masked_fill(~self.real.unsqueeze(1), 0.0)
        return per_token.new_zeros(B, H, self.share.shape[-1]).scatter_add(-1, column, real)

    def weights(self) -> Tensor:
        """Return the weight of each key, ``[B, H, S]``; unless ``whole`` they sum to 1 wherever a key is visible."""
        if self.whole:
            return self.per_token(self.mean)
        return self.per_token(self.mean * self.share / self._kept())

    def weights_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of ``mean`` from that of the weights."""
        if self.whole:
            return self.per_slice(grad)
        shared, kept = self.per_slice(grad) * self.share, self._kept()
        total = (shared * self.mean).sum(-1, keepdim=True) / kept
        return (shared - total).masked_fill(self.share == 0, 0.0) / kept

    def _kept(self) -> Tensor:
        """Return the mass that does not lie on empty slices; there are some where n < M."""
        kept = self.mean.masked_fill(self.share == 0, 0.0).sum(-1, keepdim=True)
        return torch.where(kept == 0, 1.0, kept)


def estimate_pool(probabilities: Tensor, rows: Rows, pooling: str) -> Pool:
    """Return how the mean of the estimates, ``[B, H, L, M]``, weighs the keys; ``rows`` are not causal."""
    M, real = probabilities.shape[-1], rows.real
    asked = rows.count > 0  # [B or 1, L]
    mean = probabilities.masked_fill(~asked[:, None, :, None], 0.0).sum(2)
    mean = mean / asked.sum(-1).clamp(min=1)[:, None, None]
    n = real.sum(-1, keepdim=True)  # [B or 1, 1]
    rank = (real.long().cumsum(-1) - 1).clamp(min=0)
    width = boundaries(n, M).diff(dim=-1)  # [B or 1, 1, M]
    share = torch.where(width == 0, 0.0, 1.0 / width.clamp(min=1).to(mean.dtype))
    return Pool(slice_of(rank, n, M).clamp(max=M - 1), real, share, mean, pooling == "paper")


def estimate_mean(value: Tensor, pool: Pool) -> Tensor:
    """Return the weighted sum of the values, ``[B, H, 1, Dv]``."""
    weights = pool.weights()
    clean = value.masked_fill(~pool.real[:, None, :, None], 0.0)
    return weights.unsqueeze(2) @ repeat_kv(clean, weights.shape[1])


def estimate_mean_gradient(
    grad: Tensor, value: Tensor, probabilities: Tensor, pool: Pool, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and of the logits behind ``probabilities``; ``grad`` is ``[B, H, 1, Dv]``."""
    B, Hkv, S, Dv = value.shape
    H = grad.shape[1]
    d_value = (pool.weights().unsqueeze(-1) * grad).reshape(B, Hkv, H // Hkv, S, Dv).sum(2)
    d_weights = (repeat_kv(value, H) * grad).sum(-1)
    d_mean = pool.weights_gradient(d_weights)  # [B, H, M]
    asked = (rows.count > 0)[:, None, :, None]
    d_row = (d_mean / asked.sum(2).clamp(min=1)).unsqueeze(2)
    inner = (probabilities * d_row).sum(-1, keepdim=True)
    return d_value, (probabilities * (d_row - inner)).masked_fill(~asked, 0.0)
