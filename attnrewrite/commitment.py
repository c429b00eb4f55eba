"""The commitment loss of routing attention, for training loops: queries and keys learn to stay near their centroids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from attnrewrite.conversion import converted_layers
from attnrewrite.kernels.diagnostics import error
from attnrewrite.observation import Batch, Observed, outputs_observed


def with_commitment(
    model: torch.nn.Module, batches: Iterable[Batch], *, beta: float = 1e-4
) -> Iterator[tuple[Any, Tensor]]:
    """Run a model with routing layers on ``batches``, and yield what it gives with the commitment loss, a 0-d tensor.

    The loss is the sum over layers of ``beta * mean (r - mu[cl(r)])^2`` over queries and, unless shared, over keys,
    with r the routing features and mu the centroids, which get no gradient; padding does not count (arXiv 2003.05997,
    in the form of the authors' code). Add it to the loss of the task. The model runs in the mode that it is in, with
    gradients; take the optimizer step, and ``attnrewrite.update``, before the next batch.

    Args:
        model: a converted model. What ``model.compile`` made of it is not used here.
        batches: inputs of single calls, each a tensor, a sequence or a mapping of keywords.
        beta: the factor of the loss.

    Raises:
        CaptureError: AR102 where no layer routes.
        VariantError: AR310 where the model carries no conversion.
    """
    if not any(config.variant == "routing" for config, _ in converted_layers(model).values()):
        raise error("AR102", f"no layer of {type(model).__name__} is converted to routing attention", hint="")
    return _runs(model, batches, beta)


def _runs(model: torch.nn.Module, batches: Iterable[Batch], beta: float) -> Iterator[tuple[Any, Tensor]]:
    losses: list[Tensor] = []

    def see(at: Observed) -> None:
        if at.request.variant == "routing":
            losses.append(_loss(at, beta))

    for output in outputs_observed(model, batches, see, converted=True, learning=True):
        total = torch.stack(losses).sum()
        losses.clear()
        yield output, total


def _loss(at: Observed, beta: float) -> Tensor:
    """Return the loss of one layer."""
    from attnrewrite.kernels.routing.clusters import commitment_loss, routing_features
    from attnrewrite.passes.attention.site import same_length
    from attnrewrite.passes.rules.heads import Heads, take
    from attnrewrite.passes.rules.routing import routed, valid_keys

    t, heads = at.tensors, Heads.of(at.site, at.request.config)
    roles: list[tuple[Literal["query", "key"], list[int], list[int]]] = [
        ("query", list(heads.routing), [heads.sets.index(head // heads.group) for head in heads.routing])
    ]
    if not at.request.config["shared_qk"]:
        roles.append(("key", heads.sets, list(range(len(heads.sets)))))
    found = []
    for role, own, sets in roles:
        center, centroids = (take(t.extra[name], sets, dim=0) for name in (f"center_{role}", "centroids"))
        valid = valid_keys(t) if role == "key" or same_length(at.site) else None
        features = routing_features(take(routed(t, role), own), center)
        found.append(commitment_loss(features, centroids, valid, beta))
    return torch.stack(found).sum()
