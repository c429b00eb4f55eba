"""How centroids follow the data: sums of a step, the moving average, and clusters that have died."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.routing.clusters import affinity, check_features
from attnrewrite.kernels.visibility import full_precision

DECAY = 0.999
DEAD = 0.05


class CentroidState(NamedTuple):
    """Centroids and their moving averages, all float32."""

    centroids: Tensor  # [Hc, C, D], of norm sqrt(D)
    ema_count: Tensor  # [Hc, C]
    ema_sum: Tensor  # [Hc, C, D]


def accumulate(features: Tensor, centroids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Count and add up the features nearest to each centroid (the sums of one training step).

    The sums of several batches or ranks, and of queries and keys, add.

    Args:
        features: ``[B, H, N, D]``, from ``routing_features``; H a multiple of Hc.
        centroids: ``[Hc, C, D]``.
        valid: ``[B, N]`` boolean; padded tokens (False) do not count.

    Returns:
        Counts ``[Hc, C]`` and sums ``[Hc, C, D]`` in the dtype of ``features``, without gradient.

    Raises:
        LoweringError: AR402, shapes that do not fit together.
    """
    check_features(features, centroids, valid)
    features, counted = by_head(features.detach(), len(centroids), valid)
    return segment_sums(features, counted, centroids)


def update(state: CentroidState, counts: Tensor, sums: Tensor, decay: float | Tensor = DECAY) -> CentroidState:
    """Return the state after one step of the moving average (arXiv 2003.05997, with the norm kept at sqrt(D)).

    ``ema = decay ema + (1 - decay) new`` for counts and sums, ``mu = sqrt(D) ema_sum / |ema_sum|``. A centroid whose
    sum is 0 stays.

    Args:
        state: the state before.
        counts: ``[Hc, C]``, from ``accumulate``.
        sums: ``[Hc, C, D]``, from ``accumulate``.
        decay: number or 0-d tensor between 0 and 1.
    """
    ema_count = decay * state.ema_count + (1 - decay) * counts
    ema_sum = decay * state.ema_sum + (1 - decay) * sums
    return CentroidState(on_sphere(ema_sum, state.centroids), ema_count, ema_sum)


def reseed(
    state: CentroidState, features: Tensor, valid: Tensor | None = None, threshold: float = DEAD
) -> CentroidState:
    """Return the state with every dead cluster moved onto a token that no centroid is near.

    Dead is an ``ema_count`` below ``threshold`` times the head's mean. The dead clusters of a head take its tokens in
    the order of their best affinity, lowest first (ties to the lower index), and the mean count. Clusters for which
    there is no token left stay.

    Args:
        state: the state before.
        features: ``[B, H, N, D]``, from ``routing_features``.
        valid: ``[B, N]`` boolean; padded tokens (False) are not taken.
        threshold: share of the mean count below which a cluster is dead.

    Raises:
        LoweringError: AR402, shapes that do not fit together.
    """
    check_features(features, state.centroids, valid)
    tokens, usable = by_head(features.detach(), len(state.centroids), valid)  # [Hc, M, D], [Hc, M]
    usable = usable & (tokens.square().sum(-1) > 0)
    best = nearest_affinity(tokens, state.centroids).amax(dim=-1)
    loneliest = torch.where(usable, best, float("inf")).argsort(dim=-1, stable=True)  # [Hc, M]
    mean = state.ema_count.mean(dim=-1, keepdim=True)
    dead = state.ema_count < threshold * mean  # [Hc, C]
    turn = dead.cumsum(dim=-1) - 1
    moved = dead & (turn < usable.sum(dim=-1, keepdim=True))
    chosen = loneliest.gather(-1, turn.clamp(0, tokens.shape[1] - 1)).unsqueeze(-1)  # [Hc, C, 1]
    seeds = on_sphere(tokens.gather(1, chosen.expand_as(state.centroids)), state.centroids)
    centroids = torch.where(moved.unsqueeze(-1), seeds.to(state.centroids.dtype), state.centroids)
    ema_count = torch.where(moved, mean, state.ema_count)
    ema_sum = torch.where(moved.unsqueeze(-1), ema_count.unsqueeze(-1) * centroids, state.ema_sum)
    return CentroidState(centroids, ema_count, ema_sum)


def balance(ema_count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest count of each head over its mean, ``[Hc]`` each."""
    mean = ema_count.mean(dim=-1)
    return ema_count.amin(dim=-1) / mean, ema_count.amax(dim=-1) / mean


def by_head(features: Tensor, Hc: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lay out features ``[B, H, N, D]`` by centroid set: ``[Hc, M, D]``, and which of them count, ``[Hc, M]``.

    Padded ones are 0, so that whatever padding holds stays out of sums.
    """
    B, H, N, D = features.shape
    counted = features.new_ones(B, N, dtype=torch.bool) if valid is None else valid
    counted = counted.unsqueeze(1).expand(B, H, N)
    features = torch.where(counted.unsqueeze(-1), features, 0.0)
    grouped = features.reshape(B, Hc, -1, D).transpose(0, 1).reshape(Hc, -1, D)
    return grouped, counted.reshape(B, Hc, -1).transpose(0, 1).reshape(Hc, -1)


def nearest_affinity(tokens: Tensor, centroids: Tensor) -> Tensor:
    """Return the affinity of tokens ``[Hc, M, D]`` to their head's centroids, ``[Hc, M, C]``."""
    return affinity(tokens.unsqueeze(0), centroids).squeeze(0)


def segment_sums(tokens: Tensor, counted: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts ``[Hc, C]`` and sums ``[Hc, C, D]`` of the tokens ``[Hc, M, D]`` nearest to each centroid."""
    cluster = nearest_affinity(tokens, centroids).argmax(dim=-1, keepdim=True)  # [Hc, M, 1]
    # A product with ones and zeros: sums by index depend, on GPUs, on the order of the threads.
    belongs = cluster == torch.arange(centroids.shape[1], device=cluster.device)
    belongs = (belongs & counted.unsqueeze(-1)).to(tokens.dtype)  # [Hc, M, C]
    with full_precision(tokens.device):
        return belongs.sum(dim=1), torch.matmul(belongs.mT, tokens)


def on_sphere(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Scale vectors ``[..., D]`` to norm sqrt(D); take ``otherwise`` where they are 0."""
    norm = vectors.norm(dim=-1, keepdim=True)
    empty = norm == 0
    return torch.where(empty, otherwise, vectors * (vectors.shape[-1] ** 0.5 / torch.where(empty, 1.0, norm)))
