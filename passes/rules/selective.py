"""Selective attention: votes of one head, accumulated over earlier queries, are taken off every head's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype, empty_rows

_NEAREST = "causal self-attention over a whole sequence, masked by positions, padding or documents only"


class SelectiveRule:
    """Modes ``raw`` (no parameters) and ``gate`` (one factor ``gamma`` per layer)."""

    variant = "selective"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) all but causal self-attention over whole sequences."""
        facts = site.visibility.facts
        if site.visibility.dense:
            raise Reject(
                "AR307", "selective attention needs a mask it understands; this one is custom", site.anchor, _NEAREST
            )
        if facts.offset is None:
            if same_length(site):
                raise Reject(
                    "AR307",
                    "selective attention is defined for causal attention; this one sees all keys",
                    site.anchor,
                    _NEAREST,
                )
            raise Reject(
                "AR307",
                "selective attention is defined for causal self-attention; here the queries and keys "
                "are different sequences, or the queries continue a cache (use_cache=False)",
                site.anchor,
                _NEAREST,
            )
        if facts.offset != 0 or not same_length(site):
            raise Reject(
                "AR307",
                "the queries continue a cache, whose earlier votes are not known; call the model with use_cache=False",
                site.anchor,
                _NEAREST,
            )
        heads = site.sizes()["H"]
        head = int(request.config.get("selection_head", 0))
        if not isinstance(heads, int) or not 0 <= head < heads:
            raise Reject("AR307", f"selection_head {head} does not exist: the layer has {heads} heads", site.anchor)
        check_terms(site)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's ``gamma``, if it has one."""
        return dict(request.parameters)

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return selective attention with the request's options."""
        from attnrewrite.kernels.selective.op import selective_attention  # defines an operator, which takes its time

        head = int(request.config.get("selection_head", 0))
        protect = bool(request.config.get("protect_first", True))

        def selective(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            padding, documents, bias = t.padding(), t.documents(), t.bias()
            seen = padding if documents is None else documents if padding is None else padding & documents
            mask = seen
            if bias is not None:
                mask = bias if seen is None else bias.masked_fill(~seen, float("-inf"))
            out = selective_attention(
                q,
                k,
                v,
                mask,
                t.site.dropout,
                is_causal=True,
                scale=t.site.scores.alpha,
                enable_gqa=t.grouped,
                window=t.site.visibility.facts.window,
                selection_head=head,
                gamma=t.extra.get("gamma", 1.0),
                protect_first=protect,
                softcap=t.site.scores.softcap,
            )
            return empty_rows(t, out, q, k, v, forward=True)

        return selective
