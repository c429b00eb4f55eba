"""SSA: a temperature per query and per value, from the token and its position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.ssa.reference import ssa_attention, temperature
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.facts.projection import projection
from attnrewrite.passes.rules.base import Request
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
        projection(site, "query")

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's gates and gains, and the query's raw projection."""
        return {**request.parameters, "projection": projection(site, "query").node}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return SSA with the request's options."""
        from attnrewrite.kernels.ssa import op  # defines an operator, which takes its time

        def ssa(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            mask, is_causal = mask_arguments(t, q.dtype)
            # Off the kernels, scaled operands for torch's fused operator are faster than an operator of our own.
            attend = op.ssa_attention if generated(q, v) else ssa_attention
            return attend(
                q,
                k,
                v,
                *temperatures(t, request),
                mask,
                t.site.dropout,
                is_causal=is_causal,
                scale=t.site.scores.alpha,
                enable_gqa=t.grouped,
                softcap=t.site.scores.softcap,
            )

        return ssa


def temperatures(t: SiteTensors, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the temperatures of queries [B, H, L] and values [B, Hkv, S]."""
    raw = t.arranged(t.extra["projection"], projection(t.site, "query").layout, t.site.query_layout)
    sigmoid = request.config.get("position", "linear") == "sigmoid"

    def one(which: str, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        gain: float | torch.Tensor = 0.0
        if f"{which}_gain" in t.extra:
            value = t.extra[f"{which}_gain"]
            value = value if value.dtype == torch.float64 else value.float()
            gain = torch.sigmoid(value) if sigmoid else value
        return temperature(states, t.extra.get(f"{which}_gate"), gain, index)

    q_index, v_index = positions(t)
    return one("q", raw, q_index), one("v", t.value(), v_index)


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
