"""The way back from the softmax to the query-key product: every step is read, or refused.

A step is a scale, a soft-cap, an additive term, a fill, a floor, a sink column, a shift that cancels in the softmax, or
a move of axes. ``normal_form`` folds the steps.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, from_result, is_product
from attnrewrite.passes.attention.form import NEGLIGIBLE, Reject, Scores, Term
from attnrewrite.passes.attention.normal_form import Step, normal_form
from attnrewrite.passes.attention.softmax import CASTS, Softmax
from attnrewrite.passes.graph.axes import (
    AxisError,
    Layout,
    backward,
    broadcast,
    flat,
    fresh,
    symbols,
)
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import argument, is_node, op, tensor
from attnrewrite.passes.masks.selection import line_over
from attnrewrite.passes.matching.columns import join, sink
from attnrewrite.passes.matching.mixing import NEAREST, is_heads, source_of_map
from attnrewrite.passes.matching.walk import LOST, NO_PRODUCT, Walk, reaches_contraction

_MAXIMA = {"amax", "max", "detach"}


def read(softmax: Softmax, layout: Layout) -> tuple[Scores, Walk]:
    """Return the normal form of a softmax's input, whose layout is ``layout``. Raises Reject."""
    walk, start = Walk(layout[softmax.axis], anchor=softmax.node), softmax.scores
    try:
        _walk(start, layout, walk)
    except AxisError as error:
        raise Reject("AR203", f"{LOST}: {error}", start) from None
    if walk.contraction is None:
        raise Reject("AR202", NO_PRODUCT, start)
    scores = normal_form(walk.contraction, walk.steps, start)
    scores.sink, scores.shifts = walk.sink, walk.shifts
    return scores, walk


def _walk(node: fx.Node, layout: Layout, walk: Walk) -> None:
    while True:
        walk.region["scores", node] = layout
        name = op(node)
        _check_heads(node, layout, walk)
        if name in CONTRACTIONS:
            walk.contraction, walk.layout = node, layout
            _baddbmm(node, layout, walk)
            return
        moved = backward(layout, node)
        if moved is not None:
            node, layout = moved
        elif name == "cat" and join(node, layout, walk, _walk):
            return
        elif name in CASTS and is_node(node.args[0]):
            node = node.args[0]
        elif name in _STEPS:
            node, layout = _STEPS[name](node, layout, walk)
        else:
            reached = reaches_contraction(node.args[0] if node.args else None)
            reason = f"{node.target} stands between the scores and the softmax" if name else "not a tensor operation"
            raise Reject("AR203", reason, node) if reached else Reject("AR202", NO_PRODUCT, node)


def _check_heads(node: fx.Node, layout: Layout, walk: Walk) -> None:
    """Refuse scores that a linear map has mixed across heads. Raises Reject."""
    mapped = source_of_map(node, layout)
    cols = set(flat(walk.cols))
    columns = [n for n, dim in enumerate(mapped.layout) if cols & set(flat(dim))] if mapped else []
    if mapped is None or not columns:
        return
    inner = fresh(mapped.node, ["x"] * len(mapped.layout))  # the site's own symbols stay as they are
    behind = Walk(inner[columns[0]])
    try:
        _walk(mapped.node, inner, behind)
    except (Reject, AxisError):
        return
    product, axis = behind.contraction, inner[mapped.axis]
    if product is not None and is_product(product) and is_heads(axis, from_result(product, behind.layout, "d")):
        raise Reject("AR203", "heads are mixed between the query-key product and the softmax", node, NEAREST)


def _choose(node: fx.Node, positions: tuple[int, int]) -> tuple[fx.Node, Any, bool]:
    """Return (score side, other side, whether they were swapped) of a two-operand op."""
    a, b = node.args[positions[0]], node.args[positions[1]]
    if is_node(a) and (not is_node(b) or reaches_contraction(a)):
        return a, b, False
    if is_node(b) and reaches_contraction(b):
        return b, a, True
    raise Reject("AR202", NO_PRODUCT, node)


def _inner(node: fx.Node, scores: fx.Node, layout: Layout) -> tuple[fx.Node, Layout]:
    """Step to an operand that must have the full shape of the result."""
    inner = broadcast(layout, scores)
    if len(inner) != len(layout):
        raise Reject("AR203", "the scores gain an axis after the query-key product", node)
    return scores, inner


