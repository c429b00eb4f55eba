"""SEA attention: a small network estimates the attention matrix, and each query attends to the keys it points to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnrewrite.kernels.sea.estimator import (
    Estimate,
    Estimator,
    EstimatorState,
    SEAState,
    Trace,
    bidirectional_estimate,
    is_causal,
    traced_estimate,
)
from attnrewrite.kernels.sea.losses import approximation_loss, attention_loss, slice_widths, teacher_statistics
from attnrewrite.kernels.sea.slices import Rule
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.masks.documents import from_positions
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype
from attnrewrite.passes.rules.steps import check_causal, continues, first_position, put, real_tokens, step_mask

_SUMMARY = ("sums", "outer", "inner", "length", "values")
_DRAFTS = ("drafted_keys", "drafted_values", "drafted_outer", "drafted_inner")
_NEAREST = "self-attention over a whole sequence, causal or not, masked by positions and padding only"


class SEARule:
    """Estimate, selection and mixing per layer; see ``kernels/sea/README.md`` for the maths."""

    variant = "sea"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) all but self-attention with masks that slices can be cut from."""
        if site.scores.softcap is not None:
            raise _reject(site, "SEA has no soft-cap")
        if site.scores.sink is not None:
            detail = "SEA shares out all weight among keys, selected or not, and a sink would take part of it"
            raise Reject("AR401", detail, site.anchor, "attention without sinks, or another variant")
        check_terms(site)
        if request.state:
            check_causal(site)
        if continues(site, request):
            _check_step(site, request)
            return
        _check_mask(site)
        _check_sequence(site)
        _check_window(site, request)
        if request.parameters:
            _check_kind(site, request)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's estimator, and what a cache holds."""
        return {**request.parameters, **request.state}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return SEA attention with the request's options."""
        # These define operators, which takes its time.
        from attnrewrite.kernels.sea.decode import continued
        from attnrewrite.kernels.sea.op import sea_attention

        config = request.config

        def sea(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            (estimated, scale_prob, mix), left = estimate(t, config)
            if request.state and left is not None:
                _remember(t, *left, v)
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

        def step(t: SiteTensors) -> torch.Tensor:
            q, k, v = common_dtype(t.query(), t.key(), t.attended())
            out, after, trace = continued(
                q,
                k,
                v,
                _newest(t, k),
                _newest(t, v),
                Estimator.named(t.extra, config["slices"]),
                _held(t),
                put(t, "real", real_tokens(t, step_mask(t))),
                t.bias(),
                rule=Rule(config["budget"], config["budget_rule"], config["grouping"]),
                scale=t.site.scores.alpha,
                position=t.extra.get("position"),
            )
            _keep(t, after, trace)
            return out

        return lambda t: step(t) if continues(t.site, request) else sea(t)


def _held(t: SiteTensors) -> SEAState:
    """Return what the cache holds of each sequence."""
    sums, outer, inner, length, values = (t.extra[name] for name in _SUMMARY)
    return SEAState(EstimatorState(sums, (outer, inner), length), values)


def _keep(t: SiteTensors, state: SEAState, trace: Trace) -> None:
    """Write it, and where the cache has room for it, what the last tokens did."""
    (sums, (outer, inner), length), values = state
    for name, value in zip(_SUMMARY, (sums, outer, inner, length, values), strict=True):
        t.extra[name].copy_(value)
    for name, each in zip(_DRAFTS, (trace.keys, trace.values, *trace.rows), strict=True):
        if name in t.extra:
            room = t.extra[name]
            room.copy_(each[:, :, each.shape[2] - room.shape[1] :].transpose(1, 2))


def _remember(t: SiteTensors, after: EstimatorState, trace: Trace, v: torch.Tensor) -> None:
    """Note what a whole sequence leaves for the tokens that follow it."""
    real = padding(t)
    if real is None:
        real = torch.ones(1, t.length, dtype=torch.bool, device=v.device)
    put(t, "real", real.expand(v.shape[0], -1))
    kept = v.to(t.extra["values"].dtype).masked_fill(~real[:, None, :, None], 0.0)
    _keep(t, SEAState(after, kept.sum(2)), trace)


def _newest(t: SiteTensors, states: torch.Tensor) -> torch.Tensor:
    """Return those of the new tokens, [B, Hkv, L, D], of all that the cache holds."""
    return states.index_select(2, torch.arange(t.length, device=states.device) + first_position(t))


def estimate(t: SiteTensors, config: Mapping[str, Any]) -> tuple[Estimate, tuple[EstimatorState, Trace] | None]:
    """Return the estimate of a site's attention, ``[B, H, L, M]``, with its two factors, ``[B, H, L]``.

    Behind it, where it is causal, what the estimate of later tokens needs, and what each token did to it.
    """
    q, k, v = common_dtype(t.query(), t.key(), t.value())
    documents, tensors = t.documents(), dict(t.extra)
    if documents is not None:
        from attnrewrite.kernels.sea.documents import one_document

        tensors["features"] = one_document(tensors["features"], documents)
    estimator = Estimator.named(tensors, config["slices"])
    if is_causal(t.extra):
        found, after, trace = traced_estimate(q, k, v, estimator, padding(t))
        return found, (after, trace)
    return bidirectional_estimate(q, k, v, estimator, padding(t)), None


def approximation(t: SiteTensors, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss of a site's estimate against its own attention (``losses.approximation_loss``), a number."""
    q, k = common_dtype(t.query(), t.key())
    masks = {**visibility(t), "padding": padding(t)}
    teacher = teacher_statistics(
        q, k, config["slices"], t.bias(), scale=t.site.scores.alpha, enable_gqa=t.grouped, **masks
    )
    widths = slice_widths(t.length, config["slices"], device=q.device, **masks)
    return approximation_loss(estimate(t, config)[0].estimated, teacher, widths)


def joint_approximation(
    t: SiteTensors, config: Mapping[str, Any], teacher: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the losses of a site's estimate and of its dense attention against that of a ``teacher``, a number.

    Queries and keys of the teacher are as they are scored, [B, H, L, D] and [B, Hkv, L, D].
    """
    q, k = common_dtype(t.query(), t.key())
    masks = {"scale": t.site.scores.alpha, "enable_gqa": t.grouped, **visibility(t), "padding": padding(t)}
    statistics = teacher_statistics(*teacher, config["slices"], t.bias(), **masks)
    widths = slice_widths(t.length, config["slices"], device=q.device, **visibility(t), padding=padding(t))
    approximated = approximation_loss(estimate(t, config)[0].estimated, statistics, widths)
    return approximated + attention_loss(q, k, *teacher, t.bias(), **masks)


def visibility(t: SiteTensors) -> dict[str, Any]:
    """Return ``is_causal`` and ``window`` as the functions of this variant take them."""
    return {"is_causal": is_causal(t.extra), "window": t.site.visibility.facts.window}


def padding(t: SiteTensors) -> torch.Tensor | None:
    """Return which tokens are real, [B or 1, S] bool, or None where all are."""
    real = t.padding()
    return None if real is None else real[:, 0, 0].expand(-1, t.width)


def _check_mask(site: Attention) -> None:
    seen = site.visibility
    if seen.dense:
        raise _reject(site, "SEA cuts the keys that a query sees into slices, and this mask is custom")
    if seen.documents and (seen.facts.offset is None or not all(map(from_positions, seen.documents))):
        raise _reject(site, "SEA cuts slices from one sequence, and this mask splits it into packed documents")
    if seen.bias_may_hide:
        raise _reject(site, "SEA counts the keys that a query sees, and a bias that is added here may hide some")


def _check_step(site: Attention, request: Request) -> None:
    """Refuse queries that continue a cache where the mask of a step does not tell what they see."""
    if not request.config["strict_window"]:
        raise _reject(site, "the mask of a step tells no window, so with strict_window=False no cache is continued")
    if site.dropout > 0:
        raise _reject(site, "steps with a cache have no dropout; call model.eval()")


def _check_sequence(site: Attention) -> None:
    """Refuse queries and keys of different sequences, and queries that continue a cache."""
    from attnrewrite.passes.facts.collect import is_cross

    offset = site.visibility.facts.offset
    if offset not in (None, 0) or (offset == 0 and not same_length(site)):
        raise _reject(
            site,
            "the queries continue a cache that does not hold the estimate's running sums of the earlier tokens; "
            "convert() a model of transformers, or call it with use_cache=False",
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
