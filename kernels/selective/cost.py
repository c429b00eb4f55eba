"""FLOPs of selective attention, over all pairs of L queries and S keys, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnrewrite.kernels import strips


def forward_flops(query: Any, key: Any, value: Any, selector: Sequence[Any]) -> int:
    """Return those of the output; ``selector`` begins with the shape of its queries, or None, or is empty."""
    own = _own(query, key, selector)
    return strips.flops(query[0], query[1], query[2], key[2], query[3] + value[3]) + own


def backward_flops(query: Any, key: Any, value: Any, selector: Sequence[Any]) -> int:
    """Return those of all gradients: scores anew, the states of forward anew, and two products per operand."""
    whole = strips.flops(query[0], query[1], query[2], key[2], 3 * query[3] + 2 * value[3])
    own = _own(query, key, selector)
    return whole + (4 * own if own else strips.flops(query[0], 1, query[2], key[2], query[3]))


def _own(query: Any, key: Any, selector: Sequence[Any]) -> int:
    """Return the FLOPs of a selector's logits, 0 without one."""
    shape = selector[0] if selector else None
    return 0 if shape is None else strips.flops(query[0], 1, query[2], key[2], shape[2])
