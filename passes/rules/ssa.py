"""SSA: a temperature per query and per value, from the token and its position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.kernels.ssa.reference import ssa_attention, temperature
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.projection import query_projection
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype, mask_arguments


class SSARule:
    """Gates and position gains per layer; see ``kernels/ssa/README.md`` for the maths."""

    variant = "ssa"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) where the query's raw projection cannot be found."""
        check_terms(site)
        wanted = (site.sizes()["H"], site.sizes()["D"])
        gate = request.parameters.get("q_gate")
        if gate is not None and tuple(gate.meta["val"].shape[-2:]) != wanted:
            detail = f"the gates are for {tuple(gate.meta['val'].shape[-2:])}, the site has {wanted}"
            raise Reject("AR309", detail, site.anchor)
        query_projection(site)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's gates and gains, and the query's raw projection."""
        return {**request.parameters, "projection": query_projection(site).node}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return SSA with the request's options."""
        sigmoid = request.config.get("position", "linear") == "sigmoid"

        def gain(value: torch.Tensor) -> torch.Tensor:
            value = value if value.dtype == torch.float64 else value.float()
            return torch.sigmoid(value) if sigmoid else value

        def ssa(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.value())
            projection = query_projection(t.site)
            raw = t.extra["projection"]
            raw = t.arranged(raw, projection.layout, t.site.query_layout)
            q_index, v_index = positions(t)
            tau_q = temperature(raw, t.extra["q_gate"], gain(t.extra["q_gain"]), q_index)
            tau_v = temperature(v, t.extra["v_gate"], gain(t.extra["v_gain"]), v_index)
            mask, is_causal = mask_arguments(t, q.dtype)
            return ssa_attention(
                q,
                k,
                v,
                tau_q,
                tau_v,
                mask,
                t.site.dropout,
                is_causal=is_causal,
                scale=t.site.scores.alpha,
                enable_gqa=t.grouped,
                softcap=t.site.scores.softcap,
            )

        return ssa


def positions(t: SiteTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n for queries (keys visible to them) and for values (their index among real tokens), both from 1."""
    seen, facts = t.site.visibility, t.site.visibility.facts
    device = t.values[t.site.query.node].device
    index = torch.arange(1, t.width + 1, device=device)[None, None]  # [1, 1, S]
    padding, documents = t.padding(), t.documents()
    real = index if padding is None else padding[:, :, 0].expand(-1, -1, t.width).cumsum(-1)
    visible = t.visible()
    if documents is not None and visible is not None:  # every document counts from 1
        earlier = documents & (index[:, :, None] <= index[..., None])
        real = (earlier if padding is None else earlier & padding).sum(-1)
    if visible is not None and seen.dense and visible.shape[1] == 1:  # the last query sees every real token so far
        real = visible.expand(-1, -1, -1, t.width)[:, :, -1].cumsum(-1)
    if visible is not None and (seen.padding or seen.dense or seen.documents):
        return visible.expand(-1, -1, -1, t.width).sum(-1), real
    if facts.offset is None:
        return index[..., -1:], real
    rows = torch.arange(1, t.length + 1, device=device)[None, None] + facts.offset
    limit = t.width if facts.window is None else facts.window
    return rows.clamp(min=1, max=limit), real
