"""The accepted form nearest to a refused one, told by the operator that stands in the way."""

from __future__ import annotations

from torch import fx

from attnrewrite.passes.graph.nodes import op

_FACTOR = "a factor that is a number or has no key axis: a scale of the scores, a gate per query on the weights"
_FILL = "a fill with a constant, -inf or the dtype's lowest number, where a boolean mask says so"
_BY_OPERATOR = {
    "tanh": "cap * tanh(scores / cap), once, right after the scaled product",
    "mul": _FACTOR,
    "div": _FACTOR,
    "masked_fill": _FILL,
    "where": _FILL,
    "add": "scores + bias with one weight, after the scale and the soft-cap",
    "sub": "scores + (-bias), after the scale and the soft-cap",
    "cat": "one further column of scores (a sink) that is cut off again after the softmax",
    "einsum": "an einsum of two operands that sums over one shared axis",
    "clamp": "a floor at the dtype's lowest number: clamp(min=torch.finfo(dtype).min)",
}


def nearest_form(code: str, node: fx.Node | None) -> str:
    """Return the accepted form nearest to ``node``, in one sentence; "" leaves it to the page of ``code``."""
    return _BY_OPERATOR.get(op(node), "") if code == "AR203" else ""
