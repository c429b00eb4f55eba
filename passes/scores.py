"""Affine normal form of attention scores: from the softmax's input back to the query-key contraction.

Every step is read as one of: scale, soft-cap, additive term, fill, or a move of axes. What does not fit is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from attnrewrite.passes.attention import Reject, Role, Scores, Term
from attnrewrite.passes.axes import AxisError, Dim, Layout, backward, broadcast, flat, symbols
from attnrewrite.passes.graph import argument, is_node, op, shape, tensor

CONTRACTIONS = {"matmul", "bmm", "baddbmm", "mm", "einsum"}
_CASTS = {"to", "_to_copy", "type_as", "float"}


@dataclass
class Step:
    """One thing done to the scores, in the order from the softmax inwards."""

    kind: Literal["scale", "factor", "tanh", "term"]
    number: float = 1.0
    node: fx.Node | None = None
    layout: Layout = ()
    divide: bool = False
    term: Term | None = None


@dataclass
class Walk:
    """The path from the softmax to the contraction: steps, visited nodes with layouts, and the contraction."""

    steps: list[Step] = field(default_factory=list)
    region: dict[tuple[Role, fx.Node], Layout] = field(default_factory=dict)
    contraction: fx.Node | None = None
    layout: Layout = ()


def read(start: fx.Node, layout: Layout, cols: Dim) -> tuple[Scores, Walk]:
    """Return the normal form of the scores ``start``, whose layout is ``layout`` and whose key axis is ``cols``.

    Raises Reject.
    """
    walk = Walk()
    try:
        _walk(start, layout, cols, walk)
    except AxisError as error:
        raise Reject("AR203", f"axes cannot be followed between the scores and the softmax: {error}", start) from None
    if walk.contraction is None:
        raise Reject("AR202", "the softmax is not fed by a contraction of two activations", start)
    return _normal_form(walk, start), walk


def reaches_contraction(node: Any, depth: int = 24) -> bool:
    """Whether walking back from ``node`` along score-like operations arrives at a contraction of two activations."""
    while is_node(node) and depth:
        depth -= 1
        name = op(node)
        if name in CONTRACTIONS:
            return is_product(node)
        if name in ("add", "sub"):
            return any(reaches_contraction(arg, depth) for arg in node.args[:2])
        if name == "where":
            return any(reaches_contraction(arg, depth) for arg in node.args[1:3])
        if name == "mul":
            return any(reaches_contraction(arg, depth) for arg in node.args[:2])
        passes = {"div", "tanh", "masked_fill", "view", "reshape", "_unsafe_view", "transpose", "permute"}
        if name not in passes | _CASTS | {"contiguous", "clone", "squeeze", "unsqueeze", "expand", "alias"}:
            return False
        node = node.args[0] if node.args else None
    return False


def is_product(node: fx.Node) -> bool:
    """Whether a contraction multiplies two computed values (not a value and a weight of the model)."""
    operands = einsum_operands(node) if op(node) == "einsum" else [a for a in node.args if is_node(a)]
    if op(node) == "baddbmm":
        operands = operands[-2:]
    return len(operands) == 2 and all(is_node(x) and x.op == "call_function" for x in operands)


def einsum_operands(node: fx.Node) -> list[Any]:
    """Return the operand nodes of an einsum."""
    operands = node.args[1]
    return list(operands) if isinstance(operands, list | tuple) else []


def _walk(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> None:
    while True:
        walk.region["scores", node] = layout
        name = op(node)
        if name in CONTRACTIONS:
            walk.contraction, walk.layout = node, layout
            _baddbmm(node, layout, walk)
            return
        moved = backward(layout, node)
        if moved is not None:
            node, layout = moved
        elif name in _CASTS and is_node(node.args[0]):
            node = node.args[0]
        elif name in _STEPS:
            node, layout = _STEPS[name](node, layout, cols, walk)
        else:
            reason = f"{node.target} stands between the scores and the softmax" if name else "not a tensor operation"
            code = "AR203" if reaches_contraction(node.args[0] if node.args else None) else "AR202"
            if code == "AR202":
                reason = "the softmax is not fed by a contraction of two activations"
            raise Reject(code, reason, node)


def _choose(node: fx.Node, positions: tuple[int, int]) -> tuple[fx.Node, Any, bool]:
    """Return (score side, other side, whether they were swapped) of a two-operand op."""
    a, b = node.args[positions[0]], node.args[positions[1]]
    if is_node(a) and (not is_node(b) or reaches_contraction(a)):
        return a, b, False
    if is_node(b) and reaches_contraction(b):
        return b, a, True
    raise Reject("AR202", "the softmax is not fed by a contraction of two activations", node)


def _inner(node: fx.Node, scores: fx.Node, layout: Layout) -> tuple[fx.Node, Layout]:
    """Step to an operand that must have the full shape of the result."""
    inner = broadcast(layout, scores)
    if len(inner) != len(layout):
        raise Reject("AR203", "the scores gain an axis after the query-key product", node)
    return scores, inner


def _scale(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, other, swapped = _choose(node, (0, 1))
    divide = op(node) == "div"
    if divide and (swapped or node.kwargs.get("rounding_mode")):
        raise Reject("AR203", "the scores are divided in an unusual way", node)
    number = constant(other)
    if number is not None:
        walk.steps.append(Step("scale", number=1.0 / number if divide else number))
    elif is_node(other):
        where = broadcast(layout, other) if tensor(other) is not None else ()
        if set(symbols(where)) & set(flat(cols)):
            raise Reject("AR203", "the scores are multiplied by a tensor that depends on the key", node)
        walk.steps.append(Step("factor", node=other, layout=where, divide=divide))
    else:
        raise Reject("AR203", "the scores are multiplied by something that is no number", node)
    return _inner(node, scores, layout)


def _add(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, other, swapped = _choose(node, (0, 1))
    alpha = constant(argument(node, 2, "alpha", 1))
    if (op(node) == "sub" and swapped) or alpha is None:
        raise Reject("AR203", "the scores are subtracted from something", node)
    sign = -1.0 if op(node) == "sub" else 1.0
    if swapped and alpha != 1:
        raise Reject("AR203", "the scores are added with a weight", node)
    if not is_node(other):
        return _inner(node, scores, layout)  # one number for all keys cancels in the softmax
    term = Term("add", other, broadcast(layout, other), weight=sign * alpha)
    walk.steps.append(Step("term", term=term))
    return _inner(node, scores, layout)


def _tanh(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> tuple[fx.Node, Layout]:
    walk.steps.append(Step("tanh"))
    return _inner(node, node.args[0], layout)  # type: ignore[arg-type]  # a tensor by schema


def _masked_fill(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> tuple[fx.Node, Layout]:
    scores, mask, value = node.args[0], node.args[1], constant(node.args[2])
    if value is None or not is_node(mask) or not is_node(scores):
        raise Reject("AR203", "scores are filled with a value that is no constant", node)
    term = Term("fill", mask, broadcast(layout, mask), value=value, when=True)
    walk.steps.append(Step("term", term=term))
    return _inner(node, scores, layout)


def _where(node: fx.Node, layout: Layout, cols: Dim, walk: Walk) -> tuple[fx.Node, Layout]:
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


def constant(value: Any) -> float | None:
    """Return the number that a literal, or a node that creates a filled 0-d tensor, stands for."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if is_node(value) and tensor(value) is not None and shape(value) == ():
        name = op(value)
        if name in ("full", "scalar_tensor", "new_full", "full_like"):
            return constant(value.args[0 if name == "scalar_tensor" else -1])
        if name in ("zeros", "new_zeros", "zeros_like"):
            return 0.0
        if name in ("ones", "new_ones", "ones_like"):
            return 1.0
        if name in ("lift_fresh_copy", "lift_fresh", "clone", "detach", "to", "_to_copy"):
            return constant(value.args[0])
        if value.op == "get_attr":
            return _attribute(value)
    return None


