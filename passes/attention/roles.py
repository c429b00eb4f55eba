"""Tell the axes of a site apart: batch, key-value heads, groups of query heads, rows, columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from attnrewrite.passes.attention.form import Operand, Role
from attnrewrite.passes.graph.axes import (
    AxisError,
    Dim,
    Layout,
    Symbol,
    backward,
    flat,
    forward,
    same,
    size_of,
    symbols,
)
from attnrewrite.passes.graph.nodes import shape, tensor


@dataclass(eq=False, repr=False)
class Roles:
    """The axes of a site by their meaning; see ``Attention``."""

    batch: Dim
    kv_heads: Dim
    groups: Dim
    rows: Dim
    cols: Dim
    inner: Dim
    outer: Dim


def tell_roles(
    chains: Mapping[Role, list[Operand]],
    inner: Dim,
    outer: Dim,
    cols: Dim,
    score_layout: Layout,
    output: fx.Node,
    output_layout: Layout,
) -> Roles:
    """Tell batch, heads, groups and rows apart.

    Heads are the symbols that lie beside the head dim in the projections: folded with it in the output's way to the
    output projection, or in the query's way from its projection. What shares the second of four axes with them are
    heads, too.
    """
    heads = set(_heads_ahead(output, output_layout, outer))
    heads |= _beside(chains["query"], inner) | _beside(chains["value"], outer)
    heads = heads or _heads_behind(chains["query"][-1], inner)
    heads -= set(flat(cols)) | set(flat(inner)) | set(flat(outer))
    second = set(flat(score_layout[1])) if len(score_layout) == 4 else set()
    heads |= second if second & heads else set()
    every = [s for s in symbols(score_layout) if s not in set(flat(cols))]
    in_query = set(symbols(chains["query"][-1].layout))
    in_key, in_value = (set(symbols(chains[x][-1].layout)) for x in ("key", "value"))
    if not heads and len(score_layout) == 4 and len(flat(score_layout[1])) and score_layout[1] != cols:
        heads = {s for s in flat(score_layout[1]) if s in in_key and s in in_value}
    only_query = [s for s in every if s in in_query and s not in in_key and s not in in_value]
    rows = tuple(s for s in only_query if s not in heads)
    kv = tuple(s for s in every if s in heads and s in in_key | in_value)
    groups = tuple(s for s in every if s in heads and s not in in_key | in_value)
    batch = tuple(s for s in every if s not in set(rows) | heads)
    return Roles(batch, kv, groups, rows, flat(cols), flat(inner), flat(outer))


def _beside(chain: list[Operand], inner: Dim) -> set[Symbol]:
    found: set[Symbol] = set()
    for operand in chain:
        for dim in operand.layout:
            line = flat(dim)
            if len(line) > 1 and set(flat(inner)) & set(line):
                found |= set(line) - set(flat(inner))
    return found


def _heads_ahead(node: fx.Node, layout: Layout, outer: Dim, depth: int = 8) -> set[Symbol]:
    """Follow the output through moves of axes until heads and value dim are folded into one."""
    folded = _beside([Operand(node, layout)], outer)
    if folded or depth == 0:
        return folded
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        try:
            moved = forward(layout, user)
        except AxisError:
            continue
        if moved is not None:
            found = _heads_ahead(user, moved, outer, depth - 1)
            if found:
                return found
    return set()


def _heads_behind(operand: Operand, inner: Dim, reach: int = 40) -> set[Symbol]:
    """Follow the query back to its projection, through norms, rotary embedding and joins along the head dim.

    All of these keep the other axes. The head dim itself is named anew, as it may be cut on the way.
    """
    start = _renamed(operand.layout, flat(inner), operand.node)
    todo, seen = [(operand.node, *start)] if start else [], set[fx.Node]()
    while todo and len(seen) < reach:
        node, layout, width = todo.pop(0)
        folded = _beside([Operand(node, layout)], width)
        if folded or node in seen:
            return folded
        seen.add(node)
        try:
            moved = backward(layout, node)
        except AxisError:  # such as a slice of the head dim
            moved = None
        if moved is not None:
            todo.append((*moved, width))
        else:
            todo += [(x, *kept) for x in _sources(node) if (kept := _renamed(layout, width, x)) is not None]
    return set()


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that ``node`` reads; of a part of a split, the whole."""
    read = node.all_input_nodes
    if read and tensor(node) is not None and tensor(read[0]) is None:
        read = read[0].all_input_nodes
    return [x for x in read if tensor(x) is not None]


def _renamed(layout: Layout, width: Dim, node: fx.Node) -> tuple[Layout, Dim] | None:
    """Return the layout of ``node`` if it differs from ``layout`` in the size of the head dim alone."""
    dims = [flat(dim) for dim in layout]
    if width not in dims or len(shape(node)) != len(dims):
        return None
    place = dims.index(width)
    if any(n != place and not same(size_of(dim), shape(node)[n]) for n, dim in enumerate(dims)):
        return None
    new = (Symbol("d", shape(node)[place]),)
    return (*layout[:place], new, *layout[place + 1 :]), new
