"""What a softmax is that is no attention: told by where its input comes from and where its result goes."""

from __future__ import annotations

from attnrewrite.passes.contract import CONTRACTIONS, is_product
from attnrewrite.passes.graph import is_node, op
from attnrewrite.passes.softmax import CASTS, Softmax

_CHOOSES = {"topk", "sort", "argmax", "multinomial", "max", "argsort", "one_hot", "scatter"}
_SIDEWAYS = CASTS | {
    *("view", "reshape", "_unsafe_view", "transpose", "permute", "contiguous", "clone", "squeeze", "unsqueeze"),
    *("expand", "slice", "select", "dropout", "alias", "flatten", "unflatten", "detach", "cat", "repeat", "unfold"),
    *("masked_fill", "where", "add", "sub", "div", "nan_to_num", "mT", "t", "numpy_T"),
}
_REACH = 24


def kind_of(softmax: Softmax) -> str:
    """Say in a few words what this softmax does."""
    source = _source(softmax)
    uses, returned = _uses(softmax)
    if uses & _CHOOSES:
        return "a router: its largest entries are chosen"
    if source == "product":
        return "scores of a query-key product whose weights never meet values along the same axis"
    if uses & CONTRACTIONS:
        return (
            "weights that are made by a linear map and not by a query-key product: a dynamic convolution, linear "
            "attention, or a mixture"
        )
    if "mul" in uses:
        return "a gate or a pooling: its weights multiply values element by element"
    return "a classifier or a probability: it is returned" if returned else "a softmax that meets no values"


def _source(softmax: Softmax) -> str:
    """Return whether the input comes from a product of two computed values, looking back along its first operands."""
    node: object = softmax.scores
    for _ in range(_REACH):
        if not is_node(node):
            break
        if op(node) in CONTRACTIONS:
            return "product" if is_product(node) else "linear"
        if op(node) not in _SIDEWAYS | {"mul", "tanh", "clamp", "exp", "relu"}:
            break
        node = node.args[0] if node.args else None
        node = node[0] if isinstance(node, list | tuple) and node else node
    return "other"


def _uses(softmax: Softmax) -> tuple[set[str], bool]:
    """Return the operators that the result reaches through moves and casts, and whether it is returned."""
    found, returned = set[str](), False
    todo, seen = [softmax.node], {softmax.node}
    while todo and len(seen) < _REACH:
        for user in todo.pop().users:
            returned |= user.op == "output"
            found.add(op(user))
            if op(user) in _SIDEWAYS and user not in seen:
                seen.add(user)
                todo.append(user)
    return found, returned
