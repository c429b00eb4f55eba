"""What else happens to an attention's tensors: keys kept in a cache, scores or weights returned, values used again."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Operand
from attnrewrite.passes.facts.provenance import BLANK, WRITES, Provenance, Trail
from attnrewrite.passes.graph.axes import ALIASES, RESHAPES, flat, same, symbols
from attnrewrite.passes.graph.nodes import WEIGHT, argument, is_node, op, shape, tensor

Cache = Literal["none", "cat", "index_copy"]

_VIEWS = {*ALIASES, *RESHAPES, "permute", "transpose", "t", "mT", "unsqueeze", "squeeze", "expand", "slice", "select"}
_MOVES = _VIEWS | {"to", "_to_copy", "index_select", "index", "narrow", "repeat_interleave"}

_INDEXED = {"index_copy", "index_put", "_index_put_impl"}


def cache(key: Trail, provenance: Provenance) -> Cache:
    """Say how earlier keys are kept: cat (new ones are joined to them), index_copy (written among them), or none."""
    for node in key.nodes:
        if op(node) == "cat" and _grows(node, provenance):
            return "cat"
        blank = op(node) in _INDEXED and op(node.args[0]) in BLANK  # a cache that begins here
        if op(node) in WRITES and (blank or _is_state(node.args[0], provenance)):
            return "index_copy"
        if _is_state(node, provenance) and _is_written(node):
            return "index_copy"
    return "none"


def _grows(node: fx.Node, provenance: Provenance) -> bool:
    """Whether new keys are joined to ones that are given, or to none yet, along an axis that is not the features."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or int(argument(node, 1, "dim", 0)) in (-1, len(shape(node)) - 1):
        return False
    given = [x for x in parts if is_node(x) and (_is_empty(x) or _is_input(x, provenance))]
    return 0 < len(given) < len(parts)


def _is_empty(node: fx.Node) -> bool:
    return any(same(n, 0) for n in shape(node))


def _is_input(node: object, provenance: Provenance) -> bool:
    root = _root(node, provenance)
    return root is not None and root.op == "placeholder" and WEIGHT not in root.meta


def _is_state(node: object, provenance: Provenance) -> bool:
    """Whether ``node`` is a view of an input or buffer: what a call may find and leave behind."""
    root = _root(node, provenance)
    held = root is not None and (root.op == "get_attr" or root in provenance.capture.buffers)
    return held or _is_input(node, provenance) or (root is not None and root.name.startswith("b_"))


def _root(node: object, provenance: Provenance) -> fx.Node | None:
    for _ in range(12):
        if not is_node(node) or tensor(node) is None:
            return None
        if node in provenance.capture.bindings:
            node = provenance.capture.bindings[node]
        elif op(node) in _MOVES | WRITES and node.args:
            node = node.args[0]
        else:
            return node if node.op in ("placeholder", "get_attr") else None
    return None


def _is_written(node: fx.Node) -> bool:
    """Whether a part of ``node``, an input, is written in place."""
    if node.op not in ("placeholder", "get_attr"):
        return False
    views, todo = 0, list(node.users)
    while todo and views < 24:
        user, views = todo.pop(), views + 1
        schema = getattr(user.target, "_schema", None)
        if op(user) in WRITES and schema is not None and schema.is_mutable:
            return True
        todo += user.users if op(user) in _VIEWS else []
    return False


def other_users(site: Attention) -> list[str]:
    """Return which of scores, probs, key and value are also used outside of the attention."""
    inside = {node for _, node in site.region} | {site.output, site.anchor, site.scores.contraction}
    inside |= set(site.softmax.steps) if site.softmax is not None else set()
    inside |= {node for join in site.joins() for node in join.products}
    inside |= {operand.node for role in ("key", "value") for operand, _ in site.blocks(role)}
    groups = {role: {node for r, node in site.region if r == role} - {site.output} for role in ("scores", "probs")}
    groups["scores"] -= {site.anchor}
    groups |= {"key": _operand(site, "key", site.key), "value": _operand(site, "value", site.value)}
    inside |= groups["key"] | groups["value"]
    return [role for role, nodes in groups.items() if any(_leaves(x, inside, role) for x in nodes)]


def _operand(site: Attention, role: str, operand: Operand) -> set[fx.Node]:
    """Return the operand in all its shapes: between the product and the value that is read, and before its views."""
    nodes = {node for r, node in site.region if r == role} | {operand.node}
    wanted, node = {s for s in symbols(operand.layout) if s in set(flat(site.cols))}, operand.node
    while wanted and op(node) in _VIEWS and is_node(node.args[0]) and not _takes_part(node):
        node = node.args[0]
        if tensor(node) is None or node.op != "call_function":
            break
        nodes.add(node)
    return nodes


def _takes_part(node: fx.Node) -> bool:
    source = node.args[0]
    return op(node) in ("slice", "select") and is_node(source) and shape(source) != shape(node)


def _leaves(node: fx.Node, inside: set[fx.Node], role: str) -> bool:
    """Whether ``node`` is used outside. What is computed from scores only to be used inside, as a maximum, is not."""
    steps = 4 if role in ("scores", "probs") else 0
    return any(user not in inside and _is_use(user, node) and not _returns(user, inside, steps) for user in node.users)


def _returns(node: fx.Node, inside: set[fx.Node], steps: int) -> bool:
    return (
        steps > 0
        and node.op != "output"
        and all(user in inside or _returns(user, inside, steps - 1) for user in node.users)
    )


def _is_use(user: fx.Node, node: fx.Node, steps: int = 4) -> bool:
    """Whether ``user`` does something with the values: not their shapes only, and not for nothing."""
    if user.op == "output":
        return True
    if op(user) in WRITES and user.args[0] is node:
        return bool(user.users)
    schema = getattr(user.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return True
    if op(user) in _VIEWS and steps > 0:
        return any(_is_use(further, user, steps - 1) for further in user.users)
    return bool(user.users) and not isinstance(user.meta.get("val"), torch.SymInt | int)