def _scale(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, other, swapped = _choose(node, (0, 1))
    divide = op(node) == "div"
    if divide and (swapped or node.kwargs.get("rounding_mode")):
        raise Reject("AR203", "the scores are divided in an unusual way", node)
    number = constant(other)
    if number is not None:
        walk.steps.append(Step("scale", number=1.0 / number if divide else number))
    elif is_node(other):
        where = broadcast(layout, other) if tensor(other) is not None else ()
        if set(symbols(where)) & set(flat(walk.cols)):
            walk.steps.append(_kept_or_filled(node, other, where, walk))
            return _inner(node, scores, layout)
        walk.steps.append(Step("factor", node=other, layout=where, divide=divide))
    else:
        raise Reject("AR203", "the scores are multiplied by something that is no number", node)
    return _inner(node, scores, layout)


def _kept_or_filled(node: fx.Node, mask: fx.Node, layout: Layout, walk: Walk) -> Step:
    """Read ``scores * mask + low * (1 - mask)``, of which the sum was the step before: a fill where the mask is 0."""
    last = walk.steps.pop() if walk.steps else None
    added = last.term if last is not None else None
    line = line_over(added.node, mask) if added is not None and added.kind == "add" and added.weight == 1 else None
    if line is None or line(1.0) != 0 or line(0.0) >= 0 or op(node) != "mul":
        raise Reject("AR203", "the scores are multiplied by a tensor that depends on the key", node)
    return Step("term", term=Term("fill", mask, layout, value=line(0.0), when=False, zero_one=True))


def _add(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, other, swapped = _choose(node, (0, 1))
    alpha = constant(argument(node, 2, "alpha", 1))
    if (op(node) == "sub" and swapped) or alpha is None:
        raise Reject("AR203", "the scores are subtracted from something", node)
    if swapped and alpha != 1:
        raise Reject("AR203", "the scores are added with a weight", node)
    if not is_node(other) or tensor(other) is None:
        if walk.rigid:
            raise Reject("AR203", "a number is added to the scores before a soft-cap, a floor or a sink", node)
        return _inner(node, scores, layout)  # one number for all keys cancels in the softmax
    where = broadcast(layout, other)
    if not walk.rigid and not set(symbols(where)) & set(flat(walk.cols)):
        _shift(other, scores, where, walk)
    else:
        weight = -alpha if op(node) == "sub" else alpha
        walk.steps.append(Step("term", term=Term("add", other, where, weight=weight)))
    return _inner(node, scores, layout)


def _shift(shift: fx.Node, scores: fx.Node, layout: Layout, walk: Walk) -> None:
    """Note what is taken off all keys alike: the scores' own maximum belongs to the region, anything else is given."""
    chain, node = list[fx.Node](), shift
    while node is not scores:
        if op(node) not in _MAXIMA and getattr(node.target, "__name__", "") != "getitem":
            walk.shifts.append((shift, layout))
            return
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]  # a tensor by schema
    walk.region |= {("scores", step): layout for step in chain}


def _tanh(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    walk.steps.append(Step("tanh"))
    walk.rigid = True
    return _inner(node, node.args[0], layout)  # type: ignore[arg-type]  # a tensor by schema


def _floor(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    """Read max(scores, lowest number), which only lifts -inf."""
    scores, low = node.args[0], constant(argument(node, 1, "min"))
    if op(node) in ("maximum", "max") and low is None:
        scores, low = node.args[1] if len(node.args) > 1 else None, constant(node.args[0])
    high = argument(node, 2, "max") if op(node) == "clamp" else None
    if not is_node(scores) or low is None or high is not None or low > NEGLIGIBLE:
        raise Reject("AR203", "the scores are clamped", node)
    walk.steps.append(Step("floor", number=low))
    walk.rigid = True
    return _inner(node, scores, layout)


def _masked_fill(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, mask, value = node.args[0], node.args[1], constant(node.args[2])
    if value is None or not is_node(mask) or not is_node(scores):
        raise Reject("AR203", "scores are filled with a value that is no constant", node)
    term = Term("fill", mask, broadcast(layout, mask), value=value, when=True)
    walk.steps.append(Step("term", term=term))
    return _inner(node, scores, layout)


def _where(node: fx.Node, layout: Layout, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, other, swapped = _choose(node, (1, 2))
    value, mask = constant(other), node.args[0]
    if value is None or not is_node(mask):
        raise Reject("AR203", "scores are replaced by a value that is no constant", node)
    term = Term("fill", mask, broadcast(layout, mask), value=value, when=swapped)
    walk.steps.append(Step("term", term=term))
    return _inner(node, scores, layout)


_STEPS = {
    "mul": _scale,
    "div": _scale,
    "add": _add,
    "sub": _add,
    "tanh": _tanh,
    "masked_fill": _masked_fill,
    "where": _where,
    "cat": sink,
    **dict.fromkeys(("maximum", "max", "clamp", "clamp_min"), _floor),
}


def _baddbmm(node: fx.Node, layout: Layout, walk: Walk) -> None:
    if op(node) != "baddbmm":
        return
    beta, alpha = constant(argument(node, 3, "beta", 1)), constant(argument(node, 4, "alpha", 1))
    bias = node.args[0]
    if beta is None or alpha is None or not is_node(bias):
        raise Reject("AR203", "baddbmm with weights that are no constants", node)
    if beta != 0:
        walk.steps.append(Step("term", term=Term("add", bias, broadcast(layout, bias), weight=beta)))
    if alpha != 1:
        walk.steps.append(Step("scale", number=alpha))
