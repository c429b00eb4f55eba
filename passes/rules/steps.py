"""Calls that continue a key-value cache: what their new queries see, and which of them are padding."""

from __future__ import annotations

import torch

from attnrewrite.passes.attention.form import NEGLIGIBLE, Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.graph.axes import same
from attnrewrite.passes.rules.base import Request


def continues(site: Attention, request: Request) -> bool:
    """Whether the call's keys lie behind those of a cache that holds state; in one of fixed size even the first do."""
    return "position" in request.state or (bool(request.state) and not same_length(site))


def check_causal(site: Attention) -> None:
    """Refuse (AR307) several new queries that see all keys."""
    seen = site.visibility
    masked = seen.facts.offset is not None or seen.dense or not seen.bias_is_small
    if not masked and not same(site.sizes()["L"], 1):
        detail = "the layer keeps state in its key-value cache, which is for causal attention; new queries see all keys"
        raise Reject("AR307", detail, site.anchor, "causal self-attention")


def first_position(t: SiteTensors) -> int | torch.Tensor:
    """Return where the first new key stands among all of them."""
    first: int | torch.Tensor = t.extra["position"] if "position" in t.extra else t.width - t.length
    return first


def step_mask(t: SiteTensors) -> torch.Tensor | None:
    """Return the mask [B|1, H|1, L|1, S] of the new queries: boolean, or a bias with -inf, or None."""
    seen, bias = seen_keys(t), t.bias()
    if bias is None or seen is None:
        return seen if bias is None else bias
    return bias.masked_fill(~seen, float("-inf"))


def seen_keys(t: SiteTensors) -> torch.Tensor | None:
    """Return which keys each query sees, [B|1, H|1, L|1, S] bool, or None where all are: a bias may be a mask, too."""
    seen, bias = t.visible(), t.bias()
    if bias is None or t.site.visibility.bias_is_small:
        return seen
    shown = ~_hides(bias)
    return shown if seen is None else seen & shown


def whole_mask(t: SiteTensors) -> torch.Tensor | None:
    """Return ``beside_positions``, with -inf where a bias that may be a mask hides keys."""
    mask = t.beside_positions()
    if mask is None or mask.dtype == torch.bool or t.site.visibility.bias_is_small:
        return mask
    return mask.masked_fill(_hides(mask), float("-inf"))


def _hides(bias: torch.Tensor) -> torch.Tensor:
    return bias <= max(NEGLIGIBLE, torch.finfo(bias.dtype).min / 2)


def real_tokens(t: SiteTensors, mask: torch.Tensor | None) -> torch.Tensor:
    """Return which new tokens see themselves, [B, L]: all but padding do."""
    B, L, S, device = t.query().shape[0], t.length, t.width, t.values[t.site.query.node].device
    if mask is None:
        return torch.ones(B, L, dtype=torch.bool, device=device)
    seen = mask if mask.dtype == torch.bool else mask != float("-inf")
    own = torch.arange(L, device=device) + first_position(t)
    return seen[:, 0].expand(B, L, S).gather(2, own[None, :, None].expand(B, L, 1)).squeeze(2)


def put(t: SiteTensors, name: str, new: torch.Tensor) -> torch.Tensor:
    """Write ``[B, L, ...]`` of the new tokens into the state ``name``; return that of all keys, ``[B, S, ...]``."""
    state, new = t.extra[name], new.to(t.extra[name].dtype)
    if "position" in t.extra:
        state.index_copy_(1, torch.arange(t.length, device=state.device) + t.extra["position"], new)
    else:
        state.narrow(1, t.width - t.length, t.length).copy_(new)
    return held(t, name)


def held(t: SiteTensors, name: str) -> torch.Tensor:
    """Return the state ``name`` of the call's keys, ``[B, S, ...]``; they may be the first in a cache of fixed size."""
    return t.extra[name].narrow(1, 0, t.width)
