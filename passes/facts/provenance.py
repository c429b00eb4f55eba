"""Where a value comes from: walks from a query, key or value back to the linear maps that make it.

All walks are bounded and remembered per graph. They step into the bodies of higher-order operators and out of them.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import fx

from attnrewrite.passes.graph.capture import Capture, bodies
from attnrewrite.passes.graph.nodes import WEIGHT, is_node, op, shape, tensor

MAX_STEPS = 400
_DEPTH = 120

_LINEAR = {"linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
_PRODUCTS = {"addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "addbmm"}
_ATTENDS = r"^_?(safe_)?softmax$|scaled_dot_product|^(lstm|gru|rnn_\w+)$"
_OPAQUE = r"pack|_scaled_mm|_int_mm|fbgemm|mkldnn|^quantized|_native_multi_head"
_FIRST_ONLY = {"type_as", "expand_as", "view_as", "reshape_as", "layer_norm", "native_layer_norm", "rms_norm"}
_FIRST_ONLY |= {"_fused_rms_norm", "group_norm", "batch_norm", "instance_norm", "attnrewrite::enter"}
_SHAPE_ONLY = r"^(new_|sym_|size$|numel$)|_like$"
_CUTS = {"slice", "narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split"}


class Unknown(Exception):  # noqa: N818  # an answer, not an error
    """A walk has reached its bound."""


@dataclass(eq=False, repr=False)
class Linear:
    """One linear map: its ``node``, the value it maps, its weight's placeholder, and how that is cut."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node | None
    cuts: tuple[str, ...] = ()


