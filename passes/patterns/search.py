"""Look for one pattern in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.form import Reject
from attnrewrite.passes.graph.axes import AxisError
from attnrewrite.passes.graph.nodes import common_layer, source_line, tensor
from attnrewrite.passes.masks.classify import MaskReader
from attnrewrite.passes.patterns.monomorphism import Host, matches
from attnrewrite.passes.patterns.pattern import Pattern
from attnrewrite.passes.patterns.registry import Extra
from attnrewrite.passes.patterns.site import as_site, place


def look_for(pattern: Pattern, host: Host, reader: MaskReader, taken: set[fx.Node], extra: Extra) -> None:
    """Add the matches of one pattern that share no node with ``taken``, which grows by theirs."""
    for dtype in _dtypes(host.graph):
        found = pattern.skeleton(dtype)
        for ways in matches(host, *found) if found is not None else ():
            placed = (place(pattern, way, host, dtype) for way in ways if not taken & set(way))
            matched = next((x for x in placed if x is not None), None)
            if matched is None:
                continue
            taken |= set(matched.nodes)
            extra.nodes |= set(matched.nodes)
            try:
                extra.attentions.append(as_site(matched, reader))
            except (Reject, AxisError) as failure:
                reject = failure if isinstance(failure, Reject) else Reject("AR203", str(failure), matched.output)
                row = reject.rejection(common_layer(list(matched.nodes)), source_line(matched.output))
                extra.refused.append((matched.output, row))


def _dtypes(graph: fx.Graph) -> list[torch.dtype]:
    """Return the floating dtypes that the graph computes in."""
    held: list[Any] = [tensor(node) for node in graph.nodes]
    return list(dict.fromkeys(x.dtype for x in held if x is not None and x.is_floating_point()))
