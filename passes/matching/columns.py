"""Scores that are joined along the keys: a sink column, or the scores of two blocks of keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS
from attnrewrite.passes.attention.form import Reject, Sink
from attnrewrite.passes.attention.normal_form import Step
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.graph.axes import ALIASES, MOVES, Layout, Symbol, broadcast, flat, same
from attnrewrite.passes.graph.nodes import argument, is_node, op, shape, tensor
from attnrewrite.passes.matching.joins import NEAREST, Block
from attnrewrite.passes.matching.walk import NO_PRODUCT, Walk, reaches_contraction

MORE_DONE = "several score matrices are joined, and more is done to one of them than to the other"
GoOn = Callable[[fx.Node, Layout, Walk], None]


def _alike(first: fx.Node, second: fx.Node) -> bool:
    a, b = tensor(first), tensor(second)
    return a is not None and b is not None and a.dtype == b.dtype


def _is_scaled_product(node: Any) -> bool:
    """Whether ``node`` is a product, moved or scaled; of its operands, one may be learned."""
    while op(node) in MOVES | CASTS | {"mul", "div"} and is_node(node.args[0]):
        node = node.args[0]
    return op(node) in CONTRACTIONS


def _cut_once(softmax: fx.Node) -> bool:
    """Whether one part is cut out of the weights, and not two."""
    node = softmax
    while len(node.users) == 1 and op(next(iter(node.users))) in CASTS | ALIASES | {"dropout"}:
        node = next(iter(node.users))
    return sum(op(user) == "slice" for user in node.users) == 1


def join(node: fx.Node, layout: Layout, walk: Walk, go_on: GoOn) -> bool:
    """Read the scores of two blocks of keys that are joined along the key axis. Raises Reject."""
    parts, dim = list(node.args[0]), int(argument(node, 1, "dim", 0)) % len(layout)  # type: ignore[arg-type]  # tensors and an int by schema
    products = len(parts) == 2 and all(map(_is_scaled_product, parts)) and any(map(reaches_contraction, parts))
    if not products or flat(layout[dim]) != flat(walk.cols):
        return False
    if any(same(shape(part)[dim], 1) for part in parts) and walk.anchor is not None and _cut_once(walk.anchor):
        return False  # a sink that is computed: its weight is dropped
    ways = [Walk((Symbol("j", shape(part)[dim]),), rigid=True) for part in parts]
    for part, way in zip(parts, ways, strict=True):
        go_on(part, (*layout[:dim], way.cols, *layout[dim + 1 :]), way)
    first, second = ways
    numbers = [math.prod(step.number for step in way.steps) for way in ways]
    plain = all(step.kind == "scale" for way in ways for step in way.steps) and not (first.blocks or second.blocks)
    if not plain or first.sink or second.sink or numbers[0] != numbers[1] or first.region.keys() & second.region.keys():
        raise Reject("AR203", MORE_DONE, node, NEAREST)
    if len(flat(walk.cols)) != 1 or not _alike(*parts):
        detail = "several score matrices are joined that differ in dtype, or whose axis is cut elsewhere"
        raise Reject("AR203", detail, node, NEAREST)
    walk.region |= first.region | second.region
    walk.steps += [Step("scale", number=numbers[0])] if numbers[0] != 1 else []
    walk.contraction, walk.layout = first.contraction, layout
    assert first.contraction is not None and second.contraction is not None
    walk.blocks = (
        Block(first.contraction, first.layout, first.cols),
        Block(second.contraction, second.layout, second.cols),
    )
    return True


def sink(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    """Cut off a sink: one further column of scores, which takes weight and gives no value."""
    parts, dim = list(node.args[0]), int(argument(node, 1, "dim", 0)) % len(layout)  # type: ignore[arg-type]  # tensors and an int by schema
    wide = layout[dim]
    reached = [reaches_contraction(part) for part in parts]
    if sum(reached) != 1:
        raise Reject("AR203" if any(reached) else "AR202", MORE_DONE if any(reached) else NO_PRODUCT, node, NEAREST)
    scores = parts[reached.index(True)]
    others = [part for part in parts if part is not scores]
    if any(_is_scaled_product(part) and not same(shape(part)[dim], 1) for part in others):
        raise Reject("AR203", MORE_DONE, node, NEAREST)
    if len(others) != 1 or not same(shape(others[0])[dim], 1) or flat(wide) != flat(walk.cols) or walk.sink:
        raise Reject("AR203", "the scores are joined with more than one further column", node)
    walk.cols = (Symbol("j", shape(scores)[dim]),)
    column = (*layout[:dim], (), *layout[dim + 1 :])
    walk.sink = Sink(others[0], broadcast(column, others[0]), wide, walk.cols, last=parts[0] is scores)
    walk.rigid = True
    return scores, (*layout[:dim], walk.cols, *layout[dim + 1 :])
