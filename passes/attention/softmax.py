"""Softmax in every form: the operator, or written out with exponentials."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnrewrite.passes.graph.nodes import argument, is_node, op, shape

OPERATORS = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
_LOG = {"log_softmax", "_log_softmax", "special_log_softmax"}
_SUMS = {"sum"}
CASTS = {"to", "_to_copy", "type_as", "float"}
_SAME = CASTS | {"expand", "expand_as", "alias", "clone", "contiguous", "detach"}


@dataclass(eq=False, repr=False)
class Softmax:
    """``node = softmax(scores)`` along dim ``axis``; ``steps`` are the nodes between where it is written out."""

    node: fx.Node
    scores: fx.Node
    axis: int
    steps: tuple[fx.Node, ...] = ()


def softmax_at(node: fx.Node) -> Softmax | None:
    """Return the softmax whose result ``node`` is, or None.

    Forms: the operators; exp(x) / sum(exp(x)); exp(x - logsumexp(x)); exp(log_softmax(x)). A maximum that is taken off
    beforehand belongs to the scores, where it cancels.
    """
    name = op(node)
    if name in OPERATORS:
        return _softmax(node, node, argument(node, 1, "dim"))
    if name == "exp":
        return _of_logarithm(node)
    return _quotient(node) if name == "div" and not node.kwargs.get("rounding_mode") else None


def _softmax(node: fx.Node, inner: fx.Node, dim: object, steps: tuple[fx.Node, ...] = ()) -> Softmax | None:
    scores = inner.args[0]
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    if not is_node(scores) or not isinstance(dim, int) or not shape(node):
        return None
    return Softmax(node, scores, dim % len(shape(node)), steps)


def _of_logarithm(node: fx.Node) -> Softmax | None:
    chain = _behind(node.args[0], CASTS)
    if not chain:
        return None
    last = chain[-1]
    if op(last) in _LOG:
        return _softmax(node, last, argument(last, 1, "dim"), tuple(chain))
    if op(last) != "sub" or last.kwargs.get("alpha", 1) != 1:
        return None
    sums = _behind(last.args[1], _SAME)
    if not sums or op(sums[-1]) not in ("logsumexp", "special_logsumexp"):
        return None
    if sums[-1].args[0] is not last.args[0] or not argument(sums[-1], 2, "keepdim", False):
        return None
    return _softmax(node, last, argument(sums[-1], 1, "dim"), (*chain, *sums))


def _quotient(node: fx.Node) -> Softmax | None:
    """Read exp(x) / sum(exp(x), dim, keepdim=True)."""
    top, bottom = (_behind(x, _SAME) for x in node.args[:2])
    if not top or not bottom or op(top[-1]) != "exp" or op(bottom[-1]) not in _SUMS:
        return None
    summed = _behind(bottom[-1].args[0], _SAME)
    if not summed or summed[-1] is not top[-1] or not argument(bottom[-1], 2, "keepdim", False):
        return None
    return _softmax(node, top[-1], argument(bottom[-1], 1, "dim"), (*top, *bottom, *summed))


def _behind(value: object, through: set[str]) -> list[fx.Node]:
    """Return ``value`` and what lies behind it, up to the first node that does more than ``through``."""
    chain: list[fx.Node] = []
    while is_node(value):
        chain.append(value)
        if op(value) not in through or not value.args:
            break
        value = value.args[0]
    return chain
