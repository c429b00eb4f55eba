"""Facts read from buffers hold while the buffers are unchanged; this is checked at every call, cheaply.

nanoGPT keeps its causal mask in a buffer. Its values were proved to be causal when the graph was compiled. A call with
another tensor, or one written since, compares the values, and compiles the graph without the fact where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.graph.capture import Capture


@dataclass(eq=False, repr=False)
class Assumption:
    """Argument ``index`` of the graph has the values ``expected``; last seen as ``(identity, version)``."""

    index: int
    expected: torch.Tensor
    seen: tuple[int, int]

    def holds(self, args: tuple[Any, ...]) -> bool:
        """Whether the argument still has the expected values."""
        value = args[self.index]
        now = _identity(value)
        if now == self.seen:
            return True
        if value.shape != self.expected.shape or not torch.equal(value, self.expected.to(value.device)):
            return False
        self.seen = now
        return True


def _identity(value: torch.Tensor) -> tuple[int, int]:
    return id(value), -1 if value.is_inference() else value._version


def assumptions(capture: Capture, nodes: Iterable[fx.Node]) -> list[Assumption]:
    """Return what must be checked at each call for facts that were read from the buffers ``nodes``."""
    order = {node: n for n, node in enumerate(capture.module.graph.find_nodes(op="placeholder"))}
    found = []
    for node in dict.fromkeys(nodes):
        value = capture.buffers[node]
        found.append(Assumption(order[node], value.detach().clone(), _identity(value)))
    return found


@dataclass(eq=False, repr=False)
class Guarded:
    """A compiled graph that checks its assumptions, and another one for when they fail."""

    compiled: Callable[..., Any]
    facts: list[Assumption]
    recompile: Callable[[], Callable[..., Any]]
    other: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the graph, or the one without assumptions."""
        if all(fact.holds(args) for fact in self.facts):
            return self.compiled(*args)
        if self.other is None:
            self.other = self.recompile()
        return self.other(*args)
