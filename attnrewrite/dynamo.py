"""Capture a model graph by graph, as torch.compile does, where torch.export cannot take it as a whole."""

from __future__ import annotations

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
