"""flex_attention: one that changes no score and hides no key becomes fused attention; the others are named.

Where no block mask is given, torch makes one under vmap, which says "all" in the end and cannot be traced again. It is
replaced by what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch

from attnrewrite.passes.graph.nodes import argument, held, is_node

_OPERATOR = torch.ops.higher_order.flex_attention
_WHOLE = 1 << 30
"""The block size that stands for "one block, however long"."""

_KV, _Q = slice(2, 4), slice(6, 8)
"""Where a block mask's tuple has the numbers and indices of blocks, per query and per key."""


def is_flex(node: fx.Node) -> bool:
    """Whether ``node`` calls flex_attention."""
    return node.op == "call_function" and node.target is _OPERATOR


def reason(node: fx.Node) -> str:
    """Say why a flex_attention is more than fused attention."""
    mask: Sequence[Any] = node.args[4]  # type: ignore[assignment]  # a tuple by the operator's signature
    parts = []
    if not _keeps_scores(node.args[3]):
        parts.append("changes scores by a function (score_mod)")
    if not _hides_nothing(mask):
        parts.append("hides keys by a block mask")
    return "flex_attention " + " and ".join(parts or ["returns more than the output, or broadcasts the batch"])


def simplified(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm``, or a copy of it in which every flex_attention is as simple as it can be."""
    if not any(is_flex(node) for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    simplify(copy)
    copy.meta.update(gm.meta)
    return copy


def simplify(module: fx.GraphModule) -> None:
    """Replace what flex_attention does by fused attention, or by fewer nodes, in place."""
    for node in [x for x in module.graph.nodes if is_flex(x)]:
        mask: Sequence[Any] = node.args[4]
        if not _hides_nothing(mask):
            continue
        if _keeps_scores(node.args[3]) and _only_output(node) and _same_batch(node):
            _fuse(node)
        else:
            node.update_arg(4, (*mask[: _Q.start], *mask[_KV], *mask[_Q.stop :]))
        _drop([x for x in mask[_Q] if is_node(x)], [x for x in mask[_KV] if is_node(x)])


def _keeps_scores(body: object) -> bool:
    """Whether a score_mod returns the score itself."""
    inner = held(body) if is_node(body) else None
    return isinstance(inner, fx.GraphModule) and _result(inner) is inner.graph.find_nodes(op="placeholder")[0]


def _hides_nothing(mask: Sequence[Any]) -> bool:
    """Whether a block mask is the one that torch makes where none is given: a single block, all of it seen."""
    counts, indices = mask[_KV]
    inner = held(mask[-1]) if is_node(mask[-1]) else None
    if mask[-3:-1] != (_WHOLE, _WHOLE) or not isinstance(inner, fx.GraphModule):
        return False
    return _makes(counts, "ones") and _makes(indices, "zeros") and _makes(_result(inner), "new_ones")


def _makes(node: object, name: str) -> bool:
    target = node.target if is_node(node) else ""
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).partition(".")[0] == name


def _result(body: fx.GraphModule) -> object:
    (output,) = body.graph.find_nodes(op="output")
    value = output.args[0]
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


def _only_output(node: fx.Node) -> bool:
    return all(user.args[1] == 0 or not user.users for user in node.users)


def _same_batch(node: fx.Node) -> bool:
    query, key, value = (_value(x).shape[0] for x in node.args[:3])
    return bool(query == key == value)


def _value(node: object) -> torch.Tensor:
    assert is_node(node)
    found = node.meta["val"] if "val" in node.meta else node.meta["example_value"]
    assert isinstance(found, torch.Tensor)
    return found


def _fuse(node: fx.Node) -> None:
    query, key = (_value(x) for x in node.args[:2])
    options = {"scale": argument(node, 5, "scale"), "enable_gqa": query.shape[1] != key.shape[1]}
    with node.graph.inserting_before(node):
        fused = node.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, node.args[:3], options)
    for user in list(node.users):
        fused.meta |= user.meta if user.args[1] == 0 else {}
        user.replace_all_uses_with(fused)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _drop(roots: list[fx.Node], kept: list[fx.Node]) -> None:
    """Take away what only made the block mask: under vmap, dead nodes look as if they had effects."""
    made = _made_for(roots + kept)
    if any(user not in made for node in made.difference(kept) for user in node.users):
        return
    graph = kept[0].graph
    for node in reversed([x for x in graph.nodes if x in made]):
        if not node.users:
            graph.erase_node(node)
    nested = [x for x in graph.nodes if _is_vmap(x)]
    for node in [] if any(x.all_input_nodes or x.users for x in nested) else nested:
        graph.erase_node(node)


def _made_for(roots: list[fx.Node]) -> set[fx.Node]:
    """Return what ``roots`` are made from, and what is written into that."""
    made, todo = set[fx.Node](), list(roots)
    while todo:
        node = todo.pop()
        if node in made or node.op in ("placeholder", "get_attr", "output"):
            continue
        made.add(node)
        todo += [*node.all_input_nodes, *(user for user in node.users if not user.users)]
    return made


def _is_vmap(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == predispatch.__name__
