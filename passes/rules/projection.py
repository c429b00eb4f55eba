"""Find the raw projection of the queries: what the layer's query weights give, before norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attnrewrite.passes.attention.form import Attention, Operand, Reject
from attnrewrite.passes.graph.axes import (
    MOVES,
    AxisError,
    Dim,
    Layout,
    Symbol,
    backward,
    broadcast,
    flat,
    same,
    size_of,
    symbols,
)
from attnrewrite.passes.graph.nodes import argument, is_node, op, shape, tensor

_LINEAR = {"linear", "addmm", "mm", "matmul"}
_ELEMENTWISE = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "to",
    "_to_copy",
    "float",
    "type_as",
    "layer_norm",
    "rms_norm",
}
_VIEWS = (MOVES - {"expand", "slice", "repeat_interleave", "repeat"}) | {"unbind"}
_PIECES = {"slice", "narrow", "split", "split_with_sizes", "chunk", "getitem", "tensor_split", "select"}


def query_projection(site: Attention) -> Operand:
    """Return the projection of the site's queries with its layout. Raises Reject (AR307).

    It is the last value on the way from the projection's linear map to the queries that has only been moved or cut
    out of a fused projection, and still has every head and every feature.
    """
    start = site.query
    inner = flat(site.inner)
    found: Operand | None = None
    for operand in _ancestors(start, inner):
        if _is_whole(operand, site) and _only_moved(operand.node):
            found = Operand(operand.node, _named(operand.layout, site))
            break
    if found is None:
        near = "queries that are a linear map of the layer's input, split into heads"
        raise Reject("AR307", "the projection that makes the queries was not found", site.anchor, near)
    return found


def _ancestors(start: Operand, inner: Dim) -> Iterator[Operand]:
    """Yield ``start`` and the values it is computed from along tensor data, nearest first, with their layouts."""
    todo, seen = [start], set[fx.Node]()
    while todo:
        operand = todo.pop(0)
        if operand.node in seen:
            continue
        seen.add(operand.node)
        yield operand
        todo += _inputs(operand, inner)


def _inputs(operand: Operand, inner: Dim) -> list[Operand]:
    node, layout = operand.node, operand.layout
    if node.op != "call_function" or op(node) in _LINEAR:
        return []
    try:
        if op(node) in ("slice", "narrow") and is_node(node.args[0]):
            dim = int(argument(node, 1, "dim", 0)) % len(layout)
            return [Operand(node.args[0], _fresh_axis(layout, dim, node.args[0]))]
        moved = backward(layout, node)
        if moved is not None:
            return [Operand(*moved)]
        if op(node) == "cat" and isinstance(node.args[0], list | tuple):
            dim = int(argument(node, 1, "dim", 0)) % len(layout)
            return [Operand(x, _fresh_axis(layout, dim, x)) for x in node.args[0] if is_node(x)]
        if op(node) in _ELEMENTWISE:
            full = [x for x in node.args[:2] if is_node(x) and tensor(x) is not None and len(shape(x)) == len(layout)]
            return [Operand(x, broadcast(layout, x)) for x in full]
    except AxisError:
        return []
    return []


def _fresh_axis(layout: Layout, dim: int, node: fx.Node) -> Layout:
    axis = (Symbol("part", shape(node)[dim]),)
    return (*layout[:dim], axis, *layout[dim + 1 :])


def _is_whole(operand: Operand, site: Attention) -> bool:
    """Whether every query symbol is there; the feature axis may have been cut and joined on the way."""
    wanted = [s for dim in site.query_layout[:3] for s in dim]
    have = symbols(operand.layout)
    rest = [s for s in have if s not in wanted]
    return all(s in have or same(s.size, 1) for s in wanted) and same(size_of(rest), size_of(site.inner))


def _named(layout: Layout, site: Attention) -> Layout:
    """Call the feature axis, which lost its name where it was cut and joined, by the site's name."""
    wanted = {s for dim in site.query_layout[:3] for s in dim}
    inner = set(flat(site.inner))

    def name(dim: Dim) -> Dim:
        line = flat(dim)
        strange = [s for s in line if s not in wanted and s not in inner]
        if not strange:
            return line
        first = line.index(strange[0])
        return (*line[:first], *flat(site.inner), *(s for s in line[first:] if s in wanted))

    return tuple(name(dim) for dim in layout)


def _only_moved(node: fx.Node) -> bool:
    """Whether ``node`` is a linear map's result, moved or cut but not computed with."""
    for _ in range(32):
        if op(node) in _LINEAR:
            return True
        target = getattr(node.target, "__name__", "")
        pieces = op(node) in _PIECES or target == "getitem"
        views = op(node) in _VIEWS
        if not (pieces or views) or not node.args or not is_node(node.args[0]):
            return False
        node = node.args[0]
    return False
