"""Small changes to a captured graph, each of which makes another function of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import op, tensor

aten = torch.ops.aten
PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
Change = Callable[[fx.Node], Iterator[tuple[str, Callable[[fx.Node], None]]]]


@dataclass(frozen=True)
class Mutation:
    """``change`` is applied to the node at ``position`` of the graph."""

    name: str
    position: int
    change: Callable[[fx.Node], None]


def mutations(graph: fx.Graph) -> Iterator[Mutation]:
    """Yield every change that applies to a node of ``graph``."""
    for position, node in enumerate(graph.nodes):
        for change in _CHANGES:
            for name, apply in change(node):
                yield Mutation(f"{name} at {node.name}", position, apply)


def mutate(capture: Capture, mutation: Mutation) -> Capture | None:
    """Return a changed copy of ``capture``, or None where the change does not fit the shapes."""
    places: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(capture.module.graph, places))  # type: ignore[arg-type]  # filled by the copy
    module = fx.GraphModule(capture.module, graph)
    mutation.change(list(graph.nodes)[mutation.position])
    fakes = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in fakes if isinstance(v, FakeTensor))
    try:
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    except Exception:  # this change makes no graph that runs
        return None
    module.recompile()
    buffers = {places[node]: value for node, value in capture.buffers.items()}
    return Capture(module, capture.entry, buffers)


def _set(index: int, value: Any) -> Callable[[fx.Node], None]:
    def apply(node: fx.Node) -> None:
        node.args = (*node.args[:index], value, *node.args[index + 1 :])

    return apply


def _insert(target: Any, *extra: Any) -> Callable[[fx.Node], None]:
    """Put ``target(node, *extra)`` between the node and its users."""

    def apply(node: fx.Node) -> None:
        with node.graph.inserting_after(node):
            new = node.graph.call_function(target, (node, *extra))
        new.meta = copy.copy(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return apply


def _bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a tensor by schema


def _swap(node: fx.Node) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


def softmax_axis(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) in ("softmax", "_softmax"):
        rank = len(node.meta["val"].shape)
        for axis in range(rank):
            if axis != node.args[1] % rank:  # type: ignore[operator]  # an int by schema
                yield f"softmax over axis {axis}", _set(1, axis)


def weights(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    """Change what comes out of the softmax."""
    if op(node) in ("softmax", "_softmax"):
        yield "weights transposed", _insert(aten.transpose.int, -1, -2)
        yield "weights squared", _insert(aten.pow.Tensor_Scalar, 2)
        yield "weights plus a number", _insert(aten.add.Tensor, 0.25)
        yield "weights rolled", _insert(aten.roll.default, [1], [-1])
        yield "weights twice", _insert(aten.mul.Tensor, 2.0)
        yield "weights cumulated", _insert(aten.cumsum.default, -1)
        yield "weights without the smallest", _insert(aten.relu.default)
        yield "weights behind a second softmax", _insert(aten.softmax.int, -1)


def scores(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    """Change what goes into the softmax, or comes out of any product."""
    if op(node) in PRODUCTS:
        yield "product behind relu", _insert(aten.relu.default)
        yield "product behind tanh", _insert(aten.tanh.default)
        yield "product squared", _insert(aten.mul.Tensor, 1.01)
        yield "product rolled", _insert(aten.roll.default, [1], [-1])
        yield "product of absolute values", _insert(aten.abs.default)
        yield "product turned", _insert(aten.transpose.int, -1, -2)
        yield "product flipped", _insert(aten.flip.default, [-1])
        yield "product clamped", _insert(aten.clamp.default, -1.0, 1.0)


def operands(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) in ("matmul", "bmm"):
        yield "operands swapped", _swap
        yield "left operand twice", lambda n: _set(1, n.args[0])(n)
        yield "right operand twice", lambda n: _set(0, n.args[1])(n)
    if op(node) == "einsum":
        equation = str(node.args[0])
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        yield "einsum with operands swapped", _set(0, f"{second},{first}->{result}")
        yield "einsum with result turned", _set(0, f"{inputs}->{result[:-2]}{result[-1]}{result[-2]}")


def numbers(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) in ("mul", "div", "add", "sub") and isinstance(node.args[1], float | int):
        yield "number one percent off", _set(1, node.args[1] * 1.01)
        yield "number with the other sign", _set(1, -node.args[1])
    if op(node) in ("triu", "tril"):
        diagonal = node.args[1] if len(node.args) > 1 else 0
        for by in (-1, 1, 2):
            yield f"triangle shifted by {by}", lambda n, d=diagonal + by: setattr(n, "args", (n.args[0], d))  # type: ignore[misc, operator]  # an int by schema
    if op(node) in ("masked_fill", "where"):
        for index, value in enumerate(node.args):
            if isinstance(value, float):
                yield "small fill", _set(index, -3.0)
                yield "fill of zero", _set(index, 0.0)
                yield "finite fill", _set(index, -1e5)


def masks(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) in ("masked_fill", "add", "sub", "mul", "div", "tanh"):
        yield "step left out", _bypass
    value = tensor(node)
    if value is not None and value.dtype == torch.bool and node.users:
        yield "mask inverted", _insert(aten.bitwise_not.default)
        yield "mask rolled", _insert(aten.roll.default, [1], [-1])
        if value.dim() > 1:
            yield "mask turned", _insert(aten.transpose.int, -1, -2)


def axes(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) == "permute":
        order = list(node.args[1])  # type: ignore[call-overload]  # a list by schema
        for n in range(len(order) - 1):
            yield f"axes {n} and {n + 1} exchanged", _set(1, [*order[:n], order[n + 1], order[n], *order[n + 2 :]])
    if op(node) == "transpose":
        yield "axes not exchanged", _bypass
    if op(node) == "repeat_interleave":
        yield "heads repeated in another order", _insert(aten.flip.default, [1])
    if op(node) in ("view", "reshape", "expand", "transpose", "permute") and len(node.meta["val"].shape) > 2:
        yield "axis 1 flipped", _insert(aten.flip.default, [1])


def blocks(node: fx.Node) -> Iterator[tuple[str, Callable[[fx.Node], None]]]:
    if op(node) == "cat":
        yield "blocks in the other order", lambda n: _set(0, list(reversed(n.args[0])))(n)  # type: ignore[call-overload]  # tensors
        yield "first block twice", lambda n: _set(0, [n.args[0][0]] * 2)(n)  # type: ignore[index]  # tensors
    if op(node) == "slice":
        yield "slice rolled", _insert(aten.roll.default, [1], [-1])
        yield "slice doubled", _insert(aten.mul.Tensor, 2.0)


_CHANGES: tuple[Change, ...] = (softmax_axis, weights, scores, operands, numbers, masks, axes, blocks)
