"""Two small operators around routing attention: one gives centroids that are ready, one learns from a batch.

They decide at run time, so that one graph serves layers that are ready and layers that are not. Importing this file
defines ``torch.ops.attnrewrite.routing_ready`` and ``routing_learn``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing.calibration import k_means
from attnrewrite.kernels.routing.centroids import nearest_affinity, segment_sums
from attnrewrite.kernels.routing.clusters import routing_features

FIRST_STEPS = 10
"""Lloyd steps on the first batch, after which the moving average takes over."""


@torch.library.custom_op("attnrewrite::routing_ready", mutates_args=())
def routing_ready(centroids: Tensor, steps: Tensor) -> Tensor:
    """Return a copy of ``centroids``.

    Args:
        centroids: ``[Hc, C, D]``.
        steps: 0-d int64, updates so far; -1 while the centroids are not set. On the CPU, so that nothing waits for it.

    Raises:
        VariantError: AR315 while the centroids are not set.
    """
    if int(steps) < 0:
        raise error("AR315", "a routing layer was called before its centroids were set")
    return centroids.clone()


@routing_ready.register_fake
def _(centroids: Tensor, steps: Tensor) -> Tensor:
    return torch.empty_like(centroids)


def routing_learn(
    query: Tensor,
    key: Tensor | None,
    center_query: Tensor,
    center_key: Tensor,
    centroids: Tensor,
    ema_count: Tensor,
    ema_sum: Tensor,
    steps: Tensor,
    step_count: Tensor,
    step_sum: Tensor,
    lonely: Tensor,
    lonely_affinity: Tensor,
    sets: Sequence[int],
    reseed_every: int,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> None:
    """Note what a forward in training routes; the first one sets the centroids (k-means++ and 10 Lloyd steps).

    Nothing happens while a backward runs: then this is a checkpointed forward that is computed again.

    Args:
        query: ``[B, H, L, D]``, what is routed, without gradient.
        key: ``[B, Hc, S, D]``; None if queries are the keys, too.
        center_query: ``[Hc, D]``.
        center_key: ``[Hc, D]``.
        centroids: ``[Hc, C, D]``; set by the first batch, else not changed.
        ema_count: ``[Hc, C]``; likewise.
        ema_sum: ``[Hc, C, D]``; likewise.
        steps: 0-d int64, updates so far; -1 while the centroids are not set.
        step_count: ``[Hc, C]``, to which this batch's members are added.
        step_sum: ``[Hc, C, D]``, to which their sums are added.
        lonely: ``[Hc, C, D]``, the tokens that no centroid is near; followed in steps that end with a reseeding.
        lonely_affinity: ``[Hc, C]``, their best affinities, inf where there is none.
        sets: the centroid set of each query head.
        reseed_every: after how many updates dead clusters move; 0 is never.
        query_valid: ``[B, L]`` boolean, False = padded.
        key_valid: ``[B, S]`` boolean.

    Raises:
        VariantError: AR315 where several processes would set different centroids.
        LoweringError: AR402, no token but padding, or features that are not finite, in the first batch.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    # Written past autograd's version counters: no backward needs these values, but checkpointing insists on the version
    # of everything that it was given.
    centroids, ema_count, ema_sum, steps, step_count, step_sum, lonely, lonely_affinity = (
        buffer.data for buffer in (centroids, ema_count, ema_sum, steps, step_count, step_sum, lonely, lonely_affinity)
    )
    parts = [_laid_out(query, center_query, sets, query_valid)]
    if key is not None:
        parts.append(_laid_out(key, center_key, range(len(centroids)), key_valid))
    tokens = torch.cat([part[0] for part in parts], dim=1)  # [Hc, M, D]
    counted = torch.cat([part[1] for part in parts], dim=1)  # [Hc, M]
    if int(steps) < 0:
        _check_alone()
        found = k_means(tokens, counted, centroids.shape[1], steps=FIRST_STEPS)
        for buffer, value in zip((centroids, ema_count, ema_sum), found, strict=True):
            buffer.copy_(value)
        steps.zero_()
        return
    counts, sums = segment_sums(tokens, counted, centroids)
    step_count.add_(counts)
    step_sum.add_(sums)
    if reseed_every and (int(steps) + 1) % reseed_every == 0:
        _keep_loneliest(tokens, counted, centroids, lonely, lonely_affinity)


_BUFFERS = ("centroids", "ema_count", "ema_sum", "steps", "step_count", "step_sum", "lonely", "lonely_affinity")
# Not custom_op, which counts versions.
torch.library.define("attnrewrite::routing_learn", torch.library.infer_schema(routing_learn, mutates_args=_BUFFERS))
torch.library.impl("attnrewrite::routing_learn", "CompositeExplicitAutograd", routing_learn)


torch.library.register_fake("attnrewrite::routing_learn", lambda *_, **__: None)


def _laid_out(states: Tensor, center: Tensor, sets: Sequence[int], valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the features of states ``[B, H, N, D]`` by centroid set, ``[Hc, M, D]``, and which of them count."""
    B, _, N, D = states.shape
    heads = [[head for head, number in enumerate(sets) if number == own] for own in range(len(center))]
    width = max(map(len, heads))
    # Sets of fewer query heads repeat one that does not count.
    index = torch.tensor([own + own[:1] * (width - len(own)) for own in heads], device=states.device)
    real = torch.tensor([[n < len(own) for n in range(width)] for own in heads], device=states.device)
    features = routing_features(states, center[list(sets)])[:, index]  # [B, Hc, width, N, D]
    counted = real[:, :, None].expand(B, len(center), width, N)
    if valid is not None:
        counted = counted & valid[:, None, None]
    features = torch.where(counted.unsqueeze(-1), features, 0.0)  # padding may hold anything
    return features.transpose(0, 1).reshape(len(center), -1, D), counted.transpose(0, 1).reshape(len(center), -1)


def _keep_loneliest(
    tokens: Tensor, counted: Tensor, centroids: Tensor, lonely: Tensor, lonely_affinity: Tensor
) -> None:
    """Keep, of those kept and those of this batch, the tokens of the lowest best affinity; ties to the earlier."""
    usable = counted & (tokens.square().sum(-1) > 0)
    best = torch.where(usable, nearest_affinity(tokens, centroids).amax(dim=-1), float("inf"))
    every = torch.cat((lonely_affinity.to(best.dtype), best), dim=1)
    first = every.argsort(dim=1, stable=True)[:, : centroids.shape[1]]
    candidates = torch.cat((lonely.to(tokens.dtype), tokens), dim=1)
    lonely.copy_(candidates.gather(1, first.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])))
    lonely_affinity.copy_(every.gather(1, first))


def _check_alone() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise error(
            "AR315",
            "each process would set the centroids from its own batch",
            hint="call attnrewrite.calibrate(model, batches) with the same batches in every process before training",
        )
