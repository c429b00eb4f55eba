"""What is asked of Dynamo: a model's graphs, where torch.export cannot take it as a whole, and many recompilations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.graph.capture import Capture, from_dynamo


def capture_graphs(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Capture]:
    """Run ``model`` once without gradients, and capture every graph between its graph breaks.

    The model runs as it is; its buffers are put back afterwards. Raises what the model raises.
    """
    captures: list[Capture] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        captures.append(from_dynamo(gm, example_inputs))
        return gm

    with torch.no_grad(), unchanged_buffers(model):
        torch.compile(model, backend=collect)(*args, **kwargs)
    return captures


def many_recompilations() -> dict[str, Any]:
    """Return keywords for ``torch.compile`` that let a model be compiled for more kinds of calls.

    A model that is generated with, trained and evaluated meets more of them than torch's usual limit of eight, beyond
    which torch would run it uncompiled. The limit is raised for this model only where torch can.
    """
    known = inspect.signature(torch.compile).parameters
    limits = {"recompile_limit": 64, "isolate_recompiles": True}
    return {name: value for name, value in limits.items() if name in known}


@contextmanager
def unchanged_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Put the values of the model's buffers back at the end."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
