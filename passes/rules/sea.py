"""SEA attention: a small network estimates the attention matrix, and each query attends to the keys it points to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnrewrite.kernels.sea.estimator import (
    Estimate,
    Estimator,
    bidirectional_estimate,
    causal_estimate,
    is_causal,
)
from attnrewrite.kernels.sea.losses import approximation_loss, slice_widths, teacher_statistics
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype

_NEAREST = "self-attention over a whole sequence, causal or not, masked by positions and padding only"


class SEARule:
    """Estimate, selection and mixing per layer; see ``kernels/sea/README.md`` for the maths."""

    variant = "sea"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) all but self-attention over whole sequences with masks that slices can be cut from."""
        seen = site.visibility
        if seen.dense:
            raise _reject(site, "SEA cuts the keys that a query sees into slices, and this mask is custom")
        if seen.documents:
            raise _reject(
                site,
                "SEA cuts slices from one sequence, and this mask splits it into packed documents; transformers reads "
                "them from position_ids where no attention_mask is given",
            )
        if seen.bias_may_hide:
            raise _reject(site, "SEA counts the keys that a query sees, and a bias that is added here may hide some")
        if site.scores.softcap is not None:
            raise _reject(site, "SEA has no soft-cap")
        check_terms(site)
        _check_sequence(site)
        _check_window(site, request)
        if request.parameters:
            _check_kind(site, request)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's estimator."""
        return dict(request.parameters)

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return SEA attention with the request's options."""
        from attnrewrite.kernels.sea.op import sea_attention  # defines an operator, which takes its time

        config = request.config

        def sea(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            estimated, scale_prob, mix = estimate(t, config)
            return sea_attention(
                q,
                k,
                v,
                estimated,
                t.bias(),
                t.site.dropout,
                **visibility(t),
                scale=t.site.scores.alpha,
                enable_gqa=t.grouped,
                padding=padding(t),
                budget=config["budget"],
                budget_rule=config["budget_rule"],
                grouping=config["grouping"],
                scale_prob=scale_prob,
                mix=mix,
                strict_window=config["strict_window"],
                pooling=config["pooling"],
            )

        return sea


def estimate(t: SiteTensors, config: Mapping[str, Any]) -> Estimate:
    """Return the estimate of a site's attention, ``[B, H, L, M]``, and its two factors, ``[B, H, L]``."""
    q, k, v = common_dtype(t.query(), t.key(), t.value())
    estimator = Estimator.named(t.extra, config["slices"])
    if is_causal(t.extra):
        return causal_estimate(q, k, v, estimator, padding(t))[0]
    return bidirectional_estimate(q, k, v, estimator, padding(t))


def approximation(t: SiteTensors, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss of a site's estimate against its own attention (``losses.approximation_loss``), a number."""
    q, k = common_dtype(t.query(), t.key())
    masks = {**visibility(t), "padding": padding(t)}
    teacher = teacher_statistics(
        q, k, config["slices"], t.bias(), scale=t.site.scores.alpha, enable_gqa=t.grouped, **masks
    )
    widths = slice_widths(t.length, config["slices"], device=q.device, **masks)
    return approximation_loss(estimate(t, config).estimated, teacher, widths)


def visibility(t: SiteTensors) -> dict[str, Any]:
    """Return ``is_causal`` and ``window`` as the functions of this variant take them."""
    return {"is_causal": is_causal(t.extra), "window": t.site.visibility.facts.window}


def padding(t: SiteTensors) -> torch.Tensor | None:
    """Return which tokens are real, [B or 1, S] bool, or None where all are."""
    real = t.padding()
    return None if real is None else real[:, 0, 0].expand(-1, t.width)


def _check_sequence(site: Attention) -> None:
    """Refuse queries and keys of different sequences, and queries that continue a cache."""
    from attnrewrite.passes.facts.collect import is_cross

    offset = site.visibility.facts.offset
    if offset not in (None, 0) or (offset == 0 and not same_length(site)):
        raise _reject(
            site,
            "the queries continue a cache, and the estimate's running sums of the earlier tokens are not known; "
            "call the model with use_cache=False",
        )
    if not same_length(site):
        raise _reject(
            site,
            "the queries and keys are different sequences, or the queries continue a cache (use_cache=False); "
            "the estimate needs the value of each query's own token",
        )
    if is_cross(site):
        raise _reject(site, "the keys come from another sequence; the estimate needs the value of each query's token")


def _check_window(site: Attention, request: Request) -> None:
    window = site.visibility.facts.window
    if window is not None and request.config.get("strict_window", True):
        raise _reject(
            site,
            f"the layer sees a window of {window} keys, and the estimate's running sums also hold older ones, "
            "which would decide what is selected; strict_window=False lets them",
        )


def _check_kind(site: Attention, request: Request) -> None:
    """Refuse a call that is masked otherwise than the estimator was made for; one token is the same either way."""
    made, masked = is_causal(request.parameters), site.visibility.facts.offset is not None
    if made == masked or site.sizes()["L"] == 1:
        return
    kinds = ("without a causal mask", "with a causal mask")
    raise _reject(site, f"the layer was converted for attention {kinds[made]}, and is called {kinds[masked]}")


def _reject(site: Attention, why: str) -> Reject:
    return Reject("AR307", why, site.anchor, _NEAREST)
