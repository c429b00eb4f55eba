"""Additive masks written with arithmetic: ``(1 - mask) * lowest`` says which keys are hidden."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.passes.attention.form import NEGLIGIBLE, Leaf
from attnrewrite.passes.graph.axes import AxisError, Layout, backward
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import is_node, op, same_value, tensor

Line = Callable[[float], float]


def affine_selection(node: fx.Node, layout: Layout) -> tuple[Leaf, float] | None:
    """Read a straight line over a mask of booleans, or of integers 0 and 1, as (condition, fill).

    Integers may hold other values, so their condition is the additive value itself: visible above half of the fill.
    """
    found = _line(node, layout)
    if found is None:
        return None
    mask, inner, line = found
    zero, one = line(0.0), line(1.0)
    if _dtype(mask) == torch.bool:
        if one == 0 and zero < 0:
            return Leaf(mask, inner, True), zero
        return (Leaf(mask, inner, False), one) if zero == 0 and one < 0 else None
    low = zero if one == 0 else one if zero == 0 else 0.0
    return (Leaf(node, layout, True, threshold=NEGLIGIBLE / 2), low) if low <= NEGLIGIBLE else None


def line_over(node: object, mask: fx.Node) -> Line | None:
    """Return the straight line that ``node`` is over ``mask``, or None."""
    if same_value(node, mask):
        return lambda x: x
    source, step = _step(node) if is_node(node) else (None, None)
    line = None if source is None else line_over(source, mask)
    return None if line is None or step is None else lambda x: step(line(x))


def _line(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, Line] | None:
    """Return the mask that ``node`` is a straight line over, its layout, and the line."""
    dtype = _dtype(node)
    if dtype is None or not dtype.is_floating_point:
        return None if dtype is None else (node, layout, lambda x: x)
    try:
        moved = backward(layout, node)
    except AxisError:
        return None
    if moved is not None:
        return _line(*moved)
    source, step = _step(node)
    if source is None or len(source.meta["val"].shape) != len(layout):
        return None
    found = _line(source, layout)
    if found is None:
        return None
    mask, inner, line = found
    return mask, inner, lambda x: step(line(x))


def _step(node: fx.Node) -> tuple[fx.Node | None, Line]:
    """Return the input of one step of the line, and the step."""
    args = [x for x in node.args[:2] if is_node(x) or isinstance(x, int | float)]
    numbers = [constant(x) for x in args]
    name = op(node)
    if name in ("to", "_to_copy", "float", "type_as", "neg") and args and is_node(args[0]):
        return args[0], (lambda x: -x) if name == "neg" else (lambda x: x)
    if len(args) != 2 or numbers.count(None) != 1 or name not in _BINARY or node.kwargs:
        return None, lambda x: x
    if numbers[0] is None:
        number = numbers[1]
        return args[0] if is_node(args[0]) else None, lambda x: _BINARY[name](x, number)  # type: ignore[arg-type]  # one of them is a number
    number = numbers[0]
    return args[1] if is_node(args[1]) else None, lambda x: _BINARY[name](number, x)


_BINARY: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
}


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype
