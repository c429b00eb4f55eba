"""Why scores or weights are not one head's own: a linear map mixes heads, or another axis than the keys is summed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, Contraction, from_result, is_product, operands
from attnrewrite.passes.attention.form import Reject
from attnrewrite.passes.graph.axes import AxisError, Dim, Layout, Symbol, flat, forward, symbols
from attnrewrite.passes.graph.nodes import is_node, is_weight, op, shape, tensor

NEAREST = "heads that attend by themselves: softmax(query @ key.mT) @ value in each, mixed before or after all of it"
_ELEMENTWISE = {"add", "sub", "mul", "div", "masked_fill", "where", "detach", "to", "_to_copy", "clamp", "dropout"}
_LINEAR = {"linear", "conv2d", "convolution"}
_REACH = 40


@dataclass(eq=False, repr=False)
class Mapped:
    """The value that a linear map reads, its layout, and the dim that is mixed."""

    node: fx.Node
    layout: Layout
    axis: int


def source_of_map(node: fx.Node, layout: Layout) -> Mapped | None:
    """If ``node`` is a product with a weight, return what it maps."""
    source = node.args[0] if node.args else None
    if op(node) in _LINEAR and is_node(source) and is_weight(node.args[1]):  # type: ignore[arg-type]  # a tensor by schema
        place = _mapped(node)
        if place is None or len(shape(source)) != len(layout):
            return None
        axis = (Symbol("h", shape(source)[place]),)
        return Mapped(source, (*layout[:place], axis, *layout[place + 1 :]), place)
    if op(node) not in CONTRACTIONS or is_product(node):
        return None
    product = from_result(node, layout, "h")
    source, where = product.left, product.left_layout
    if is_weight(source):
        source, where = product.right, product.right_layout
    return Mapped(source, where, where.index(product.summed)) if product.summed in where else None


def _mapped(node: fx.Node) -> int | None:
    """Return the dim across which a linear map or a convolution of one point mixes."""
    if op(node) == "linear":
        return len(shape(node)) - 1
    return 1 if all(n == 1 for n in shape(node.args[1])[2:]) else None  # type: ignore[arg-type]  # a tensor by schema


def is_heads(axis: Dim, product: Contraction) -> bool:
    """Whether ``axis`` counts independent products: both operands have it."""
    inside = set(flat(axis))
    return bool(inside) and inside <= set(symbols(product.left_layout)) & set(symbols(product.right_layout))


def mixed_behind(user: fx.Node, node: fx.Node, layout: Layout) -> Dim | None:
    """Return the axis of ``node`` across which ``user`` mixes, if it is a product with a weight."""
    if op(user) in _LINEAR and user.args[0] is node:
        place = _mapped(user)
        return None if place is None else layout[place]
    if op(user) in CONTRACTIONS and not is_product(user):
        return _summed(user, node, layout)
    return None


def _summed(product: fx.Node, node: fx.Node, layout: Layout) -> Dim | None:
    """Return the axis of ``node`` that a contraction removes."""
    try:
        left, _ = operands(product)
        if op(product) == "einsum":
            terms, result = str(product.args[0]).replace(" ", "").split("->")
            mine = terms.split(",")[0 if left is node else 1]
            gone = [layout[n] for n, letter in enumerate(mine) if letter not in result and "." not in mine]
            return gone[0] if len(gone) == 1 else None
    except (Reject, ValueError):
        return None
    return layout[-1] if left is node else layout[-2]


def other_axis(node: fx.Node, layout: Layout, cols: Dim) -> fx.Node | None:
    """Return a product with values that sums the softmax's result over another axis than the softmax ran over."""
    todo, seen = [(node, layout)], {node}
    while todo and len(seen) < _REACH:
        here, axes = todo.pop(0)
        for user in here.users:
            if op(user) in CONTRACTIONS and is_product(user):
                summed = _summed(user, here, axes)
                if summed and flat(summed) != flat(cols):
                    return user
            kept = axes if op(user) in _ELEMENTWISE and _alike(user, here) else _moved(user, here, axes)
            if kept is not None and user not in seen:
                seen.add(user)
                todo.append((user, kept))
    return None


def _alike(user: fx.Node, node: fx.Node) -> bool:
    return tensor(user) is not None and shape(user) == shape(node)


def _moved(user: fx.Node, node: fx.Node, layout: Layout) -> Layout | None:
    try:
        return forward(layout, user) if user.args and user.args[0] is node else None
    except AxisError:
        return None
