"""Contractions on named axes: matmul, bmm, baddbmm, mm and einsum are one thing, a sum over a shared symbol."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnrewrite.passes.attention.form import Reject
from attnrewrite.passes.graph.axes import AxisError, Dim, Layout, Symbol, broadcast, flat, same
from attnrewrite.passes.graph.nodes import is_node, is_weight, op, shape

CONTRACTIONS = {"matmul", "bmm", "baddbmm", "mm", "einsum"}


@dataclass(eq=False, repr=False)
class Contraction:
    """``left`` and ``right`` operands with their layouts; ``summed`` is the symbol that the product removes."""

    left: fx.Node
    left_layout: Layout
    right: fx.Node
    right_layout: Layout
    summed: Dim
    result: Layout


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the two tensors that a contraction multiplies. Raises Reject."""
    args: Sequence[object] = node.args
    if op(node) == "einsum":
        args = node.args[1] if isinstance(node.args[1], list | tuple) else ()
    if op(node) == "baddbmm":
        args = node.args[1:3]
    found = [arg for arg in args if is_node(arg)][:2]
    if len(found) != 2:
        raise Reject("AR203", "a contraction of other than two tensors", node)
    return found[0], found[1]


def is_product(node: fx.Node) -> bool:
    """Whether a contraction multiplies two computed values (not a value and a weight of the model)."""
    try:
        pair = operands(node)
    except Reject:
        return False
    return not any(is_weight(x) for x in pair)


def from_result(node: fx.Node, layout: Layout, name: str) -> Contraction:
    """Name the operands' axes, given the result's: the query-key product, read backwards."""
    left, right = operands(node)
    if op(node) == "einsum":
        first, second, result = _equation(node)
        known = dict(zip(result, layout, strict=True))
        summed = [x for x in first if x in second and x not in result]
        if len(summed) != 1 or set(first + second) - set(result) != set(summed):
            raise Reject("AR203", "an einsum that sums over other than one shared axis", node)
        inner = (Symbol(name, shape(left)[first.index(summed[0])]),)
        known[summed[0]] = inner
        return Contraction(left, _letters(first, known), right, _letters(second, known), inner, layout)
    if len(shape(left)) < 2 or len(shape(right)) < 2:
        raise Reject("AR203", "a contraction with a vector", node)
    inner = (Symbol(name, shape(left)[-1]),)
    whole_left, whole_right = (*layout[:-1], inner), (*layout[:-2], inner, layout[-1])
    return Contraction(left, _tail(whole_left, left), right, _tail(whole_right, right), inner, layout)


def from_operand(node: fx.Node, operand: fx.Node, layout: Layout, cols: Dim, name: str) -> Contraction | None:
    """Name the axes of a product that removes ``cols`` from ``operand``: probabilities times values.

    Returns None where the product does not remove exactly that axis.
    """
    left, right = operands(node)
    first = left is operand
    other = right if first else left
    if op(node) == "baddbmm" or (left is right):
        return None
    if op(node) == "einsum":
        return _einsum_from_operand(node, first, layout, cols, name)
    if len(shape(other)) < 2 or len(shape(operand)) < 2:
        return None
    axis = len(layout) - (1 if first else 2)
    if layout[axis] == () or flat(layout[axis]) != flat(cols):
        return None
    outer = (Symbol(name, shape(other)[-1 if first else -2]),)
    rows = layout[-2] if first else layout[-1]
    batch = layout[:-2]
    if len(shape(other)) > len(layout):
        return None
    for have, n in zip(reversed(batch), reversed(shape(other)[:-2]), strict=False):
        if have == () and not same(n, 1):
            return None
    value = (*batch, tuple(cols), outer) if first else (*batch, outer, tuple(cols))
    result = (*batch, rows, outer) if first else (*batch, outer, rows)
    pair = ((left, layout), (right, _tail(value, other))) if first else ((left, _tail(value, other)), (right, layout))
    return Contraction(*pair[0], *pair[1], tuple(cols), result)


def _einsum_from_operand(node: fx.Node, first: bool, layout: Layout, cols: Dim, name: str) -> Contraction | None:
    left, right = operands(node)
    a, b, result = _equation(node)
    mine, theirs = (a, b) if first else (b, a)
    known = dict(zip(mine, layout, strict=True))
    summed = [x for x in mine if x not in result]
    if len(summed) != 1 or flat(known[summed[0]]) != flat(cols) or summed[0] not in theirs:
        return None
    new = [x for x in theirs if x not in known]
    if len(new) != 1 or new[0] not in result:
        return None
    other = right if first else left
    known[new[0]] = (Symbol(name, shape(other)[theirs.index(new[0])]),)
    return Contraction(left, _letters(a, known), right, _letters(b, known), tuple(cols), _letters(result, known))


def _tail(layout: Layout, operand: fx.Node) -> Layout:
    try:
        return broadcast(layout, operand)
    except (AxisError, ValueError):
        raise Reject("AR203", "a contraction whose operands have more axes than its result", operand) from None


def _letters(term: str, known: dict[str, Dim]) -> Layout:
    return tuple(known[x] for x in term)


def _equation(node: fx.Node) -> tuple[str, str, str]:
    """Return the letters of both operands and of the result, an ellipsis written out."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    first, comma, second = inputs.partition(",")
    if comma and arrow and "," not in second:
        terms = _without_ellipsis((first, second, result), operands(node))
        if all(len(set(term)) == len(term) for term in terms):
            return terms
    raise Reject("AR203", f"einsum equation {equation!r}", node)


def _without_ellipsis(terms: tuple[str, str, str], pair: tuple[fx.Node, fx.Node]) -> tuple[str, str, str]:
    used = set("".join(terms))
    spare = "".join(x for x in string.ascii_letters if x not in used)
    counts = [len(shape(x)) - len(term.replace("...", "")) for term, x in zip(terms[:2], pair, strict=True)]
    widest = max(n if "..." in term else 0 for n, term in zip(counts, terms[:2], strict=True))
    first, second = (
        term.replace("...", spare[widest - n : widest] if n else "") for n, term in zip(counts, terms[:2], strict=True)
    )
    return first, second, terms[2].replace("...", spare[:widest])
