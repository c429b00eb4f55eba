"""Observe: run a model as it is, and look at the tensors of every attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from attnrewrite.compiled import uncompiled
from attnrewrite.dynamo import many_recompilations
from attnrewrite.explanation import without_cache
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.site import SiteTensors, nodes_read
from attnrewrite.passes.graph.capture import Capture, from_dynamo
from attnrewrite.passes.matching.match import match
from attnrewrite.passes.rewriting import markers
from attnrewrite.passes.rewriting.select import Plan, request_for
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.base import Request
from attnrewrite.verification import evaluating


class Call(NamedTuple):
    """Positional and keyword inputs of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Batch = torch.Tensor | Sequence[Any] | Mapping[str, Any]
"""One call of a model: its only input, its positional inputs, its keyword inputs, or a ``Call`` with both."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One attention while the model runs: ``tensors`` hold real values, ``tensors.extra`` what the variant reads.

    ``request`` is what a conversion wants here; in a model that is not converted, the exact rewrite. ``output``
    ``[B, H, L, Dv]`` is what the variant gives, in a model that runs as what it was converted to.
    """

    site: Attention
    request: Request
    tensors: SiteTensors
    output: torch.Tensor | None = None


def observe(model: torch.nn.Module, batches: Iterable[Batch], see: Callable[[Observed], None]) -> None:
    """Run ``model`` on ``batches`` in eval mode, without gradients, and call ``see`` at each attention, in order.

    A converted model runs as it was before: every layer sees what the original one sees. Nothing of it is changed.
    Raises what the model raises.
    """
    for _ in outputs_observed(model, batches, see):
        pass


def outputs_observed(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    see: Callable[[Observed], None],
    *,
    converted: bool = False,
    learning: bool = False,
) -> Iterator[Any]:
    """Do what ``observe`` does, and yield what the model gives for each batch.

    ``converted`` runs it as what it is, ``learning`` with gradients and in the mode that it is in.
    """
    run = observed(model, see, converted=converted)
    for batch in batches:
        args, kwargs = call(batch)
        with torch.enable_grad() if learning else evaluating(model):
            result = run(*args, **kwargs)
        yield result


def observed(model: torch.nn.Module, see: Callable[[Observed], None], *, converted: bool) -> Callable[..., Any]:
    """Return ``model`` as a function that calls ``see`` at each attention, in the mode that the model is in.

    ``converted`` runs a converted model as what it is, and not as it was before. No key-value cache is made.
    """
    run = torch.compile(model, backend=_Backend(see, converted), **many_recompilations())

    def called(*args: Any, **kwargs: Any) -> Any:
        with uncompiled(model), without_cache(model, kwargs) as inputs:
            return run(*args, **inputs)

    return called


def call(batch: Batch) -> Call:
    """Return positional and keyword arguments of one call."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    return Call((batch,) if isinstance(batch, torch.Tensor) else tuple(batch), {})


@dataclass(eq=False)
class _Backend:
    """Runs graphs uncompiled, with one call of ``see`` behind every attention."""

    see: Callable[[Observed], None]
    converted: bool

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        capture = from_dynamo(gm, example_inputs)
        marked = markers.find(capture)
        for site in match(capture).attentions:
            request = request_for(site, marked, Plan())
            assert request is not None  # a plan without targets names every layer
            self._tap(site, request)
        for marker in marked:
            markers.consume(marker)
        _recompile(capture)
        return capture.module

    def _tap(self, site: Attention, request: Request) -> None:
        rule = RULES[request.variant]
        extra = rule.extra(site, request)
        nodes = list(dict.fromkeys([*nodes_read(site), *extra.values()]))
        replaced = self.converted and request.marker is not None

        def tap(found: torch.Tensor, *values: Any) -> torch.Tensor:
            by_node = dict(zip(nodes, values, strict=True))
            tensors = SiteTensors(site, by_node, {name: by_node[node] for name, node in extra.items()})
            if not replaced and "added" in tensors.extra:  # whoever runs the rewrite here must not change the model
                tensors.extra["added"] = torch.zeros_like(tensors.extra["added"])
            output = rule.function(request)(tensors) if replaced else None
            self.see(Observed(site, request, tensors, output))
            return found if output is None else tensors.result(output)

        with site.output.graph.inserting_after(max([site.output, *nodes])):
            seen = site.output.graph.call_function(tap, (site.output, *nodes))
        if replaced:
            site.output.replace_all_uses_with(seen, lambda user: user is not seen)


def _recompile(capture: Capture) -> None:
    for module in capture.graphs():
        module.graph.lint()
        module.recompile()
