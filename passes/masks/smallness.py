"""Whether a bias may hide keys, as a mask does, or only shifts scores among visible ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, is_product
from attnrewrite.passes.attention.form import NEGLIGIBLE
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.graph.axes import MOVES
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import is_node, op, tensor

_PICKED = MOVES | CASTS | {"gather", "index_select", "contiguous", "detach"}
_ROWS_OF = {"embedding", "index", "gather", "index_select"}
StaticValue = Callable[[fx.Node], torch.Tensor | None]


def is_small(
    node: fx.Node,
    weight: float,
    value_of: StaticValue,
    is_learned: Callable[[fx.Node], bool] = lambda node: False,
    depth: int = 24,
) -> bool:
    """Whether no entry of ``weight * node`` is so low that it hides a key.

    Known values are looked at. Products of computed values, such as queries times positions, count as the scores
    themselves do, which are such a product; so do sums of them, parts of them, and multiples by known numbers. So does
    what ``is_learned`` says of a parameter.
    """
    if depth == 0:
        return False
    if is_learned(node):
        return True

    def inner(x: fx.Node) -> bool:
        return is_small(x, weight, value_of, is_learned, depth - 1)

    value = value_of(node)
    if value is not None:
        return bool((value * weight > NEGLIGIBLE).all())
    if op(node) in CONTRACTIONS:
        return op(node) != "baddbmm" and is_product(node)
    if op(node) in _PICKED | _ROWS_OF and is_node(node.args[0]):
        return inner(node.args[0])
    if op(node) in ("add", "sub") and not node.kwargs:
        return all(inner(x) for x in node.args[:2] if is_node(x))
    if op(node) in ("mul", "div") and not node.kwargs and is_node(node.args[0]) and tensor(node.args[0]) is not None:
        return _is_ordinary(node.args[1]) and inner(node.args[0])
    return False


def _is_ordinary(factor: object) -> bool:
    """Whether a factor is a known number that leaves the order of magnitude."""
    number = constant(factor)
    return number is not None and 1e-4 < abs(number) < 1e4
