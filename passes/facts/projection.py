"""Find the raw projection of queries or keys: what the layer's weights give, before norm and rotary embedding."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Literal

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
_SPLITS = {"split", "split_with_sizes", "chunk", "tensor_split"}
_PIECES = {"slice", "narrow", "getitem", "select", *_SPLITS}


def projection(site: Attention, role: Literal["query", "key"], *, newest: bool = False) -> Operand:
    """Return the projection of the site's queries or keys with its layout. Raises Reject (AR307).

    It is the last value on the way from the projection's linear map to the operand that has only been moved or cut
    out of a fused projection, and still has every head and every feature. ``newest``: that of the keys that the call
    adds to those of a cache.
    """
    joined = role == "key" and site.keys is not None
    added = role == "key" and newest and not joined
    start = newest_key(site) if added else site.query if role == "query" else site.key
    for operand in [] if joined else _ancestors(start, flat(site.inner)):
        wanted = key_layout(site, newest=newest) if role == "key" else site.query_layout  # symbols may split on the way
        if _is_whole(operand, wanted) and only_moved(operand.node) is not None:
            return Operand(operand.node, _named(operand.layout, wanted))
    plural = "queries" if role == "query" else "keys"
    near = f"{plural} that are a linear map of the layer's input, split into heads"
    raise Reject("AR307", f"the projection that makes the {plural} was not found", site.anchor, near)


def key_layout(site: Attention, *, newest: bool) -> Layout:
    """Return [B, Hkv, S, D], or of the keys that the call adds to a cache [B, Hkv, L, D]."""
    whole = site.key_layout
    return (*whole[:2], flat(site.rows), whole[3]) if newest else whole


def newest_key(site: Attention) -> Operand:
    """Return the keys that a call adds to those of a cache, as the cache takes them. Raises Reject (AR307)."""
    others = set(flat((*site.batch, *site.kv_heads, *site.inner)))
    for operand in _ancestors(site.key, flat(site.inner)):
        node = operand.node
        added: object = None
        if op(node) == "cat" and isinstance(node.args[0], list | tuple):
            added, dim = node.args[0][-1], int(argument(node, 1, "dim", 0)) % len(operand.layout)
        elif op(node) == "index_copy":
            added, dim = node.args[3], int(argument(node, 1, "dim")) % len(operand.layout)
        # The positions, or more of them: before anything is hidden, transformers cuts off what is not written yet.
        if is_node(added) and not others & set(flat(operand.layout[dim])):
            return Operand(added, (*operand.layout[:dim], flat(site.rows), *operand.layout[dim + 1 :]))
    near = "keys that are joined to those of a cache, or written into it, by position"
    raise Reject("AR307", "where the call's own keys enter the cache was not found", site.anchor, near)


def source(site: Attention) -> Operand:
    """Return what the linear map of the queries reads, ``[..., features]``, with its layout. Raises Reject (AR307)."""
    made = projection(site, "query")
    *way, linear = only_moved(made.node) or [made.node]
    read = linear.args[1 if op(linear) == "addmm" else 0]
    layout = made.layout
    try:
        for node in way:
            layout = _uncut(layout, node)
    except AxisError:
        layout = ()
    if not is_node(read) or len(shape(read)) != len(layout):
        raise Reject("AR307", "what the linear map of the queries reads was not found", site.anchor)
    return Operand(read, (*layout[:-1], (Symbol("model", shape(read)[-1]),)))


def _uncut(layout: Layout, node: fx.Node) -> Layout:
    """Return the layout of what ``node``, one of the nodes of ``only_moved``, is moved or cut from."""
    source, name = node.args[0], op(node)
    if not name or not is_node(source):  # one of several pieces
        return layout
    if name not in _PIECES | {"unbind"}:
        moved = backward(layout, node)
        return layout if moved is None else moved[1]
    at = 1 if name in ("slice", "narrow", "select", "unbind") else 2
    dim = int(argument(node, at, "dim", 0)) % len(shape(source))
    whole = layout if name not in ("select", "unbind") else (*layout[:dim], (), *layout[dim:])
    return _fresh_axis(whole, dim, source)


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
            uncut = same(shape(node)[dim], shape(node.args[0])[dim])
            return [Operand(node.args[0], layout if uncut else _fresh_axis(layout, dim, node.args[0]))]
        if node.target is operator.getitem and op(split := node.args[0]) in _SPLITS and is_node(split):
            whole = split.args[0]
            dim = int(argument(split, 2, "dim", 0)) % len(layout)
            return [Operand(whole, _fresh_axis(layout, dim, whole))] if is_node(whole) else []
        moved = backward(layout, node)
        if moved is not None:
            return [Operand(*moved)]
        if op(node) == "cat" and isinstance(node.args[0], list | tuple):
            dim = int(argument(node, 1, "dim", 0)) % len(layout)
            parts = [x for x in node.args[0] if is_node(x) and len(shape(x)) == len(layout)]
            if len(parts) == 1 == len(node.args[0]) - _empty(node.args[0]):
                return [Operand(parts[0], layout)]
            return [Operand(x, _fresh_axis(layout, dim, x)) for x in parts]
        if op(node) in _ELEMENTWISE:
            full = [x for x in node.args[:2] if is_node(x) and tensor(x) is not None and len(shape(x)) == len(layout)]
            return [Operand(x, broadcast(layout, x)) for x in full]
    except AxisError:
        return []
    return []


def _empty(parts: Sequence[object]) -> int:
    """Return how many parts are empty tensors without axes, with which key-value caches begin."""
    return sum(is_node(x) and tuple(shape(x)) == (0,) for x in parts)


def _fresh_axis(layout: Layout, dim: int, node: fx.Node) -> Layout:
    axis = (Symbol("part", shape(node)[dim]),)
    return (*layout[:dim], axis, *layout[dim + 1 :])


def _is_whole(operand: Operand, wanted: Layout) -> bool:
    """Whether every symbol of ``wanted`` is there; the feature axis may have been cut and joined on the way."""
    names = [s for dim in wanted[:3] for s in dim]
    have = symbols(operand.layout)
    rest = [s for s in have if s not in names]
    return all(s in have or same(s.size, 1) for s in names) and same(size_of(rest), size_of(wanted[3]))


def _named(layout: Layout, wanted: Layout) -> Layout:
    """Call the feature axis, which lost its name where it was cut and joined, by the name it has in ``wanted``."""
    names, inner = {s for dim in wanted[:3] for s in dim}, wanted[3]

    def name(dim: Dim) -> Dim:
        line = flat(dim)
        strange = [s for s in line if s not in names and s not in inner]
        if not strange:
            return line
        first = line.index(strange[0])
        return (*line[:first], *inner, *(s for s in line[first:] if s in names))

    return tuple(name(dim) for dim in layout)


def only_moved(node: fx.Node) -> list[fx.Node] | None:
    """Return the way from ``node`` back to the linear map whose result it is, moved or cut; None if it is more."""
    way = [node]
    for _ in range(32):
        node = way[-1]
        if op(node) in _LINEAR:
            return way
        target = getattr(node.target, "__name__", "")
        pieces = op(node) in _PIECES or target == "getitem"
        views = op(node) in _VIEWS
        if not (pieces or views) or not node.args or not is_node(node.args[0]):
            break
        way.append(node.args[0])
    return None
