"""Which cluster a vector belongs to: routing features, affinity, the two rules of membership, the auxiliary loss."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.visibility import accumulation_dtype, check_shape, full_precision

EPSILON = 1e-6


def routing_features(states: Tensor, center: Tensor | None = None) -> Tensor:
    """Return ``LN0(states - center)``: mean 0 and mean square 1 over D, without scale and bias.

    A constant vector gives 0 up to rounding.

    Args:
        states: ``[B, H, N, D]``, any floating-point dtype.
        center: ``[Hc, D]``, subtracted first; head h uses row h / (H / Hc). None subtracts nothing.

    Returns:
        ``[B, H, N, D]`` in float32 (float64 for float64 states), differentiable.
    """
    shifted = centered(states, center)
    return shifted * inverse_deviation(shifted)


def centered(states: Tensor, center: Tensor | None) -> Tensor:
    """Return ``states - center`` less its mean over D, in float32 (float64)."""
    shifted = states.to(accumulation_dtype(states.dtype))
    if center is not None:
        repeats = states.shape[1] // center.shape[0]
        shifted = shifted - center.to(shifted.dtype).repeat_interleave(repeats, dim=0).unsqueeze(1)
    return shifted - shifted.mean(dim=-1, keepdim=True)


def inverse_deviation(shifted: Tensor) -> Tensor:
    """Return ``1 / sqrt(var + 1e-6)``, ``[B, H, N, 1]``, of vectors whose mean is 0."""
    return torch.rsqrt(shifted.square().mean(dim=-1, keepdim=True) + EPSILON)


def affinity(features: Tensor, centroids: Tensor) -> Tensor:
    """Return ``a[b,h,n,c] = r[b,h,n] . mu[g,c]``, g the centroid set of head h; larger is nearer.

    Args:
        features: ``[B, H, N, D]``.
        centroids: ``[Hc, C, D]``, H a multiple of Hc.

    Returns:
        ``[B, H, N, C]`` in the dtype of ``features``, never in 16 bit under autocast.
    """
    B, H, N, D = features.shape
    Hc, C, _ = centroids.shape
    with full_precision(features.device):
        grouped = features.reshape(B, Hc, H // Hc * N, D)
        return torch.matmul(grouped, centroids.to(features.dtype).mT).reshape(B, H, N, C)


def nearest(affinities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the cluster of each token, ties to the lower one; C for padded tokens.

    Args:
        affinities: ``[B, H, N, C]``.
        valid: ``[B, N]`` boolean, False = padded; None if no token is.

    Returns:
        ``[B, H, N]``, int64.
    """
    cluster = affinities.argmax(dim=-1)
    return cluster if valid is None else torch.where(valid.unsqueeze(1), cluster, affinities.shape[-1])


def strongest(affinities: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Return the members of each cluster: its ``count`` nearest tokens, ties to the lower position.

    Args:
        affinities: ``[B, H, N, C]``.
        count: at most N.
        valid: ``[B, N]`` boolean, False = padded; None if no token is.

    Returns:
        ``[B, H, C, count]``, int64 positions, -1 where valid tokens run out and else ascending.
    """
    ranked = affinities.mT  # [B, H, C, N]
    if valid is not None:
        ranked = ranked.masked_fill(~valid[:, None, None], float("-inf"))
    # A stable sort, not topk, which leaves open which of equal values it takes.
    positions = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    if valid is not None:
        real = valid[:, None, None].expand_as(ranked).gather(-1, positions)
        positions = torch.where(real, positions, -1)
    return positions.sort(dim=-1).values


def commitment_loss(features: Tensor, centroids: Tensor, valid: Tensor | None = None, beta: float = 1e-4) -> Tensor:
    """Return ``beta * mean (r - mu[cl(r)])^2``, with no gradient to the centroids.

    Add the losses of queries and of keys, unless the two are shared.

    Args:
        features: ``[B, H, N, D]``, from ``routing_features``.
        centroids: ``[Hc, C, D]``.
        valid: ``[B, N]`` boolean; padded tokens (False) do not count.
        beta: factor of the loss.

    Returns:
        A 0-d tensor in the dtype of ``features``; 0 if every token is padded.

    Raises:
        LoweringError: AR402, shapes that do not fit together.
    """
    check_features(features, centroids, valid)
    H, D = features.shape[1], features.shape[3]
    fixed = centroids.detach().to(features.dtype)
    cluster = affinity(features.detach(), fixed).argmax(dim=-1)  # [B, H, N]
    head = torch.arange(H, device=features.device) // (H // len(centroids))
    squares = (features - fixed[head[:, None], cluster]).square()
    if valid is None:
        return beta * squares.mean()
    kept = torch.where(valid[:, None, :, None], squares, 0.0)
    return beta * kept.sum() / (valid.sum() * H * D).clamp(min=1)


def check_features(features: Tensor, centroids: Tensor, valid: Tensor | None) -> None:
    """Raise AR402 unless features ``[B, H, N, D]`` fit centroids ``[Hc, C, D]`` and a mask ``[B, N]``."""
    if features.dim() != 4 or not features.is_floating_point():
        raise error(
            "AR402",
            f"features have {features.dim()} dimensions of {features.dtype}; needed: 4, float",
            hint="features are [B, H, N, D], from routing_features",
        )
    B, H, N, D = features.shape
    Hc, C = centroids.shape[:2] if centroids.dim() == 3 else (1, 1)
    check_shape("centroids", centroids, "Hc x C x D", (max(Hc, 1), max(C, 1), D))
    if H % Hc != 0:
        raise error("AR402", f"features have {H} heads, not a multiple of the {Hc} centroid sets", hint="")
    check_valid(valid, B, N)


def check_valid(valid: Tensor | None, B: int, N: int) -> None:
    """Raise AR402 unless the mask of real tokens is absent or boolean ``[B, N]``."""
    if valid is None or (valid.dtype == torch.bool and tuple(valid.shape) == (B, N)):
        return
    size = " x ".join(str(n) for n in valid.shape)
    raise error("AR402", f"valid is {size} of {valid.dtype}; needed is B x N = {B} x {N} of torch.bool", hint="")
