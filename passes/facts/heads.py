"""Which linear map makes a site's queries or keys, and which of its output features are which head's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Operand, Reject
from attnrewrite.passes.facts.names import weight_name
from attnrewrite.passes.facts.projection import only_moved, projection
from attnrewrite.passes.facts.provenance import Provenance, Unknown
from attnrewrite.passes.graph.axes import Layout, arrange
from attnrewrite.passes.graph.nodes import layer_path


@dataclass(eq=False, repr=False)
class HeadRows:
    """The linear map of a site's queries or keys.

    ``module`` is the path of the module whose own weight it is; ``source`` the value that it maps; ``rows``
    ``[heads, D]`` int64, the output feature that is feature d of a head.
    """

    module: str
    source: fx.Node
    rows: torch.Tensor


def head_rows(site: Attention, role: Literal["query", "key"], provenance: Provenance) -> HeadRows:
    """Read the linear map of ``role`` in a graph with sizes that are numbers.

    Raises Reject (AR307) where queries or keys are made by more than one linear map, or by none that is a module.
    """
    what = {"query": "queries", "key": "keys"}[role]
    operand = projection(site, role)
    wanted = site.query_layout if role == "query" else site.key_layout
    try:
        trail = provenance.trail(site.query.node if role == "query" else site.key.node)
    except Unknown:
        raise Reject("AR307", f"where the {what} come from is not known", site.anchor) from None
    if trail.opaque or len(trail.linears) != 1:
        made = "an operator that cannot be read" if trail.opaque else f"{len(trail.linears)} linear maps"
        raise Reject("AR307", f"the {what} are made by {made}; needed is one linear map", site.anchor)
    (linear,) = trail.linears.values()
    name, path = weight_name(linear.weight, provenance.capture), layer_path(linear.node)
    if name is None or name.rpartition(".")[0] != path:
        where = f"{name} in {path or 'the model itself'}"
        raise Reject("AR307", f"the {what} are made with {where}: tied, or used without its own module", linear.node)
    return HeadRows(path, linear.source, _rows(operand, wanted, linear.node, site))


def _rows(operand: Operand, wanted: Layout, linear: fx.Node, site: Attention) -> torch.Tensor:
    """Send the numbers of the output features through the moves between the linear map and its heads."""
    way = only_moved(operand.node)
    if way is None or way[-1] is not linear:
        raise Reject("AR307", "the heads are not cut out of the linear map in a way that is read", site.anchor)
    shape = linear.meta["val"].shape
    values: dict[fx.Node, Any] = {linear: torch.arange(shape[-1]).expand(tuple(shape))}
    for node in reversed(way[:-1]):
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator, or getitem
    return arrange(values[operand.node], operand.layout, wanted, lambda symbol: symbol.size)[0, :, 0]
