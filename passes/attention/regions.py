"""Legality: one attention must lie in one autocast and grad-mode region, and nothing may change its values in place."""

from __future__ import annotations

from torch import fx

from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.graph.nodes import is_node


def check_regions(site: Attention) -> None:
    """Raise Reject where the site straddles a region (AR204) or a value is written in place (AR207)."""
    inside = {node for _, node in site.region} | {site.output, site.anchor, site.scores.contraction}
    inside |= {node for join in site.joins() for node in join.products}
    operands = [operand.node for role in ("key", "value") for operand, _ in site.blocks(role)]
    read = {site.query.node, *operands, *(t.node for t in site.scores.terms)}
    earliest: dict[fx.Node | None, fx.Node] = {}  # of the values that show one memory
    for value in sorted(read | inside, reverse=True):
        earliest[root(value)] = value
    node, depth = min(inside), 0
    while node is not site.output:
        if is_mode_switch(node):
            depth = _switch(node, depth, site)
        elif node not in inside and _overwrites(node, earliest):
            raise Reject("AR207", f"{node} writes in place to a value that this attention reads", node)
        elif node in inside and depth:
            raise Reject("AR204", f"{node} lies in another autocast or grad-mode region", node)
        node = node.next
    if depth:
        raise Reject("AR204", "the attention begins and ends under different modes", node)


def _overwrites(node: fx.Node, earliest: dict[fx.Node | None, fx.Node]) -> bool:
    """Whether ``node`` writes to memory of which an earlier value is read."""
    target = written(node)
    return target is not None and earliest.get(root(target), node) < node


def is_mode_switch(node: fx.Node) -> bool:
    """Whether ``node`` begins or ends an autocast region, or sets the grad mode."""
    name = getattr(node.target, "__name__", "")
    return name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_grad_enabled")


def _switch(node: fx.Node, depth: int, site: Attention) -> int:
    """Count regions opened since the site began; one that closes a region opened before it splits the site."""
    name = getattr(node.target, "__name__", "")
    if name == "_enter_autocast":
        return depth + 1
    if name == "_exit_autocast":
        if depth == 0:
            raise Reject("AR204", "an autocast region ends inside the attention", node)
        return depth - 1
    raise Reject("AR204", "the grad mode changes inside the attention", node)


def written(node: fx.Node) -> fx.Node | None:
    """Return the value that ``node`` writes in place, or None."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.args:
        return None
    return node.args[0] if is_node(node.args[0]) else None


def root(node: fx.Node | None) -> fx.Node | None:
    """Return the value whose memory ``node`` may show: views and writes in place lead back to it."""
    while node is not None and node.args and is_node(node.args[0]) and _may_alias(node):
        node = node.args[0]
    return node


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", "") == "getitem"
    return any(value.alias_info is not None for value in schema.returns)
