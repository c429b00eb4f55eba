"""Distance: how far a converted model is from the model it came from, by layer and head, and at its output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrewrite.observation import Batch, Observed, outputs_observed
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.sdpa import exact

Layers = dict[str, list[Tensor]]


@dataclass(frozen=True)
class LayerDistance:
    """One attention layer beside the teacher's: relative errors in the Euclidean norm, one number per query head.

    ``maps``: of the attention weights, as far as they have the form of a matrix over the keys. ``outputs``: of the
    attention's result, before the output projection.
    """

    layer: str
    maps: tuple[float, ...]
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Distance:
    """Every layer, and the mean Kullback-Leibler divergence of the next-token distributions in nats, or None."""

    layers: list[LayerDistance]
    kl: float | None


def distance(model: torch.nn.Module, teacher: torch.nn.Module, batches: Iterable[Batch]) -> Distance:
    """Run both on ``batches``, each on its own activations, and compare what their attentions give.

    A layer's error holds that of the layers below it. The attention weights of one batch at a time are kept, for all
    layers. ``kl`` is KL(teacher || model) over the last axis of ``logits``, where the models give any.

    Raises what the models raise, and ValueError where their attentions are not the same layers.
    """
    sums: dict[str, list[Tensor]] = {}
    divergence: list[Tensor] = []
    for batch in batches:
        expected, theirs = _run(teacher, batch, converted=False)
        found, ours = _run(model, batch, converted=True)
        if list(theirs) != list(ours):
            raise ValueError(f"the models attend in different layers: {list(theirs)} and {list(ours)}")
        for layer, (weights, result) in theirs.items():
            parts = [_squares(ours[layer][0], weights), _squares(ours[layer][1], result)]
            before = sums.setdefault(layer, [torch.zeros_like(p) for p in parts])
            sums[layer] = [a + b for a, b in zip(before, parts, strict=True)]
        divergence += _divergence(found, expected)
    layers = [LayerDistance(layer, *(_relative(x) for x in parts)) for layer, parts in sums.items()]
    return Distance(layers, float(torch.cat(divergence).mean()) if divergence else None)


class _Weights(SiteTensors):
    """The site's tensors with the identity in the place of the values: the result is the attention weights."""

    def attended(self) -> Tensor:
        value = self.value()
        eye = torch.eye(value.shape[2], dtype=value.dtype, device=value.device)
        return eye.expand(*value.shape[:2], -1, -1)


def _run(model: torch.nn.Module, batch: Batch, *, converted: bool) -> tuple[Any, Layers]:
    layers: Layers = {}

    def see(at: Observed) -> None:
        plain = not converted or at.request.marker is None
        function = exact if plain else RULES[at.request.variant].function(at.request)
        weights = _Weights(at.site, at.tensors.values, at.tensors.extra)
        layers[at.site.layer] = [function(weights), function(at.tensors)]

    (out,) = outputs_observed(model, [batch], see, converted=converted)
    return out, layers


def _squares(found: Tensor, expected: Tensor) -> Tensor:
    """Return the squared error and the squared norm of every head, [2, H]."""
    found, expected = found.double(), expected.double()
    return torch.stack([(found - expected).square().sum((0, 2, 3)), expected.square().sum((0, 2, 3))])


def _relative(squares: Tensor) -> tuple[float, ...]:
    return tuple((squares[0] / squares[1].clamp(min=1e-300)).sqrt().tolist())


def _divergence(found: Any, expected: Any) -> list[Tensor]:
    ours, theirs = (getattr(out, "logits", None) for out in (found, expected))
    if ours is None or theirs is None:
        return []
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return [(p.exp() * (p - q)).sum(-1).flatten()]
