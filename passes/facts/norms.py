"""Normalisation of queries and keys, read from how they are computed: an operator, or written out."""

from __future__ import annotations

from typing import Literal

from torch import fx

from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.facts.provenance import Trail
from attnrewrite.passes.graph.nodes import is_node, op

Norm = Literal["none", "layer", "rms", "l2", "other"]

_OPERATORS: dict[str, Norm] = {
    **dict.fromkeys(("layer_norm", "native_layer_norm"), "layer"),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), "rms"),
    **dict.fromkeys(("group_norm", "native_group_norm", "batch_norm", "instance_norm"), "other"),
}
_LENGTHS = {"linalg_vector_norm", "norm", "linalg_norm", "frobenius_norm", "sum"}
_SPREADS = {"var", "std", "var_mean", "std_mean"}
_ROOTS = {"rsqrt", "sqrt", "pow", "reciprocal", "add", "clamp", "clamp_min", "maximum", "max", "unsqueeze", "expand"}
_ROOTS |= {"expand_as", "view", "reshape", "mul", *CASTS}
_INVERSES, _HALVES = {"rsqrt", "reciprocal", "pow"}, {"rsqrt", "sqrt", "pow"}
_ROOTED = {"linalg_vector_norm", "norm", "linalg_norm", "frobenius_norm", "std", "std_mean"}
_SQUARES = {"pow", "square", "mul", "abs", "sub", *CASTS}


def norm(trail: Trail) -> Norm:
    """Return the normalisation nearest to the product on the way of ``trail``."""
    for node in trail.nodes:
        found = _OPERATORS.get(op(node)) or _written_out(node)
        if found is not None:
            return found
    return "none"


def _written_out(node: fx.Node) -> Norm | None:
    """Read ``x * rsqrt(mean(x * x))``, ``x / norm(x)`` and their kin."""
    if op(node) not in ("mul", "div"):
        return None
    sides = [x for x in node.args[:2] if is_node(x)]
    pairs = [(sides[0], sides[1]), (sides[1], sides[0])] if len(sides) == 2 else []
    for value, factor in pairs[: 1 if op(node) == "div" else 2]:
        reduction, roots = _reduction(factor)
        if reduction is None or not _computed_from(reduction, _uncast(value)):
            continue
        inverse = op(node) == "div" or roots & _INVERSES
        if not inverse or not (roots & _HALVES or op(reduction) in _ROOTED):
            continue
        if op(reduction) in _LENGTHS:
            return "l2"
        centred = op(_uncast(value)) == "sub"
        return "layer" if centred or op(reduction) in _SPREADS else "rms"
    return None


def _reduction(factor: fx.Node) -> tuple[fx.Node | None, set[str]]:
    """Return the mean, sum or norm that ``factor`` is a root of, and the steps between them."""
    steps = set[str]()
    for _ in range(12):
        if op(factor) in _LENGTHS | _SPREADS | {"mean"}:
            return factor, steps
        before = [x for x in factor.args[:2] if is_node(x)]
        if op(factor) not in _ROOTS or not before:
            break
        steps.add(op(factor))
        factor = before[0]
    return None, steps


def _computed_from(reduction: fx.Node, value: fx.Node) -> bool:
    """Whether ``reduction`` reduces squares of ``value``, or what ``value`` was centred from."""
    todo, seen = list(reduction.all_input_nodes), set[fx.Node]()
    accepted = {value, *(value.all_input_nodes if op(value) == "sub" else ())}
    while todo and len(seen) < 12:
        node = _uncast(todo.pop())
        if node in accepted:
            return True
        seen.add(node)
        todo += node.all_input_nodes if op(node) in _SQUARES else []
    return False


def _uncast(node: fx.Node) -> fx.Node:
    while op(node) in CASTS and is_node(node.args[0]):
        node = node.args[0]
    return node
