"""The part of a graph that is one site: its nodes in order, what enters, what leaves, and the role of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.regions import is_mode_switch, root, written
from attnrewrite.passes.attention.softmax import softmax_at
from attnrewrite.passes.graph.axes import ALIASES, RESHAPES
from attnrewrite.passes.graph.nodes import is_weight, op, tensor

_FUSED = "scaled_dot_product_attention"
_MOVES = RESHAPES | ALIASES | {"transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze"}
_NEAR = 8
"""How many steps a refused site is followed beyond its products: enough for moves of axes and scales."""
_FAR = 64
"""How many nodes at most are looked at between a refused softmax and its products."""


@dataclass(frozen=True)
class Extract:
    """``nodes`` of one site in the order of their graph; ``roles`` name what some of them, and some inputs, are."""

    nodes: list[fx.Node]
    roles: dict[fx.Node, str]

    @property
    def inputs(self) -> list[fx.Node]:
        """The values that enter: read by ``nodes`` and made elsewhere, each once."""
        inside = set(self.nodes)
        read = dict.fromkeys(x for node in self.nodes for x in node.all_input_nodes)
        return [node for node in read if node not in inside]

    @property
    def outputs(self) -> list[fx.Node]:
        """The values that leave: read elsewhere, or by nothing."""
        inside = set(self.nodes)
        return [node for node in self.nodes if not node.users or any(user not in inside for user in node.users)]


def of_site(site: Attention) -> Extract:
    """Return the nodes between the operands of a matched site and its output."""
    inside = {node for _, node in site.region} | {site.output, site.anchor, site.scores.contraction}
    roles: dict[fx.Node, str] = {}
    for role, node in site.region:
        roles.setdefault(node, role)
    roles |= {site.scores.contraction: "scores", site.anchor: "probs", site.output: "output"}
    roles |= {node: "scale" for node, _, _ in site.scores.factors}
    roles |= {gate.node: "gate" for gate in site.gates}
    roles |= {node: "shift" for node, _ in site.scores.shifts}
    masks = {id(term) for term in site.visibility.terms}
    roles |= {term.node: "mask" if id(term) in masks else "bias" for term in site.scores.terms}
    if site.scores.sink is not None:
        roles[site.scores.sink.node] = "sink"
    roles |= {operand.node: role for role in ("value", "key") for operand, _ in site.blocks(role)}
    roles |= {site.query.node: "query"}
    return Extract(_between(inside), roles)


def of_anchor(anchor: fx.Node) -> Extract:
    """Return what lies around a refused softmax or fused call: back to its products' operands, on to its values."""
    if op(anchor) == _FUSED:
        roles = dict(zip(anchor.all_input_nodes, ("query", "key", "value"), strict=False))
        return Extract(_between({anchor, *_chains([anchor])}), {**roles, anchor: "output"})
    softmax = softmax_at(anchor)
    behind = _products([anchor], back=True)
    beyond = _products([anchor], back=False)
    inside = {anchor, *behind, *beyond, *(softmax.steps if softmax else ())}
    path = _between(inside)
    order = {node: n for n, node in enumerate(path)}
    roles = {node: "scores" if order[node] < order[anchor] else "probs" for node in path}
    roles |= dict.fromkeys(beyond, "output")
    whole = _between({*path, *_chains([*behind, *beyond])})
    whole = _between({*whole, *_writes(whole)})
    return Extract(sorted({*whole, *_switches(whole)}), roles)


def onwards(extract: Extract) -> Extract:
    """Follow the outputs through moves of axes: the way in which heads are folded there tells what the heads are."""
    found = list(extract.nodes)
    for node in extract.outputs:
        for _ in range(_NEAR):
            after = [user for user in node.users if op(user) in _MOVES and user.args[0] is node and user not in found]
            if not after:
                break
            node = after[0]
            found.append(node)
    return Extract(sorted(found), extract.roles)


def _products(start: list[fx.Node], *, back: bool) -> list[fx.Node]:
    """Return the nearest contractions before or behind ``start``; where there are none, what lies next to it."""
    found, seen, todo = list[fx.Node](), set(start), list(start)
    while todo and len(seen) < _FAR:
        node = todo.pop(0)
        for near in node.all_input_nodes if back else node.users:
            if near in seen or not _is_plain(near):
                continue
            seen.add(near)
            (found if op(near) in CONTRACTIONS else todo).append(near)
    return found or [near for x in start for near in (x.all_input_nodes if back else x.users) if _is_plain(near)][:1]


def _chains(products: list[fx.Node]) -> list[fx.Node]:
    """Return what moves and scales the operands of ``products``: nodes that read one computed value."""
    found = list[fx.Node]()
    for product in products:
        for operand in product.all_input_nodes:
            node = operand
            for _ in range(_NEAR):
                read = [x for x in node.all_input_nodes if tensor(x) is not None or op(x) == ""]
                if len(read) != 1 or not _is_plain(node) or op(node) in CONTRACTIONS or is_weight(node):
                    break
                found.append(node)
                node = read[0]
    return found


def _writes(nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the writes in place, between ``nodes``, to what they read, with the views through which both see it."""
    seen = {x for node in nodes for x in [node, *node.all_input_nodes]}
    roots, span = {root(x) for x in seen}, _span(nodes)
    writers = [node for node in span if root(written(node)) in roots and node not in seen]
    changed = {root(written(node)) for node in writers} - {None}
    views = [x for node in [*seen, *writers] if root(node) in changed for x in _views(node)]
    return [*writers, *views] if changed else []


def _switches(nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the switches of autocast and grad mode among ``nodes``, with those that open and close their regions."""
    between = [node for node in _span(nodes) if is_mode_switch(node)]
    autocast = [x for node in between for x in (*node.all_input_nodes, *node.users)]
    graded = [node for node in between if not node.all_input_nodes and not node.users]
    every = [node for node in nodes[0].graph.nodes if graded and node.target is graded[0].target]
    before, after = [x for x in every if x < nodes[0]], [x for x in every if nodes[-1] < x]
    return [*between, *autocast, *before[-1:], *after[:1]]


def _views(node: fx.Node) -> list[fx.Node]:
    """Return the way from ``node`` back to the value whose memory it shows, without that value."""
    found, end = list[fx.Node](), root(node)
    while node is not end:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]  # a node: root() went the same way
    return found


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is an operator on tensors, and no graph of its own."""
    picks = getattr(node.target, "__name__", "") == "getitem" and _is_plain(node.all_input_nodes[0])
    return node.op == "call_function" and (isinstance(node.target, torch._ops.OpOverload) or picks)


def _between(inside: Iterable[fx.Node]) -> list[fx.Node]:
    """Return ``inside`` and all that lies on a way from one of them to another, in order."""
    kept = set(inside)
    span, reached, needed = _span(kept), set[fx.Node](), set[fx.Node]()
    for node in span:
        if node in kept or any(x in reached for x in node.all_input_nodes):
            reached.add(node)
    for node in reversed(span):
        if node in kept or any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in span if node in needed and node in reached]


def _span(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return all of a graph from the first to the last of ``nodes``."""
    ends = list(nodes)
    found, last = [min(ends)], max(ends)
    while found[-1] is not last:
        found.append(found[-1].next)
    return found
