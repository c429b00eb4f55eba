"""Numbers in a graph: literals, and nodes that create a filled 0-d tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnrewrite.passes.graph.nodes import NUMBER, held, is_node, op, shape, tensor

_FULL = ("full", "scalar_tensor", "new_full", "full_like")
_ARITHMETIC = {"add", "sub", "mul", "div", "sqrt", "rsqrt", "reciprocal", "pow", "exp", "log", "neg"}
_COPIES = ("lift_fresh_copy", "lift_fresh", "clone", "detach", "to", "_to_copy")


def constant(value: Any) -> float | None:
    """Return the number that ``value`` stands for wherever the graph runs, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if not is_node(value) or tensor(value) is None or shape(value) != ():
        return None
    name = op(value)
    if name in _FULL:
        return constant(value.args[0 if name == "scalar_tensor" else -1])
    if name in ("zeros", "new_zeros", "zeros_like"):
        return 0.0
    if name in ("ones", "new_ones", "ones_like"):
        return 1.0
    if name in _COPIES:
        return constant(value.args[0])
    if name in _ARITHMETIC:
        numbers = [constant(x) for x in value.args]
        return _computed(name, [x for x in numbers if x is not None]) if None not in numbers else None
    return value.meta.get(NUMBER, _attribute(value))


def _computed(name: str, numbers: list[float]) -> float | None:
    try:
        return float(getattr(torch, name)(*(torch.tensor(x, dtype=torch.float64) for x in numbers)))
    except TypeError:  # another overload, with arguments that are no numbers to compute with
        return None


def _attribute(node: fx.Node) -> float | None:
    value = held(node)
    return float(value) if type(value) is torch.Tensor and value.numel() == 1 else None
