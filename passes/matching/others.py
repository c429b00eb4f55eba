"""What a softmax is that was not matched: an attention in a form that is not read, or something else, and what.

Told by where its input comes from and where its result goes, along every operation that keeps scores scores.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, is_product
from attnrewrite.passes.attention.regions import root, written
from attnrewrite.passes.attention.softmax import CASTS, Softmax
from attnrewrite.passes.graph.axes import ALIASES, MOVES, RESHAPES, AxisError, forward, fresh
from attnrewrite.passes.graph.nodes import is_node, is_weight, op, shape

_CHOOSES = {"topk", "sort", "argmax", "multinomial", "max", "argsort", "one_hot", "scatter"}
_MOVES = MOVES | {
    *("select", "detach", "cat", "stack", "pad", "constant_pad_nd", "as_strided", "gather", "index", "index_select"),
    *("split", "chunk", "unbind", "copy", "repeat", "unfold", "roll", "movedim", "narrow", "index_put"),
    *("slice_scatter", "select_scatter"),
}
_ELEMENTWISE = {"masked_fill", "where", "add", "sub", "div", "nan_to_num", "dropout", "mul", "neg"}
_SCORES = {"tanh", "clamp", "clamp_min", "relu", "exp", "maximum", "minimum", "abs", "pow", "softplus", "sigmoid"}
_REACH = 160
_MAX_HEADS = 64


def is_attention_like(softmax: Softmax) -> bool:
    """Whether a query-key product reaches the softmax, and its result reaches another product."""
    return _from_product(softmax) and bool(_uses(softmax)[0] & CONTRACTIONS)


def kind_of(softmax: Softmax) -> str:
    """Say in a few words what a softmax does that is no attention."""
    uses, returned = _uses(softmax)
    if uses & _CHOOSES:
        return "a router: its largest entries are chosen"
    if _from_product(softmax):
        cut = "; they leave the graph, and a graph break may cut an attention here" if returned else ""
        return f"scores of a query-key product whose weights never meet values{cut}"
    if uses & CONTRACTIONS and _from_outside(softmax):
        return "weights whose scores come from outside of the graph; a graph break may cut an attention here"
    if uses & CONTRACTIONS:
        return (
            "weights that are made by a linear map and not by a query-key product: a dynamic convolution, linear "
            "attention, or a mixture"
        )
    if "mul" in uses:
        return "a gate or a pooling: its weights multiply values element by element"
    return "a classifier or a probability: it is returned" if returned else "a softmax that meets no values"


def stored_apart(softmax: Softmax) -> tuple[str, fx.Node] | None:
    """Say in which way scores are stored other than as one matrix of queries and keys, and where."""
    for node in _way_back(softmax):
        if op(node) in RESHAPES and is_node(node.args[0]) and _is_padded(node.args[0]) and _cuts_across(node):
            return "the scores are stored by diagonals: they are padded and their axes are cut anew", node
    for node in _way_back(softmax):
        if _is_new(node) and any(_written_into(node)):
            return "the scores are stored by chunks: they are written piece by piece into a new tensor", node
    return None


def _is_padded(node: fx.Node) -> bool:
    while op(node) in ALIASES and is_node(node.args[0]):
        node = node.args[0]
    return op(node) in ("pad", "constant_pad_nd")


def _cuts_across(view: fx.Node) -> bool:
    try:
        forward(fresh(view.args[0], ["x"] * len(shape(view.args[0]))), view)  # type: ignore[arg-type]  # a tensor by schema
    except AxisError:
        return True
    return False


def _from_product(softmax: Softmax) -> bool:
    """Whether a product of two computed values is among what the scores are made of."""
    return any(op(node) in CONTRACTIONS and is_product(node) for node in _way_back(softmax))


def _way_back(softmax: Softmax) -> Iterator[fx.Node]:
    """Yield what the scores are made of, along every operation that keeps scores scores, products included."""
    through = _MOVES | _ELEMENTWISE | _SCORES | CASTS
    todo, seen = [softmax.scores], {softmax.scores}
    while todo and len(seen) < _REACH:
        node = todo.pop()
        yield node
        if op(node) in CONTRACTIONS and is_product(node):
            continue
        item = getattr(node.target, "__name__", "") == "getitem"
        if op(node) not in through and not item and not _mixes_heads(node) and not _is_new(node):
            continue
        for source in (*node.all_input_nodes, *_written_into(node)):
            if source not in seen:
                seen.add(source)
                todo.append(source)


def _from_outside(softmax: Softmax) -> bool:
    """Whether the scores are an input of the graph, moved or masked."""
    node: object = softmax.scores
    while is_node(node) and node.op == "call_function" and op(node) in _MOVES | _ELEMENTWISE | CASTS and node.args:
        node = node.args[0]
    return is_node(node) and node.op == "placeholder" and not is_weight(node)


def _mixes_heads(node: fx.Node) -> bool:
    """Whether ``node`` is a linear map, or a pointwise convolution, small and square: heads may talk through it."""
    if op(node) not in ("linear", "conv2d") or not is_node(node.args[1]) or not is_weight(node.args[1]):
        return False
    rows, columns, *kernel = shape(node.args[1])
    return rows == columns and isinstance(rows, int) and rows <= _MAX_HEADS and all(size == 1 for size in kernel)


def _is_new(node: fx.Node) -> bool:
    return op(node) in ("new_zeros", "new_empty", "new_full", "new_ones", "zeros", "empty", "full", "zeros_like")


def _written_into(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values that are copied into a new tensor, through views of it."""
    if not _is_new(node):
        return
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if op(user) == "copy" and root(written(user)) is node and is_node(user.args[1]):
                yield user.args[1]
            elif root(user) is node and written(user) is None:
                todo.append(user)


def _uses(softmax: Softmax) -> tuple[set[str], bool]:
    """Return the operators that the result reaches through moves and steps, and whether it is returned."""
    through = _MOVES | CASTS | (_ELEMENTWISE - {"mul"})
    found, returned = set[str](), False
    todo, seen = [softmax.node], {softmax.node}
    while todo and len(seen) < _REACH:
        for user in todo.pop().users:
            returned |= user.op == "output"
            found.add(op(user))
            item = getattr(user.target, "__name__", "") == "getitem"
            if (op(user) in through or item or _mixes_heads(user)) and user not in seen:
                todo += [x for x in (user, root(written(user))) if x is not None and x not in seen]
                seen |= set(todo)
    return found, returned
