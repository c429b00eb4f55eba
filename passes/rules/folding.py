"""Values that a key-value cache holds times their temperatures: where they lie, and how the new ones get theirs."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.passes.attention.form import Attention, Operand, Reject
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.facts.provenance import WRITES
from attnrewrite.passes.graph.axes import MOVES, AxisError, Dim, Symbol, backward, flat, same
from attnrewrite.passes.graph.nodes import argument, is_node, op, shape, tensor
from attnrewrite.passes.rules.steps import first_position

_CASTS = {"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"}
_PIECES = {"slice", "narrow"}


def cached_values(site: Attention) -> fx.Node:
    """Return the tensor [B, Hkv, S, Dv] from which the site reads its values and which the cache holds.

    It is what the values are but for moves, casts, and keys that are cut off at the ends. Raises Reject (AR307) where
    there is none, or where something else reads it, too.
    """
    near = "values that are read from the cache by this layer alone; or use_cache=False"
    found, way = _source(site) if site.values is None else (None, set[fx.Node]())
    wanted = site.value_layout
    if found is None or len(found.layout) != 4 or any(_long(found.layout[at]) != _long(wanted[at]) for at in (0, 1, 3)):
        raise Reject("AR307", "where the call's own values enter the cache was not found", site.anchor, near)
    inside = {node for _, node in site.region} | {site.output, site.anchor} | way
    held = found.node.op in ("placeholder", "get_attr")
    todo, seen = [found.node], set[fx.Node]()
    while todo:
        node = todo.pop()
        seen.add(node)
        for user in node.users:
            if user.op == "output":
                held = True
            elif user in way or _is_moved(user) or _is_the_caches(user, node, site):
                todo += [user] if user not in seen else []
            elif user not in inside and tensor(user) is not None:
                raise Reject("AR307", "the values in the cache are used elsewhere, too", user, near)
    if not held:
        raise Reject("AR307", "the values that the layer attends to are not those in the cache", site.anchor, near)
    return found.node


def fold(t: SiteTensors, temperature: torch.Tensor) -> torch.Tensor:
    """Multiply the new values in the cache by their temperatures [B, Hkv, L]; return all, [B, Hkv, S, Dv]."""
    held = t.extra["cached_values"]
    if "position" in t.extra:
        held.index_copy_(2, _places(t), scaled(new_values(t), temperature))
        first: int | torch.SymInt = 0
    else:
        held.narrow(2, held.shape[2] - t.length, t.length).copy_(scaled(new_values(t), temperature))
        first = held.shape[2] - t.width
    return held.narrow(2, first, t.width).to(t.values[t.site.value.node].dtype)


def new_values(t: SiteTensors) -> torch.Tensor:
    """Return the new values as the model makes them, [B, Hkv, L, Dv]. A copy, for backward needs them so."""
    held = t.extra["cached_values"]
    if "position" in t.extra:
        return held.index_select(2, _places(t))
    return held.narrow(2, held.shape[2] - t.length, t.length).clone()


def _places(t: SiteTensors) -> torch.Tensor:
    return torch.arange(t.length, device=t.extra["cached_values"].device) + first_position(t)


def _source(site: Attention) -> tuple[Operand | None, set[fx.Node]]:
    """Return what the values are moved, cast or cut from, and the nodes on the way."""
    node, layout, way = site.value.node, site.value.layout, set[fx.Node]()
    try:
        while node.op == "call_function" and node.args and is_node(node.args[0]):
            source = node.args[0]
            if op(node) in _PIECES:
                dim = int(argument(node, 1, "dim", 0)) % len(layout)
                if not same(shape(node)[dim], shape(source)[dim]):
                    layout = (*layout[:dim], (Symbol("part", shape(source)[dim]),), *layout[dim + 1 :])
            elif op(node) in MOVES and (moved := backward(layout, node)) is not None:
                source, layout = moved
            elif op(node) not in _CASTS | WRITES:
                break
            way.add(node)
            node = source
    except AxisError:
        return None, way
    return Operand(node, layout), way


def _is_moved(node: fx.Node) -> bool:
    return op(node) in MOVES | _PIECES


def _is_the_caches(user: fx.Node, node: fx.Node, site: Attention) -> bool:
    """Whether new keys are written, or some are chosen to be kept when the layer has attended."""
    written = op(user) in WRITES and user.args[0] is node
    return written or (op(user) == "gather" and site.output < user)


def _long(dim: Dim) -> list[Symbol]:
    return [symbol for symbol in flat(dim) if not same(symbol.size, 1)]
