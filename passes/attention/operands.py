"""From a contraction backwards: walk an operand towards its projection, and choose the value that a rewrite reads."""

from __future__ import annotations

from torch import fx

from attnrewrite.passes.attention.form import Operand, Role, Scores
from attnrewrite.passes.graph.axes import AxisError, Layout, backward, flat
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import is_node, op, shape


def peel(
    role: Role, operand: Operand, region: dict[tuple[Role, fx.Node], Layout], scores: Scores | None
) -> list[Operand]:
    """Walk from the contraction towards the projection through moves of axes and constant scales.

    Returns the values passed on the way, the contraction's operand first.
    """
    chain = [operand]
    while True:
        node, layout = chain[-1].node, chain[-1].layout
        if node.op != "call_function" or _in_place(node):
            break
        try:
            moved = backward(layout, node)
        except AxisError:
            break
        if moved is None:
            number, source = _constant_scale(node)
            if scores is None or source is None or number is None:
                break
            moved = source, layout
            scores.alpha *= number
        region[role, node] = layout
        chain.append(Operand(*moved))
    return chain


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _constant_scale(node: fx.Node) -> tuple[float | None, fx.Node | None]:
    if op(node) not in ("mul", "div") or len(node.args) < 2 or node.kwargs.get("rounding_mode"):
        return None, None
    a, b = node.args[0], node.args[1]
    if op(node) == "mul" and constant(a) is not None:
        a, b = b, a
    number = constant(b)
    if not is_node(a) or number is None or number == 0 or len(shape(a)) != len(shape(node)):
        return None, None
    return (1.0 / number if op(node) == "div" else number), a


def nearest(
    chain: list[Operand],
    want: Layout,
    *,
    fixed: dict[tuple[Role, fx.Node], Layout],
    role: Role,
    scores: Scores | None,
) -> Operand:
    """Prefer the value nearest to the contraction that already has the wanted layout and lies behind all scales."""
    chosen = chain[-1]
    for operand in reversed(chain):
        if scores is not None and _constant_scale(operand.node)[0] is not None and (role, operand.node) in fixed:
            break
        if tuple(flat(d) for d in operand.layout) == want:
            chosen = operand
    keep = chain[: chain.index(chosen)]
    for operand in chain:
        if operand not in keep:
            fixed.pop((role, operand.node), None)
    return chosen
