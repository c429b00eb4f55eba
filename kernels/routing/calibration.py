"""Centroids from data: spherical k-means with k-means++ seeds, and how clusters split between queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing.centroids import (
    CentroidState,
    by_head,
    nearest_affinity,
    on_sphere,
    segment_sums,
)
from attnrewrite.kernels.routing.clusters import check_features

STEPS = 25
ONE_SIDED = 20.0


def calibrate(
    features: Tensor, Hc: int, C: int, valid: Tensor | None = None, *, steps: int = STEPS, seed: int = 0
) -> CentroidState:
    """Find C centroids per head by k-means on the sphere of radius sqrt(D).

    Queries and keys are clustered together: concatenate their features along N, each less its own center.

    Args:
        features: ``[B, H, N, D]``, from ``routing_features``; H a multiple of Hc.
        Hc: how many centroid sets, one per KV head.
        C: how many clusters.
        valid: ``[B, N]`` boolean; padded tokens (False) do not count.
        steps: how many Lloyd steps follow the seeding.
        seed: of the seeding; the same seed gives the same centroids on the same device.

    Returns:
        Centroids with the counts and sums from which the moving average starts: the members of each cluster, and
        count times centroid.

    Raises:
        LoweringError: AR402, sizes that do not fit, no token but padding, or features that are not finite.
    """
    if Hc < 1 or C < 1:
        raise error("AR402", f"Hc is {Hc} and C is {C}; needed is one of each at least", hint="")
    check_features(features, features.new_empty(Hc, C, features.shape[-1]), valid)
    return k_means(*by_head(features.detach(), Hc, valid), C, steps=steps, seed=seed)


def k_means(tokens: Tensor, counted: Tensor, C: int, *, steps: int = STEPS, seed: int = 0) -> CentroidState:
    """Do what ``calibrate`` does on tokens ``[Hc, M, D]``, of which those ``counted`` ``[Hc, M]`` count.

    Raises:
        LoweringError: AR402, a head without tokens, or tokens that are not finite.
    """
    if not counted.any(dim=-1).all():
        raise error("AR402", "there is no token to cluster: all are padded", hint="pass real tokens")
    if not tokens[counted].isfinite().all():
        raise error("AR402", "features hold NaN or infinity, which are near no centroid", hint="")
    centroids = seeds(tokens, counted, C, seed)
    for _ in range(steps):
        _, sums = segment_sums(tokens, counted, centroids)
        centroids = on_sphere(sums, centroids)
    counts, _ = segment_sums(tokens, counted, centroids)
    return CentroidState(centroids, counts, counts.unsqueeze(-1) * centroids)


def seeds(tokens: Tensor, counted: Tensor, C: int, seed: int) -> Tensor:
    """Draw C tokens per head by k-means++: each with a chance that grows with its distance to those drawn.

    Args:
        tokens: ``[Hc, M, D]``, of norm sqrt(D) or less.
        counted: ``[Hc, M]``, which of them may be drawn; one at least per head.
        C: how many; more than there are distinct tokens repeats some.
        seed: of the draws.

    Returns:
        ``[Hc, C, D]``, of norm sqrt(D) except where the token is 0.
    """
    source = torch.Generator(tokens.device).manual_seed(seed)
    D = tokens.shape[-1]
    even = counted.to(tokens.dtype)
    chance, closest, drawn = even, torch.full_like(even, float("inf")), []
    for _ in range(C):
        index = torch.multinomial(chance, 1, generator=source).unsqueeze(-1)  # [Hc, 1, 1]
        centroid = tokens.gather(1, index.expand(-1, 1, D))
        drawn.append(on_sphere(centroid, centroid))
        # Squared distance on the sphere; rounding takes that of a token to itself a little below 0.
        distance = (2 * D - 2 * nearest_affinity(tokens, drawn[-1]).squeeze(-1)).clamp(min=0)
        closest = torch.minimum(closest, torch.where(distance < 1e-5 * D, 0.0, distance))
        chance = closest * even
        chance = torch.where(chance.sum(dim=-1, keepdim=True) > 0, chance, even)
    return torch.cat(drawn, dim=1)


def one_sided(query_counts: Tensor, key_counts: Tensor, ratio: float = ONE_SIDED) -> Tensor:
    """Say of which clusters one side has more than ``ratio`` times the members of the other: few pairs meet there.

    Args:
        query_counts: ``[Hc, C]``, from ``accumulate`` on queries.
        key_counts: ``[Hc, C]``, from ``accumulate`` on keys.
        ratio: the bound. Empty clusters are not one-sided.
    """
    more, fewer = torch.maximum(query_counts, key_counts), torch.minimum(query_counts, key_counts)
    return more > ratio * fewer
