"""Keys and values in two blocks: scores that are joined before the softmax, weights that are cut apart behind it.

``softmax(cat(q·k1, q·k2))``, whose parts multiply values of their own and are added, is attention over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attnrewrite.passes.attention.contract import Contraction, from_result
from attnrewrite.passes.attention.form import Join, Operand, Reject, Role, Scores
from attnrewrite.passes.attention.operands import peel
from attnrewrite.passes.graph.axes import Dim, Layout, Symbol, flat, flat_layout, same, symbols
from attnrewrite.passes.graph.nodes import argument, op, same_value, shape

NEAREST = "products of one query with two blocks of keys, joined: softmax(cat([query @ key1.mT, query @ key2.mT], -1))"


@dataclass(eq=False, repr=False)
class Block:
    """A product of queries with one block of keys, the layout of its result, and its part of the key axis."""

    product: fx.Node
    layout: Layout
    cols: Dim


def query_and_key(product: Contraction, cols: Dim) -> tuple[Operand, Operand]:
    """Tell the two operands apart: the keys have the softmax's axis. Raises Reject."""
    left, right = Operand(product.left, product.left_layout), Operand(product.right, product.right_layout)
    in_left, in_right = (set(flat(cols)) & set(symbols(o.layout)) for o in (left, right))
    if bool(in_left) == bool(in_right):
        raise Reject("AR203", "the softmax axis does not belong to one operand of the product")
    return (left, right) if in_right else (right, left)


def second_keys(
    second: Block, query: Operand, inner: Dim, first: bool, region: dict[tuple[Role, fx.Node], Layout], scores: Scores
) -> list[Operand]:
    """Return the way of the second block's keys, which meet the same ``query`` along ``inner``. Raises Reject.

    ``scores.alpha`` is what the first block's keys are scaled by; ``first`` whether the query stands first there.
    """
    product = from_result(second.product, second.layout, "d")
    twin, key = query_and_key(product, second.cols)
    twin, key = (Operand(x.node, renamed(x.layout, product.summed, inner)) for x in (twin, key))
    alike = same_value(twin.node, query.node) and flat_layout(twin.layout) == flat_layout(query.layout)
    if not alike or (product.left is twin.node) != first:
        raise Reject("AR203", "the joined scores come from different queries", second.product, NEAREST)
    own, scaled = dict[tuple[Role, fx.Node], Layout](), Scores(second.product)
    chain = peel("key", key, own, scaled)
    if scaled.alpha != scores.alpha:
        raise Reject("AR203", "the joined scores are scaled differently", second.product, NEAREST)
    if own.keys() & region.keys() or any(("key", x.node) in region for x in chain):
        raise Reject("AR203", "the joined scores come from the same keys", second.product, NEAREST)
    region |= own
    return chain


def key_join(blocks: tuple[Block, Block] | None, ways: list[list[Operand]]) -> Join | None:
    """Return the keys of two blocks."""
    if blocks is None:
        return None
    first, second = blocks
    return Join((first.product, second.product), (ways[0][-1], ways[1][-1]), (first.cols, second.cols))


def chosen(join: Join | None, operands: list[Operand]) -> Join | None:
    """Let a join read ``operands``."""
    return None if join is None else replace(join, operands=(operands[0], operands[1]))


def both(first: list[Operand], second: list[Operand]) -> list[Operand]:
    """Return two ways as one whose end has the symbols of both."""
    last = Operand(second[-1].node, first[-1].layout + second[-1].layout)
    return [*first, *second, last]


def renamed(layout: Layout, old: Dim, new: Dim) -> Layout:
    """Put ``new`` in the place of the one symbol ``old``."""
    return tuple(new if dim == old else dim for dim in layout)


def cut(node: fx.Node, layout: Layout, cols: Dim, parts: tuple[Dim, Dim] | None) -> list[tuple[fx.Node, Layout]]:
    """Return the two parts into which users of ``node`` cut its axis ``cols``, or nothing.

    ``parts`` are their axes, where they are known; both together are the whole.
    """
    places = [n for n, dim in enumerate(layout) if flat(dim) == flat(cols)]
    found = _cuts(node, places[0]) if len(places) == 1 else []
    if len(found) != 2:
        return []
    dim = places[0]
    sizes = [shape(part)[dim] for part in found]
    parts = parts or ((Symbol("j", sizes[0]),), (Symbol("j", sizes[1]),))
    fits = all(same(part[0].size, size) for part, size in zip(parts, sizes, strict=True))
    if not fits or not same(sizes[0] + sizes[1], shape(node)[dim]):
        return []
    return [(x, (*layout[:dim], part, *layout[dim + 1 :])) for x, part in zip(found, parts, strict=True)]


def _cuts(node: fx.Node, dim: int) -> list[fx.Node]:
    """Return what begins at the start of an axis, and what runs on to its end, where two users do so."""
    rank = len(shape(node))
    slices = [u for u in node.users if op(u) == "slice" and int(argument(u, 1, "dim", 0)) % rank == dim]
    slices = [u for u in slices if argument(u, 4, "step", 1) == 1 and not same(shape(u)[dim], shape(node)[dim])]
    if len(slices) == 2:
        ahead = [u for u in slices if same(argument(u, 2, "start", 0) or 0, 0)]
        behind = [u for u in slices if u not in ahead and _to_the_end(u, node, dim)]
        return [*ahead, *behind]
    splits = [u for u in node.users if op(u) in ("split", "split_with_sizes", "chunk")]
    splits = [u for u in splits if int(argument(u, 2, "dim", 0)) % rank == dim]
    items = sorted(splits[0].users, key=lambda u: int(u.args[1])) if len(splits) == 1 else []  # type: ignore[arg-type]  # a getitem
    return items if [u.args[1] for u in items] == [0, 1] else []


def _to_the_end(part: fx.Node, node: fx.Node, dim: int) -> bool:
    start, size, whole = argument(part, 2, "start", 0), shape(part)[dim], shape(node)[dim]
    if isinstance(start, fx.Node):
        start = start.meta.get("val")
    if isinstance(start, int) and start < 0:
        return same(size, -start)
    return start is not None and same(start + size, whole)


def added(first: fx.Node, second: fx.Node) -> fx.Node | None:
    """Return the sum of two values, where it is all that becomes of them."""
    users = list(first.users)
    plain = len(users) == 1 and list(second.users) == users and op(users[0]) == "add" and not users[0].kwargs
    return users[0] if plain and set(users[0].args) == {first, second} else None
