"""Distance: how far a converted model is from the model it came from, by layer and head, and at its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.observation import Batch, Observed, outputs_observed
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.facts.collect import is_cross
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.sdpa import exact

_COLUMNS, _POSITIONS = 256, 128
"""Keys whose attention weights, and positions whose next-token distributions are compared at a time."""


@dataclass(frozen=True)
class LayerDistance:
    """One attention layer beside the teacher's: relative errors in the Euclidean norm, one number per query head.

    ``maps``: of the attention weights, as far as they have the form of a matrix over the keys. ``outputs``: of the
    attention's result, before the output projection. Queries at padding do not count.
    """

    layer: str
    maps: tuple[float, ...]
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Distance:
    """Every layer, and the mean Kullback-Leibler divergence of the next-token distributions in nats, or None."""

    layers: list[LayerDistance]
    kl: float | None


@dataclass(frozen=True, eq=False)
class Record:
    """One call of a teacher: what its attentions got, in order, and what it gave."""

    batch: Batch
    attentions: list[SiteTensors]
    out: Any


def distance(model: torch.nn.Module, teacher: torch.nn.Module, batches: Iterable[Batch]) -> Distance:
    """Run both on ``batches``, each on its own activations, and compare what their attentions give.

    A layer's error holds that of the layers below it. ``kl`` is KL(teacher || model) over the last axis of ``logits``,
    where the models give any; positions of padding do not count. The teacher may be the converted ``model`` itself,
    which then runs as it was before, unless the conversion replaced modules. Queries, keys and values of one batch at a
    time are kept, for all layers.

    Raises what the models raise, and CaptureError AR102 where their attentions are not the same layers.
    """
    return distance_from((record(teacher, batch) for batch in batches), model)


def record(teacher: torch.nn.Module, batch: Batch) -> Record:
    """Run ``teacher`` on ``batch``; a converted model runs as it was before."""
    seen: list[SiteTensors] = []
    (out,) = outputs_observed(teacher, [batch], lambda at: seen.append(at.tensors))
    return Record(batch, seen, out)


def distance_from(records: Iterable[Record], model: torch.nn.Module) -> Distance:
    """Do what ``distance`` does, with a teacher that has been run already."""
    layers, sums, divergence = list[str](), list[Tensor](), list[Tensor]()
    for theirs in records:
        layers = [tensors.site.layer for tensors in theirs.attentions]
        found, out = _compared(model, theirs)
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        divergence += _divergence(out, theirs)
    rows = [LayerDistance(layer, *map(_relative, part)) for layer, part in zip(layers, sums, strict=True)]
    return Distance(rows, float(torch.cat(divergence).mean()) if divergence else None)


def _compared(model: torch.nn.Module, theirs: Record) -> tuple[list[Tensor], Any]:
    """Run ``model`` as it is; return the squares of every layer, and what the model gives."""
    found: list[Tensor] = []

    def see(at: Observed) -> None:
        expected = theirs.attentions[len(found)] if len(found) < len(theirs.attentions) else None
        if expected is None or expected.site.layer != at.site.layer:
            raise _different(at.site.layer)
        function = exact if at.request.marker is None else RULES[at.request.variant].function(at.request)
        found.append(_squares(function, at.tensors, expected))

    (out,) = outputs_observed(model, [theirs.batch], see, converted=True)
    if len(found) < len(theirs.attentions):
        raise _different(theirs.attentions[len(found)].site.layer)
    return found, out


def _different(layer: str) -> Exception:
    return error("AR102", f"only one of the models attends in {layer}", hint="compare models of the same layers")


@dataclass(eq=False, repr=False)
class _Weights(SiteTensors):
    """The site's tensors with columns of the identity in the place of the values: the result is attention weights."""

    first: int = 0

    def attended(self) -> Tensor:
        value = self.value()
        S, device = value.shape[2], value.device
        columns = torch.arange(self.first, min(self.first + _COLUMNS, S), device=device)
        part = (torch.arange(S, device=device)[:, None] == columns).to(value.dtype)  # [S, columns]
        return part.expand(*value.shape[:2], -1, -1)


def _squares(function: Callable[[SiteTensors], Tensor], ours: SiteTensors, theirs: SiteTensors) -> Tensor:
    """Return squared errors and squared norms of every head: ``[[maps, ..], [outputs, ..]]``, [2, 2, H]."""

    def weights(t: SiteTensors, first: int) -> SiteTensors:
        return _Weights(t.site, t.values, t.extra, first)

    nothing = _padded(theirs)
    maps: Any = sum(
        _error_and_norm(function(weights(ours, first)), exact(weights(theirs, first)), nothing)
        for first in range(0, theirs.width, _COLUMNS)
    )
    return torch.stack([maps, _error_and_norm(function(ours), exact(theirs), nothing)])


def _padded(t: SiteTensors) -> Tensor | None:
    """Return which queries are padding, [B|1, 1, L, 1]: in self-attention, those whose own keys are."""
    real = t.padding()
    if real is None or is_cross(t.site) or not same_length(t.site):
        return None
    return ~real.expand(-1, -1, -1, t.width).mT


def _error_and_norm(found: Tensor, expected: Tensor, nothing: Tensor | None) -> Tensor:
    """Return sums of squares over all but the heads, [2, H]; what is no number in both is equal."""
    found, expected = found.double(), expected.double()
    equal = found.isnan() & expected.isnan()
    equal = equal if nothing is None else equal | nothing
    parts = (x.masked_fill(equal, 0.0) for x in (found - expected, expected))
    return torch.stack([x.square().sum((0, 2, 3)) for x in parts])


def _relative(squares: Tensor) -> tuple[float, ...]:
    return tuple((squares[0] / squares[1].clamp(min=1e-300)).sqrt().tolist())


def _divergence(found: Any, teacher: Record) -> Iterator[Tensor]:
    ours, theirs = (getattr(out, "logits", None) for out in (found, teacher.out))
    if ours is None or theirs is None:
        return
    rows: tuple[Any, ...] = (theirs.flatten(0, -2), ours.flatten(0, -2), _real_positions(teacher, theirs).flatten())
    for their, our, counts in zip(*(x.split(_POSITIONS) for x in rows), strict=True):
        p, q = their.double().log_softmax(-1), our.double().log_softmax(-1)
        yield (p.exp() * (p - q)).sum(-1)[counts]


def _real_positions(teacher: Record, logits: Tensor) -> Tensor:
    """Return which positions of ``logits`` [B, L, V] are no padding in the last self-attention, [B, L]."""
    own = [t for t in teacher.attentions if not is_cross(t.site) and same_length(t.site)]
    padded = _padded(own[-1]) if own else None
    real = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if padded is None or real.dim() != 2 or padded.shape[2] < real.shape[1]:
        return real
    return real & ~padded[:, 0, -real.shape[1] :, 0].to(real.device)  # logits may be those of the last positions only
