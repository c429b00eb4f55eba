"""Evaluate the part of a graph that depends on positions only: shapes, constants and buffers, no data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import op

_METADATA_ONLY = {
    "new_ones",
    "new_zeros",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
}
_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "dropout", "normal", "uniform", "multinomial"}
MAX_ELEMENTS = 1 << 28


class DependsOnData(Exception):  # noqa: N818  # an answer, not an error
    """The value depends on an input of the model."""


@dataclass(eq=False, repr=False)
class Evaluator:
    """Computes real values of nodes, with symbolic sizes replaced by ``sizes`` (sympy symbol -> int, else the hint).

    ``buffers`` collects the buffers that a value was read from: facts drawn from it hold while they are unchanged.
    """

    capture: Capture
    sizes: dict[Any, int] = field(default_factory=dict)
    memo: dict[fx.Node, Any] = field(default_factory=dict)
    buffers: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    data: set[fx.Node] = field(default_factory=set)

    def is_static(self, node: fx.Node) -> bool:
        """Whether ``node`` can be evaluated."""
        try:
            self.value(node)
        except DependsOnData:
            return False
        return True

    def value(self, node: fx.Node) -> Any:
        """Return the value of ``node``. Raises DependsOnData."""
        if node in self.data:
            raise DependsOnData(node)
        if node not in self.memo:
            try:
                self.memo[node] = self._compute(node)
            except DependsOnData:
                self.data.add(node)
                raise
            except Exception as error:  # any failing op only means: not evaluated
                self.data.add(node)
                raise DependsOnData(node) from error
        return self.memo[node]

    def _compute(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.concrete(val)
        if isinstance(val, torch.Tensor) and self._elements(val) > MAX_ELEMENTS:
            raise DependsOnData(node)
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op != "call_function" or op(node) in _RANDOM or _mutates(node):
            raise DependsOnData(node)
        args, kwargs = node.args, node.kwargs
        if op(node) in _METADATA_ONLY and isinstance(args[0], fx.Node):
            args = (self._dummy(args[0]), *args[1:])
        args, kwargs = tree_map(self._argument, (args, dict(kwargs)))
        self.buffers[node] = {b for x in node.all_input_nodes for b in self.buffers.get(x, ())}
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            return node.target(*args, **kwargs)  # type: ignore[operator]  # a callable for call_function

    def _argument(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self.value(x)
        return self.concrete(x) if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x

    def _placeholder(self, node: fx.Node) -> Any:
        outer = self.capture.bindings.get(node)
        if outer is not None:
            found = self.value(outer)
            self.buffers[node] = self.buffers.get(outer, set())
            return found
        buffer = self.capture.buffers.get(node)
        if buffer is None:
            raise DependsOnData(node)
        self.buffers[node] = {node}
        return buffer

    def _attribute(self, node: fx.Node) -> Any:
        held: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            held = getattr(held, part)
        if isinstance(held, fx.GraphModule) or (
            isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter)
        ):
            return held
        raise DependsOnData(node)

    def _dummy(self, node: fx.Node) -> torch.Tensor:
        val = node.meta["val"]
        return torch.empty(1, dtype=val.dtype, device=val.device).expand([int(self.concrete(n)) for n in val.shape])

    def _elements(self, val: torch.Tensor) -> int:
        total = 1
        for n in val.shape:
            total *= int(self.concrete(n))
        return total

    def concrete(self, x: Any) -> Any:
        """Replace size symbols by numbers."""
        if not isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
            return x
        if not self.sizes:
            return x.node.hint
        found = x.node.expr.subs(self.sizes)
        if found.free_symbols:
            raise DependsOnData(str(x))
        return bool(found) if isinstance(x, torch.SymBool) else (float if isinstance(x, torch.SymFloat) else int)(found)


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def literals(node: fx.Node, capture: Capture) -> set[int]:
    """Return the int literals in the computation of ``node``: thresholds that a finite test must reach beyond."""
    seen: set[fx.Node] = set()
    todo, found = [node], set[int]()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        outer = capture.bindings.get(current)
        todo += [outer] if outer is not None else current.all_input_nodes
        tree_map(lambda x: found.add(abs(x)) if type(x) is int and abs(x) < 1 << 30 else None, current.args)
    return found
