"""Autocast and grad-mode regions: torch.export puts each into a graph of its own; here they become statements again.

So an attention that straddles the edge of one is seen as a whole, as it is in the graphs of torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


def write_out(module: fx.GraphModule) -> None:
    """Replace every call of a region by its nodes between switches of the mode; the regions' own graphs stay."""
    for call in list(module.graph.nodes):
        if call.op == "call_function" and call.target in _REGIONS:
            with module.graph.inserting_before(call):
                results = _region(module, call.target, list(call.args), module)
            for user in list(call.users):
                user.replace_all_uses_with(results[user.args[1]])  # a getitem
                module.graph.erase_node(user)
            module.graph.erase_node(call)


def _region(into: fx.GraphModule, target: Any, args: list[Any], owner: fx.GraphModule) -> list[Any]:
    """Write one region into ``into``; its body belongs to ``owner``. Return what it gives."""
    count = _REGIONS[target]
    body = getattr(owner, str(args[count].target))
    known = dict(zip(body.graph.find_nodes(op="placeholder"), args[count + 1 :], strict=True))
    if target is wrap_with_autocast:
        opened = into.graph.call_function(_enter_autocast, tuple(args[:count]))
        results = _copied(into, body, known)
        into.graph.call_function(_exit_autocast, (opened,))
        return results
    into.graph.call_function(torch._C._set_grad_enabled, (args[0],))
    results = _copied(into, body, known)
    into.graph.call_function(torch._C._set_grad_enabled, (not args[0],))  # only changes of the mode are regions
    return results


def _copied(into: fx.GraphModule, body: fx.GraphModule, known: dict[fx.Node, Any]) -> list[Any]:
    """Copy the nodes of ``body``; ``known`` maps its placeholders to values of ``into``."""
    inner = dict[fx.Node, list[Any]]()  # what regions in this one give
    for node in body.graph.nodes:
        if node.op == "output":
            results: Any = fx.map_arg(node.args[0], known.__getitem__)
            return list(results)
        if node.op == "call_function" and node.target in _REGIONS:
            args = list(node.args)
            place = _REGIONS[node.target]
            given = [x if n == place else fx.map_arg(x, known.__getitem__) for n, x in enumerate(args)]
            inner[node] = _region(into, node.target, given, body)
        elif node.args and node.args[0] in inner:
            known[node] = inner[node.args[0]][node.args[1]]
        elif node.op == "get_attr":
            if not _is_body(node):
                known[node] = _shared(into, body, node)
        elif node.op != "placeholder":
            known[node] = into.graph.node_copy(node, known.__getitem__)
    raise AssertionError("a graph without an output")


def _is_body(node: fx.Node) -> bool:
    return bool(node.users) and all(user.target in _REGIONS for user in node.users)


def _shared(into: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Let ``into`` hold what a ``get_attr`` of ``body`` reads."""
    name = f"_region_{len(into.graph.nodes)}"
    setattr(into, name, getattr(body, str(node.target)))
    copy = into.graph.get_attr(name)
    copy.meta = dict(node.meta)
    return copy


_REGIONS = {wrap_with_autocast: 4, wrap_with_set_grad_enabled: 1}
"""How many arguments stand before the body."""
