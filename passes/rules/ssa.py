"""SSA: a temperature per query and per value, from the token and its position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.kernels.dense.choice import generated
from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.ssa.reference import scaled, ssa_attention, temperature
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.facts.projection import projection
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.folding import cached_values, fold, new_values
from attnrewrite.passes.rules.sdpa import attention_arguments, check_terms, common_dtype
from attnrewrite.passes.rules.steps import continues, put, real_tokens, seen_keys, step_mask


class SSARule:
    """Gates and position gains per layer; see ``kernels/ssa/README.md`` for the maths."""

    variant = "ssa"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) where the query's raw projection cannot be found, or the values in a cache."""
        check_terms(site)
        wanted = (site.sizes()["H"], site.sizes()["D"])
        gate = request.parameters.get("q_gate")
        if gate is not None and tuple(gate.meta["val"].shape[-2:]) != wanted:
            detail = f"the gates are for {tuple(gate.meta['val'].shape[-2:])}, the site has {wanted}"
            raise Reject("AR309", detail, site.anchor)
        projection(site, "query")
        if "index" in request.state:
            cached_values(site)
            if site.visibility.documents and continues(site, request):
                raise Reject("AR307", "queries that continue a cache see packed documents", site.anchor)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's gates and gains, the query's raw projection, and what a cache holds."""
        held = {**request.state, "cached_values": cached_values(site)} if "index" in request.state else {}
        return {**request.parameters, **held, "projection": projection(site, "query").node}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return SSA with the request's options."""
        from attnrewrite.kernels.ssa import op  # defines an operator, which takes its time

        def ssa(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            # Off the kernels, scaled operands for torch's fused operator are faster than an operator of our own.
            attend = op.ssa_attention if generated(q, v) else ssa_attention
            given = attention_arguments(t, q.dtype)
            return attend(q, k, v, *_temperatures(t, request), dropout_p=t.site.dropout, **given)

        def continued(t: SiteTensors) -> torch.Tensor:
            query, value = tempered(t, request)
            q, k, v = common_dtype(query, t.key(), value)
            return attention(q, k, v, dropout_p=t.site.dropout, **attention_arguments(t, q.dtype))

        return continued if "index" in request.state else ssa


def tempered(t: SiteTensors, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [B, H, L, D] and what is attended [B, Hkv, S, Dv], times their temperatures."""
    if "cached_values" not in t.extra:
        tau_q, tau_v = _temperatures(t, request)
        return scaled(t.query(), tau_q), scaled(t.attended(), tau_v)
    values = fold(t, _temperature(t, request, "v", new_values(t), _new_index(t, request)))
    return scaled(t.query(), _of_queries(t, request, positions(t)[0])), values


def _temperatures(t: SiteTensors, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the temperatures of queries [B, H, L] and values [B, Hkv, S]."""
    q_index, v_index = positions(t)
    return _of_queries(t, request, q_index), _temperature(t, request, "v", t.value(), v_index)


def _of_queries(t: SiteTensors, request: Request, index: torch.Tensor) -> torch.Tensor:
    raw = t.arranged(t.extra["projection"], projection(t.site, "query").layout, t.site.query_layout)
    return _temperature(t, request, "q", raw, index)


def _temperature(
    t: SiteTensors, request: Request, which: str, states: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    gain: float | torch.Tensor = 0.0
    if f"{which}_gain" in t.extra:
        value = t.extra[f"{which}_gain"]
        value = value if value.dtype == torch.float64 else value.float()
        gain = torch.sigmoid(value) if request.config.get("position", "linear") == "sigmoid" else value
    return temperature(states, t.extra.get(f"{which}_gate"), gain, index)


def _new_index(t: SiteTensors, request: Request) -> torch.Tensor:
    """Return n of the new values, [B, 1, L], and note it in the cache: older keys may be gone from there."""
    if continues(t.site, request):
        earlier = t.extra["index"].amax(1, keepdim=True)  # those of the new ones are still 0
        new = earlier + real_tokens(t, step_mask(t)).cumsum(1)
    else:
        new = positions(t)[1][:, 0].expand(t.query().shape[0], -1)
    put(t, "index", new)
    return new[:, None]


def positions(t: SiteTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n for queries (keys visible to them) and for values (their index among real tokens), both from 1."""
    seen, facts = t.site.visibility, t.site.visibility.facts
    device = t.values[t.site.query.node].device
    index = torch.arange(1, t.width + 1, device=device)[None, None]  # [1, 1, S]
    padding, documents = t.padding(), t.documents()
    real = index if padding is None else padding[:, :, 0].expand(-1, -1, t.width).cumsum(-1)
    visible = seen_keys(t)
    told = bool(seen.dense) or not seen.bias_is_small  # by a mask that is not read
    if documents is not None and visible is not None:  # every document counts from 1
        earlier = documents & (index[:, :, None] <= index[..., None])
        real = (earlier if padding is None else earlier & padding).sum(-1)
    if visible is not None and told and visible.shape[1] == 1:
        if same_length(t.site):
            real = real_tokens(t, visible).cumsum(-1)[:, None]
        else:  # the last query sees every real token so far
            real = visible.expand(-1, -1, -1, t.width)[:, :, -1].cumsum(-1)
    if visible is not None and (seen.padding or told or seen.documents):
        return visible.expand(-1, -1, -1, t.width).sum(-1), real
    if facts.offset is None:
        return index[..., -1:], real
    rows = torch.arange(1, t.length + 1, device=device)[None, None] + facts.offset
    limit = t.width if facts.window is None else facts.window
    return rows.clamp(min=1, max=limit), real
