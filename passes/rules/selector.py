"""A head of its own that votes: its tensors are linear maps of the layer's input, without positions."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.kernels.selective.selector import projected
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.facts.projection import source
from attnrewrite.passes.graph.axes import flat, same, size_of, symbols
from attnrewrite.passes.graph.nodes import shape
from attnrewrite.passes.rules.base import Request

_NEAREST = "a layer whose input is [batch, tokens, features], and whose queries are a linear map of it"


def has_selector(request: Request) -> bool:
    """Whether votes come from a head of its own."""
    return request.config.get("mode") in ("selector", "new-head")


def check_input(site: Attention, request: Request) -> None:
    """Refuse (AR307) where the layer's input is not ``[B, L, d]``, or not what the selector was made for."""
    read = source(site)
    lead = [s for s in symbols(read.layout[:-1]) if not same(s.size, 1)]
    if lead != [s for s in (*flat(site.batch), *flat(site.rows)) if not same(s.size, 1)]:
        raise Reject("AR307", "the layer's input is not ordered as batch, tokens, features", read.node, _NEAREST)
    if request.marker is None:
        return
    x = _input(site, request)
    wanted = (size_of(flat(site.batch)), size_of(flat(site.rows)), shape(request.parameters["q_proj"])[1])
    if len(shape(x)) != 3 or not all(same(a, b) for a, b in zip(shape(x), wanted, strict=True)):
        detail = f"the layer's input is {list(shape(x))}; the selector was made for {list(wanted)}"
        raise Reject("AR307", detail, x, _NEAREST)


def read_by_selector(site: Attention, request: Request) -> dict[str, fx.Node]:
    """Return the layer's input, for ``SiteTensors.extra``."""
    return {"input": _input(site, request)}


def selector_tensors(t: SiteTensors, request: Request) -> dict[str, torch.Tensor]:
    """Return ``vote_query`` ``[B, L, Ds]`` and ``vote_key`` ``[B, S, Ds]``, by these names.

    Keys in a cache were made from the same input before.
    """
    x = _layer_input(t, request)
    held = t.extra.get("vote_key")
    return {
        "vote_query": projected(x, t.extra["q_proj"]),
        "vote_key": projected(x, t.extra["k_proj"]) if held is None else held,
    }


def whole_head(t: SiteTensors, request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query ``[B, 1, L, D]``, key and value ``[B, 1, S, D]`` of a head that also attends."""
    selector, held = selector_tensors(t, request), t.extra.get("vote_value")
    value = projected(_layer_input(t, request), t.extra["v_proj"]) if held is None else held
    query, key = selector["vote_query"].unsqueeze(1), selector["vote_key"].unsqueeze(1)
    return query, key, value.to(query.dtype).unsqueeze(1)


def add_head(t: SiteTensors, out: torch.Tensor) -> None:
    """Have the layer's output get that of a head ``[B, 1, L, D]``, through the head's own output projection."""
    t.extra["added"].copy_(projected(out.squeeze(1), t.extra["o_proj"]))


def _layer_input(t: SiteTensors, request: Request) -> torch.Tensor:
    """Return the layer's input, [B, L, d]."""
    x = t.extra["input"]
    if request.marker is not None:
        return x
    layout = source(t.site).layout
    return t.arranged(x, layout, (flat(t.site.batch), flat(t.site.rows), layout[-1]))


def _input(site: Attention, request: Request) -> fx.Node:
    """Return what the layer's marker is passed, or where nothing is converted yet, what the queries are made of."""
    x = source(site).node if request.marker is None else request.marker.args[0]
    assert isinstance(x, fx.Node)
    return x
