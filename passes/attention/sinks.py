"""Sinks of one number per head: what the operators take, in place of a column that was expanded to all queries."""

from __future__ import annotations

from torch import fx

from attnrewrite.passes.attention.form import Attention, Operand
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.graph.axes import AxisError, Layout, backward, flat, same, symbols
from attnrewrite.passes.graph.nodes import is_node, op

_FILLED = {"zeros", "ones", "full"}
_FILLED |= {f"new_{name}" for name in _FILLED} | {f"{name}_like" for name in _FILLED}


def per_head(site: Attention) -> Operand | None:
    """Return a value that holds one number per head, or one for all, and its layout; None where there is none.

    Along all axes but those of heads, every index gives the same.
    """
    sink = site.scores.sink
    if sink is None:
        return None
    node, layout = _source(sink.node, sink.layout)
    read = Operand(node, layout)
    while op(node) in CASTS and is_node(node.args[0]):
        node, layout = _source(node.args[0], layout)
    heads = set(flat(site.kv_heads + site.groups))
    alike = op(node) in _FILLED or all(s in heads or same(s.size, 1) for s in symbols(layout))
    return read if alike else None


def _source(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout]:
    """Return what ``node`` is moved or expanded from, and its layout."""
    try:
        while (moved := backward(layout, node)) is not None:
            node, layout = moved
    except AxisError:
        pass
    return node, layout
