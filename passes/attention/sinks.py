"""Sinks of one number per head: what the operators take, in place of a column that was expanded to all queries."""

from __future__ import annotations

from torch import fx

from attnrewrite.passes.attention.form import Attention, Operand
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.graph.axes import AxisError, Layout, backward, flat, same, symbols
from attnrewrite.passes.graph.nodes import is_node, op, tensor

_FILLED = {f"{prefix}{name}" for name in ("zeros", "ones", "full") for prefix in ("", "new_")} | {
    f"{name}_like" for name in ("zeros", "ones", "full")
}


def per_head(site: Attention) -> Operand | None:
    """Return the value that holds one number per head, or one for all, and its layout; None where there is none.

    Axes that are no heads have the layout ``()``: every index along them gives the same.
    """
    sink = site.scores.sink
    if sink is None:
        return None
    node, layout = sink.node, sink.layout
    while (moved := _before(node, layout)) is not None:
        node, layout = moved
    heads = set(flat(site.kv_heads + site.groups))
    if op(node) in _FILLED:
        return Operand(node, tuple(() for _ in layout))
    if any(s not in heads and not same(s.size, 1) for s in symbols(layout)):
        return None
    return Operand(node, tuple(tuple(s for s in flat(dim) if s in heads) for dim in layout))


def _before(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """Step back through a move of axes, or through a cast between floats: operators compute in their own precision."""
    try:
        moved = backward(layout, node)
    except AxisError:
        return None
    if moved is None and op(node) in CASTS and is_node(node.args[0]) and _is_float(node) and _is_float(node.args[0]):
        return node.args[0], layout
    return moved


def _is_float(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype.is_floating_point
