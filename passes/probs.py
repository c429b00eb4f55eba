"""From the softmax forward: follow the probabilities to their product with the values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnrewrite.passes.attention import Operand, Reject, Role
from attnrewrite.passes.axes import AxisError, Dim, Layout, forward
from attnrewrite.passes.contract import from_operand
from attnrewrite.passes.graph import argument, op
from attnrewrite.passes.scores import CONTRACTIONS, constant


@dataclass
class Mixed:
    """The product of probabilities and values: the site's output, its layout, the values, and the dropout before."""

    output: fx.Node
    layout: Layout
    value: Operand
    probs_first: bool = True
    dropout: float = 0.0


def follow_probs(start: fx.Node, layout: Layout, cols: Dim, region: dict[tuple[Role, fx.Node], Layout]) -> Mixed:
    """Follow the probabilities to the product with the values."""
    blocked: fx.Node | None = None
    region["probs", start] = layout
    for user in start.users:
        if op(user) in CONTRACTIONS:
            mixed = _mix(user, start, layout, cols)
            if mixed is not None:
                return mixed
            continue
        try:
            moved = _probs_step(user, start, layout)
            if moved is not None:
                mixed = follow_probs(user, moved, cols, region)
                mixed.dropout = max(mixed.dropout, _dropout(user))
                return mixed
        except AxisError:
            continue
        except Reject as reject:
            blocked = reject.node if reject.code == "AR203" else blocked
            continue
        if op(user) in ("mul", "masked_fill", "where", "div", "add"):
            blocked = user
    region.pop(("probs", start))
    if blocked is not None:
        raise Reject("AR203", f"{blocked.target} changes the attention weights after the softmax", blocked)
    raise Reject("AR202", "the softmax's result is not contracted with values along the same axis", start)


def _mix(user: fx.Node, node: fx.Node, layout: Layout, cols: Dim) -> Mixed | None:
    product = from_operand(user, node, layout, cols, "e")
    if product is None:
        return None
    left = Operand(product.left, product.left_layout)
    right = Operand(product.right, product.right_layout)
    first = left.node is node
    return Mixed(user, product.result, right if first else left, first)


def _probs_step(user: fx.Node, node: fx.Node, layout: Layout) -> Layout | None:
    if not user.args or user.args[0] is not node:
        return None
    return layout if op(user) == "dropout" else forward(layout, user)


def _dropout(node: fx.Node) -> float:
    if op(node) != "dropout" or argument(node, 2, "train") is False:
        return 0.0
    p = constant(argument(node, 1, "p"))
    return 1.0 if p is None else p