def _attribute(node: fx.Node) -> float | None:
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    if isinstance(held, torch.Tensor) and held.numel() == 1 and type(held) is torch.Tensor:
        return float(held)
    return None


def _normal_form(walk: Walk, start: fx.Node) -> Scores:
    """Fold the steps, read from the contraction outwards."""
    assert walk.contraction is not None
    scores = Scores(walk.contraction)
    after: float | None = None  # the scale found after a tanh
    for step in reversed(walk.steps):
        if step.kind == "scale":
            if after is not None and not scores.terms:
                after *= step.number
            elif after is None:
                scores.alpha *= step.number
                _scale_terms(scores, step.number, start)
            else:
                raise Reject("AR203", "scores are scaled after soft-cap and bias", start)
        elif step.kind == "factor":
            if after is not None or scores.terms:
                raise Reject("AR203", "scores are scaled by a tensor after soft-cap or bias", start)
            assert step.node is not None
            scores.factors.append((step.node, step.layout, step.divide))
        elif step.kind == "tanh":
            if after is not None or scores.terms:
                raise Reject("AR203", "tanh is applied after a bias or a second time", start)
            after = 1.0
        elif step.term is not None:
            scores.terms.append(step.term)
    if after is not None:
        scores.softcap = after
        scores.alpha *= after  # c·tanh(a·x) = softcap_c(c·a·x)
    return scores


def _scale_terms(scores: Scores, number: float, start: fx.Node) -> None:
    if scores.terms and number <= 0:
        raise Reject("AR203", "masked scores are scaled by a number that is not positive", start)
    for term in scores.terms:
        term.weight *= number
        term.value *= number
