"""Packed documents: a mask that transformers builds from position ids, read by its meaning.

With positions p, document numbers are ``doc = cumsum(diff(p) != 1)`` and a key is visible iff ``doc_j == doc_i`` and
``p_j <= p_i``. Within one document positions rise by one, so there ``p_j <= p_i`` says ``j <= i``, whatever the data:
the pair means "causal, within the document", and ``p_j > p_i - W`` beside it says that the window is W. So does, beside
a causal mask, ``number_j == number_i`` for whole numbers: which tokens share a document is then all that it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx

from attnrewrite.passes.attention.form import Leaf
from attnrewrite.passes.graph.axes import Dim, broadcast, flat, symbols
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import argument, is_node, op, tensor

IsRange = Callable[[fx.Node], bool]


class Packed(NamedTuple):
    """Same-document conditions, the narrowest window beside them, and all other conditions."""

    documents: list[Leaf]
    window: int | None
    rest: list[Leaf]


def split_documents(dense: list[Leaf], rows: Dim, cols: Dim, is_range: IsRange) -> Packed | None:
    """Take the document pair, and windows that are counted as it is, out of ``dense``; None where there is no pair."""
    orders = {leaf: found for leaf in dense if (found := _order(leaf, rows, cols, is_range)) is not None}
    same = {leaf: found for leaf in dense if (found := _same(leaf, rows, cols, is_range)) is not None}
    positions = set(orders.values()) & set(same.values())
    if not positions:
        return None
    documents = [leaf for leaf, source in same.items() if source in positions]
    implied = [leaf for leaf, source in orders.items() if source in positions]
    counted = {leaf: width for leaf in dense if (width := _window(leaf, rows, cols, is_range)) is not None}
    windows = {leaf: width for leaf, (source, width) in counted.items() if source in positions}
    rest = [leaf for leaf in dense if leaf not in documents + implied and leaf not in windows]
    return Packed(documents, min(windows.values(), default=None), rest)


def same_number(leaf: Leaf, heads: Dim, rows: Dim, cols: Dim, is_range: IsRange) -> bool:
    """Whether the leaf says that query and key have one whole number in common, the same for all heads."""
    if op(leaf.node) != "eq" or not leaf.polarity or set(flat(heads)) & set(symbols(leaf.layout)):
        return False
    numbers = _either_way(leaf, rows, cols, is_range)
    return numbers is not None and _is_whole(numbers)


def from_positions(leaf: Leaf) -> bool:
    """Whether the documents of a condition are counted from position ids, which ordinary sequences have, too."""
    numbers = _plain(leaf.node.args[0])
    while numbers is not None and op(numbers) == "index":
        numbers = _plain(numbers.args[0])
    return numbers is not None and op(numbers) == "cumsum"


def _order(leaf: Leaf, rows: Dim, cols: Dim, is_range: IsRange) -> fx.Node | None:
    """Return p where the leaf says ``p_j <= p_i``."""
    sides = {"le": (cols, rows), "ge": (rows, cols)}.get(op(leaf.node))
    return None if sides is None or not leaf.polarity else _pair(leaf, leaf.node.args[:2], sides, is_range)


def _window(leaf: Leaf, rows: Dim, cols: Dim, is_range: IsRange) -> tuple[fx.Node, int] | None:
    """Return (p, W) where the leaf says ``p_j > p_i - W``."""
    if op(leaf.node) != "gt" or not leaf.polarity:
        return None
    key, limit = leaf.node.args[:2]
    if not is_node(limit) or op(limit) != "sub" or constant(limit.kwargs.get("alpha", 1)) != 1:
        return None
    width = constant(limit.args[1])
    if width is None or width < 1 or width != int(width):
        return None
    source = _pair(leaf, (key, limit.args[0]), (cols, rows), is_range)
    return None if source is None else (source, int(width))


def _same(leaf: Leaf, rows: Dim, cols: Dim, is_range: IsRange) -> fx.Node | None:
    """Return p where the leaf says ``doc_j == doc_i`` with documents counted from p."""
    if op(leaf.node) != "eq" or not leaf.polarity:
        return None
    numbers = _either_way(leaf, rows, cols, is_range)
    if numbers is None or op(numbers) != "cumsum" or constant(argument(numbers, 1, "dim")) not in (-1.0, 1.0):
        return None
    breaks = _plain(numbers.args[0])
    if breaks is None or op(breaks) != "ne" or constant(breaks.args[1]) != 1:
        return None
    steps = _plain(breaks.args[0])
    if steps is None or op(steps) != "diff" or constant(argument(steps, 1, "n", 1)) != 1:
        return None
    return _plain(steps.args[0])


def _either_way(leaf: Leaf, rows: Dim, cols: Dim, is_range: IsRange) -> fx.Node | None:
    """Return the value that a condition's operands read, one along the rows and the other along the columns."""
    operands = leaf.node.args[:2]
    return _pair(leaf, operands, (rows, cols), is_range) or _pair(leaf, operands, (cols, rows), is_range)


def _pair(leaf: Leaf, operands: Sequence[Any], sides: tuple[Dim, Dim], is_range: IsRange) -> fx.Node | None:
    """Return the value that both operands read, the first along ``sides[0]`` and the second along ``sides[1]``."""
    found = []
    for operand, side in zip(operands, sides, strict=True):
        if not is_node(operand):
            return None
        layout = broadcast(leaf.layout, operand)
        other = sides[0] if side is sides[1] else sides[1]
        if not set(flat(side)) <= set(symbols(layout)) or set(flat(other)) & set(symbols(layout)):
            return None
        found.append(_gathered(operand, is_range))
    return found[0] if found[0] is not None and found[0] is found[1] else None


def _gathered(node: fx.Node, is_range: IsRange) -> fx.Node | None:
    """Return the value [B, N] that ``node`` reads in order, through views or an index with ranges."""
    inner = _plain(node)
    if inner is None or op(inner) != "index" or not isinstance(inner.args[1], list | tuple):
        return inner
    whole = len(inner.args[1]) == 2 and all(is_node(index) and is_range(index) for index in inner.args[1])
    return _plain(inner.args[0]) if whole else None


def _plain(node: object) -> fx.Node | None:
    """Step through broadcasts and casts."""
    while is_node(node) and op(node) in ("expand", "to", "_to_copy", "alias", "clone", "contiguous", "unsqueeze"):
        node = node.args[0]
    return node if is_node(node) else None


def _is_whole(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and not value.dtype.is_floating_point and not value.dtype.is_complex
