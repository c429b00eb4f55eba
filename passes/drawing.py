"""Drawings of a site as plain data: what it is in the model, and what a variant makes of it.

The nodes of a drawing have names of their own, so that the equal layers of a model have equal drawings, and a report
holds each once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.extract import Extract
from attnrewrite.passes.graph.nodes import is_weight, op, tensor
from attnrewrite.passes.report import Box, Drawing, Report


def drawing(extract: Extract) -> Drawing:
    """Draw a part of a graph: its nodes, and the tensors that enter."""
    entering = [node for node in extract.inputs if tensor(node) is not None]
    return _draw(entering, extract.nodes, extract.roles)


def drawing_of_traced(traced: fx.GraphModule, nodes: list[fx.Node], roles: Mapping[fx.Node, str]) -> Drawing:
    """Draw the graph of a rewrite; ``nodes`` are the values that its placeholders stand for."""
    placeholders = traced.graph.find_nodes(op="placeholder")
    named = {p: roles.get(node, "") for p, node in zip(placeholders, nodes, strict=True)}
    results = {x: "output" for node in traced.graph.find_nodes(op="output") for x in node.all_input_nodes}
    live = set(results)
    for node in reversed(traced.graph.nodes):
        live |= set(node.all_input_nodes) if node in live else set()
    shown = [node for node in traced.graph.nodes if node in live and tensor(node) is not None]
    return _draw(
        [p for p in placeholders if p in shown],
        [node for node in shown if node.op == "call_function"],
        {**named, **results},
    )


def add(report: Report, drawn: Drawing) -> str:
    """Put a drawing into the report, once; return its key, which equal drawings share."""
    key = hashlib.sha256(json.dumps(asdict(drawn), sort_keys=True).encode()).hexdigest()[:12]
    report.drawings.setdefault(key, drawn)
    return key


def stand_ins(site: Attention, tensors: Mapping[str, torch.Tensor]) -> dict[str, fx.Node]:
    """Return nodes that stand for parameters which a conversion of ``site`` would add."""
    mode = site.query.node.meta["val"].fake_mode
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for name, value in tensors.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
    return nodes


def _draw(entering: Iterable[fx.Node], inner: Iterable[fx.Node], roles: Mapping[fx.Node, str]) -> Drawing:
    drawn, names, used = Drawing(), dict[fx.Node, str](), Counter[str]()
    for node, enters in [*((x, True) for x in entering), *((x, False) for x in inner)]:
        kind = "input" if enters else _kind(node)
        role = roles.get(node, "") or ("weight" if enters and is_weight(node) else "")
        base = role if enters and role else kind
        used[base] += 1
        names[node] = base if used[base] == 1 else f"{base}_{used[base]}"
        drawn.nodes.append(Box(names[node], kind, role, *_value(node)))
        if not enters:
            drawn.edges += [[names[x], names[node]] for x in node.all_input_nodes if x in names]
    return drawn


def _kind(node: fx.Node) -> str:
    return op(node) or str(getattr(node.target, "__name__", node.target))


def _value(node: fx.Node) -> tuple[str, list[Any]]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "", []
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return str(value.dtype).removeprefix("torch."), sizes
