"""Markers: how new parameters reach the graph.

A converted layer passes its input through ``attnrewrite::enter(x, params, site)``. Dynamo and torch.export trace it, so
the graph holds the parameters as true inputs, inside the layer's scope. The rewrite consumes the marker. One that is
executed means that the backend never saw this call, which is an error: a converted model must never compute ordinary
attention in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import layer_path, op
from attnrewrite.passes.rules.base import Request

ENTER = "attnrewrite::enter"
"""The operator's name. ``passes/rewriting/enter.py`` defines it, for models that are converted."""


@dataclass(eq=False, repr=False)
class Marker:
    """One marker in a graph, and what it asks for."""

    node: fx.Node
    layer: str
    request: Request
    used: bool = False


def encode(
    layer: str,
    variant: str,
    config: Mapping[str, Any],
    names: Sequence[str],
    state: Sequence[str] = (),
    *,
    learning: bool = False,
) -> str:
    """Return the marker's ``site`` argument, for parameters ``names`` and behind them the ``state`` of a cache."""
    what = {"layer": layer, "variant": variant, "config": dict(config), "names": list(names), "state": list(state)}
    return json.dumps({**what, "learning": learning}, sort_keys=True)


def find(capture: Capture) -> list[Marker]:
    """Return every marker of every graph, in order."""
    found = []
    for module in capture.graphs():
        for node in module.graph.nodes:
            if op(node) != ENTER:
                continue
            what = json.loads(str(node.args[2]))
            given = dict(zip([*what["names"], *what["state"]], node.args[1], strict=True))
            parameters = {name: given.pop(name) for name in what["names"]}
            learning, layer = what["learning"], what["layer"]
            request = Request(what["variant"], what["config"], parameters, node, learning, layer, given)
            found.append(Marker(node, layer_path(node) or what["layer"], request))
    return found


def has_markers(module: fx.GraphModule) -> bool:
    """Whether a graph, or a body inside it, holds a marker."""
    inner = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    return any(_is_enter(node.target) for m in inner for node in m.graph.nodes)


def _is_enter(target: object) -> bool:
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return isinstance(packet, OpOverloadPacket) and packet._qualified_op_name == ENTER


def consume(marker: Marker) -> None:
    """Remove the marker: what follows reads the layer's input itself."""
    source = marker.node.args[0]
    assert isinstance(source, fx.Node)
    marker.node.replace_all_uses_with(source)
    marker.node.graph.erase_node(marker.node)
