"""The state of the way back from a softmax to its product, and whether there is a product on it at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, is_product
from attnrewrite.passes.attention.form import Role, Sink
from attnrewrite.passes.attention.normal_form import Step
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.graph.axes import MOVES, Dim, Layout
from attnrewrite.passes.graph.nodes import is_node, op
from attnrewrite.passes.matching.joins import Block

LOST = "axes cannot be followed between the scores and the softmax"
NO_PRODUCT = "the softmax is not fed by a contraction of two activations"


@dataclass(eq=False, repr=False)
class Walk:
    """The path from the softmax to the contraction.

    ``cols`` is the key axis where the walk stands: it becomes shorter where a sink column is cut off. ``rigid`` says
    that what was passed does not commute with adding the same number for all keys. ``shifts`` are such numbers.
    ``blocks`` are the products of two blocks of keys whose scores are joined; ``anchor`` is the softmax.
    """

    cols: Dim
    steps: list[Step] = field(default_factory=list)
    region: dict[tuple[Role, fx.Node], Layout] = field(default_factory=dict)
    contraction: fx.Node | None = None
    layout: Layout = ()
    sink: Sink | None = None
    rigid: bool = False
    shifts: list[tuple[fx.Node, Layout]] = field(default_factory=list)
    blocks: tuple[Block, Block] | None = None
    anchor: fx.Node | None = None


_BINARY = {"add": (0, 1), "sub": (0, 1), "mul": (0, 1), "maximum": (0, 1), "where": (1, 2)}
_UNARY = {"div", "tanh", "masked_fill", "expand", "alias", "clamp", "clamp_min", "max"} | MOVES | CASTS


def reaches_contraction(node: Any, depth: int = 32) -> bool:
    """Whether walking back from ``node`` along score-like operations arrives at a contraction of two activations."""
    while is_node(node) and depth:
        depth -= 1
        name = op(node)
        if name in CONTRACTIONS:
            return is_product(node)
        if name in _BINARY:
            return any(reaches_contraction(node.args[i], depth) for i in _BINARY[name])
        if name == "cat" and isinstance(node.args[0], list | tuple):
            return any(reaches_contraction(part, depth) for part in node.args[0])
        if name not in _UNARY:
            return False
        node = node.args[0] if node.args else None
    return False
