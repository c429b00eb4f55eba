"""The recogniser and inductor's attention patterns, on one and the same Dynamo graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph

from attnrewrite.passes.graph.capture import from_dynamo
from attnrewrite.passes.pipeline import Pipeline


@dataclass
class Seen:
    """What both found in the graphs of one model, and the seconds that it took."""

    ours: int = 0
    theirs: int = 0
    retrace: float = 0.0
    recognition: float = 0.0
    patterns: float = 0.0


def look(model: torch.nn.Module, inputs: Mapping[str, Any], training: bool) -> Seen:
    """Compile ``model`` once, hand every graph to both, and call what inductor's passes left of it without code.

    In training inductor traces every replacement twice and counts it twice; see ``counts_per_attention``.
    """
    seen = Seen()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        _ours(gm, example_inputs, seen)
        before = counters["inductor"]["fuse_attention"]
        with _timed_patterns(seen):
            compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), inner_compile=_as_it_is)
        seen.theirs += counters["inductor"]["fuse_attention"] - before
        return compiled

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model.train(training), backend=backend)(**inputs)
    return seen


def _ours(gm: fx.GraphModule, example_inputs: Sequence[Any], seen: Seen) -> None:
    start = time.perf_counter()
    capture = from_dynamo(gm, example_inputs)
    seen.retrace += time.perf_counter() - start
    report, _ = Pipeline().inspect(capture)
    seen.recognition += sum(report.timings_ms.values()) / 1e3
    seen.ours += sum(site.certificate == "proved" for site in report.sites)


def _as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Stand in for inductor's code generation: run the graph that its passes left."""

    def run(args: list[Any]) -> Any:
        return gm(*args)

    run._boxed_call = True  # type: ignore[attr-defined]  # the protocol of AOTAutograd
    return run


@contextmanager
def _timed_patterns(seen: Seen) -> Iterator[None]:
    """Add the time of the pass that holds the attention patterns."""
    apply = joint_graph.patterns.apply

    def timed(graph: Any) -> int:
        start = time.perf_counter()
        try:
            return apply(graph)
        finally:
            seen.patterns += time.perf_counter() - start

    with mock.patch.object(joint_graph.patterns, "apply", timed):
        yield


class Plain(torch.nn.Module):
    """One attention that inductor's first pattern is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the heads' outputs."""
        q, k, v = (y.view(2, 9, 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1) @ v


def counts_per_attention(training: bool) -> int:
    """Return how often inductor counts one attention that it finds."""
    found = look(Plain(), {"x": torch.randn(2, 9, 32)}, training).theirs
    if found == 0:
        raise RuntimeError("inductor does not find plain attention")
    return found