@dataclass(eq=False, repr=False)
class Trail:
    """The way back from an operand: the values passed, nearest first, and where it ends.

    ``opaque`` are operators that cannot be read; ``leaves`` are inputs and parameters that were reached without any
    linear map or such operator.
    """

    start: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    linears: dict[fx.Node, Linear] = field(default_factory=dict)
    opaque: list[fx.Node] = field(default_factory=list)
    leaves: list[fx.Node] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Provenance:
    """Answers where values of one captured graph come from."""

    capture: Capture
    _bodies: dict[fx.Node, fx.GraphModule] = field(init=False)
    _inputs: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    _mapped: dict[fx.Node, bool] = field(default_factory=dict)
    _linear: dict[fx.Node, Linear | None] = field(default_factory=dict)
    _weight: dict[fx.Node, tuple[fx.Node, tuple[str, ...]] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bodies = {call: body for module in self.capture.graphs() for call, body in bodies(module)}

    def body(self, node: object) -> fx.GraphModule | None:
        """Return the graph that a higher-order operator runs, where it can be read."""
        return self._bodies.get(node) if is_node(node) else None

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors whose values ``node`` is computed from, across the bounds of bodies."""
        if node not in self._inputs:
            self._inputs[node] = self._read_inputs(node)
        return self._inputs[node]

    def _read_inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self.capture.bindings:
            return [self.capture.bindings[node]]
        call = node.args[0] if node.target is operator.getitem else node
        if (body := self.body(call)) is not None:
            results = body.graph.output_node().args[0]
            results = results if isinstance(results, list | tuple) else [results]
            picked = results if call is node else [results[int(node.args[1])]]  # type: ignore[arg-type]  # an int by getitem
            return [x for x in picked if is_node(x)]
        name = op(node)
        if name in BLANK and (written := _written_into(node)):
            return written
        if _reads_shapes(name):
            return []
        if name in _FIRST_ONLY:
            return [x for x in node.args[:1] if is_node(x)]
        return [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor | list | tuple)]

    def mapped(self, node: fx.Node, depth: int = 0) -> bool:
        """Whether ``node`` depends on a linear map or a learned table: positions and constants do not."""
        if node not in self._mapped:
            if depth > _DEPTH:
                return True
            own = self.linear(node) is not None or self.opaque(node) or self._learned_table(node)
            self._mapped[node] = own or any(self.mapped(x, depth + 1) for x in self.inputs(node))
        return self._mapped[node]

    def _learned_table(self, node: fx.Node) -> bool:
        return op(node) == "embedding" and self.is_parameter(node.args[0])

    def is_parameter(self, node: object) -> bool:
        """Whether ``node`` is computed from parameters alone, and not from buffers alone."""
        found = self.weight(node) if is_node(node) else None
        return found is not None and found[0] not in self.capture.buffers

    def opaque(self, node: fx.Node) -> bool:
        """Whether ``node`` is an operator that cannot be read: quantised, custom, recurrent, or another attention."""
        name = op(node)
        if not name:
            return isinstance(node.target, torch._ops.HigherOrderOperator) and self.body(node) is None
        return _is_unreadable(name) or (name in _PRODUCTS and self.linear(node) is None)

    def linear(self, node: fx.Node) -> Linear | None:
        """Read ``node`` as a linear map with a weight of the model."""
        if node not in self._linear:
            self._linear[node] = self._read_linear(node)
        return self._linear[node]

    def _read_linear(self, node: fx.Node) -> Linear | None:
        if op(node) in _LINEAR:
            source, weight = node.args[:2]
            found = self.weight(weight) if is_node(weight) else None
            return Linear(node, source, *(found or (None, ()))) if is_node(source) else None
        if op(node) not in _PRODUCTS:
            return None
        pair = node.args[1] if op(node) == "einsum" else node.args[-2:]
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not (is_node(pair[0]) and is_node(pair[1])):
            return None
        for source, weight in ((pair[0], pair[1]), (pair[1], pair[0])):
            found = self.weight(weight)
            # positions times frequencies is a product with a buffer too, but of something that no weight has touched
            if found is not None and (found[0] not in self.capture.buffers or self.mapped(source)):
                return Linear(node, source, *found)
        return None

    def weight(self, node: fx.Node) -> tuple[fx.Node, tuple[str, ...]] | None:
        """Return the first weight that ``node`` is computed from and how it is cut, or None if data go in as well."""
        if node not in self._weight:
            self._weight[node] = self._read_weight(node)
        return self._weight[node]

    def _read_weight(self, node: fx.Node) -> tuple[fx.Node, tuple[str, ...]] | None:
        todo, seen = [(node, tuple[str, ...]())], set[fx.Node]()
        found: tuple[fx.Node, tuple[str, ...]] | None = None
        while todo:
            current, cuts = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            bound = current in self.capture.bindings
            if not bound and (WEIGHT in current.meta or current.op == "get_attr"):
                better = found is None or (found[0] in self.capture.buffers and current not in self.capture.buffers)
                found = (current, cuts) if better else found
                continue
            if (current.op == "placeholder" and not bound) or op(current) in _LINEAR or len(seen) > 64:
                return None
            cuts += cut(current)
            todo += [(x, cuts) for x in reversed(self.inputs(current))]
        return found

    def carriers(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs that carry the value itself, not positions or constants it is multiplied with."""
        inputs = self.inputs(node)
        if op(node) in ("cat", "stack", "where", *WRITES):
            return inputs
        return [x for x in inputs if self.mapped(x)] or [x for x in inputs if _is_float(x)]

    def trail(self, start: fx.Node) -> Trail:
        """Walk from ``start`` to the linear maps that make it. Raises Unknown."""
        trail, todo, seen = Trail(start), deque([start]), {start}
        while todo:
            node = todo.popleft()
            if (linear := self.linear(node)) is not None:
                trail.linears[node] = linear
                continue
            trail.nodes.append(node)
            opaque = self.opaque(node)
            carriers = [] if opaque or self._learned_table(node) else self.carriers(node)
            if opaque:
                trail.opaque.append(node)
            elif not carriers:
                trail.leaves.append(node)
            new = [x for x in dict.fromkeys(carriers) if x not in seen]
            seen.update(new)
            todo += new
            if len(seen) > MAX_STEPS:
                raise Unknown(start)
        return trail

    def parts(self, trail: Trail) -> set[tuple[fx.Node | None, tuple[str, ...], tuple[str, ...]]]:
        """Say what makes an operand: weights, how they are cut, and how what they give is cut. Raises Unknown."""
        found, seen = set(), set[tuple[fx.Node, tuple[str, ...]]]()
        todo = deque([(trail.start, tuple[str, ...]())])
        while todo:
            state = todo.popleft()
            if state in seen:
                continue
            seen.add(state)
            if len(seen) > MAX_STEPS:
                raise Unknown(trail.start)
            node, cuts = state
            if (linear := trail.linears.get(node)) is not None:
                found.add((linear.weight, linear.cuts, cuts))
            elif node not in trail.opaque and node not in trail.leaves:
                todo += [(x, cuts + cut(node)) for x in self.carriers(node)]
        return found


WRITES = {"index_copy", "index_put", "_index_put_impl", "_unsafe_index_put", "slice_scatter", "select_scatter"}
WRITES |= {"scatter", "copy"}
"""Operators that write a part of a tensor."""

BLANK = {"empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like"}
"""Operators that make a tensor to be filled."""


def cut(node: fx.Node) -> tuple[str, ...]:
    """Say which part of its input ``node`` takes; nothing where it takes all."""
    if node.target is operator.getitem:
        return (f"[{node.args[1]}]",) if op(node.args[0]) in _CUTS else ()
    if op(node) not in _CUTS:
        return ()
    source = node.args[0]
    if is_node(source) and tensor(node) is not None and shape(node) == shape(source):
        return ()
    return (f"{op(node)}{node.args[1:]}",)


def _written_into(node: fx.Node) -> list[fx.Node]:
    """Return what is copied in place into parts of a blank tensor."""
    found, todo = list[fx.Node](), [user for user in node.users if op(user) in _CUTS]
    for view in todo:
        found += [u.args[1] for u in view.users if op(u) == "copy" and u.args[0] is view and is_node(u.args[1])]
        todo += [u for u in view.users if op(u) in _CUTS and len(todo) < 16]
    return found


@functools.cache
def _reads_shapes(name: str) -> bool:
    return re.search(_SHAPE_ONLY, name) is not None


@functools.cache
def _is_unreadable(name: str) -> bool:
    space, _, inner = name.rpartition("::")
    if space in ("attnrewrite", "quantized_decomposed", "prims"):
        return False
    return bool(space) or re.search(_OPAQUE, inner) is not None or re.search(_ATTENDS, inner) is not None


def _is_float(node: fx.Node) -> bool:
    value = tensor(node)
    return value is None or value.dtype.is_floating_point or value.dtype.is_complex
