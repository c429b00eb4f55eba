"""Routing attention: some heads attend among tokens near the same centroid, some locally, the others as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnrewrite.kernels.routing.clusters import affinity, nearest, routing_features
from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.attention.site import SiteTensors, same_length
from attnrewrite.passes.facts.projection import key_layout, newest_key, projection
from attnrewrite.passes.graph.axes import same
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.heads import Heads, take
from attnrewrite.passes.rules.sdpa import check_terms, common_dtype, empty_rows, mask_arguments
from attnrewrite.passes.rules.steps import check_causal, continues, first_position, put, real_tokens, step_mask

_NEAREST = "self-attention over a whole sequence, masked by positions or padding only"
_LEARNED = (
    "center_query",
    "center_key",
    "centroids",
    "ema_count",
    "ema_sum",
    "steps",
    "step_count",
    "step_sum",
    "lonely",
    "lonely_affinity",
)


class RoutingRule:
    """Centroids per KV head; see ``kernels/routing/README.md`` for the maths."""

    variant = "routing"

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) masks that membership has no place for, and what the options exclude."""
        if request.state:
            check_causal(site)
        if continues(site, request):
            _check_width(site, request.config)
        else:
            _check_mask(site, request.config)
            _check_lengths(site, request)
        _check_scores(site, request)
        heads = Heads.of(site, request.config, site.anchor)
        centroids = request.parameters.get("centroids")
        if centroids is not None and tuple(centroids.meta["val"].shape[::2]) != (len(heads.sets), site.sizes()["D"]):
            wanted = f"{len(heads.sets)} heads of {site.sizes()['D']}"
            raise Reject("AR309", f"centroids are {tuple(centroids.meta['val'].shape)}, needed {wanted}", site.anchor)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return the layer's centroids, what a cache holds, and what is routed: the raw projections."""
        roles: tuple[Literal["query", "key"], ...] = ("query",) if request.config["shared_qk"] else ("query", "key")
        raw = {f"routed_{role}": projection(site, role, newest=bool(request.state)).node for role in roles}
        return {**request.parameters, **request.state, **raw}

    def function(self, request: Request) -> Callable[[SiteTensors], Tensor]:
        """Return routing attention with the request's options."""
        from attnrewrite.kernels.routing import op, reference  # defines operators, which takes its time

        def routing(t: SiteTensors) -> Tensor:
            # The operator has no gradient for a bias, which may be learned.
            learned = t.bias() is not None and torch.is_grad_enabled()
            routing_attention = reference.routing_attention if learned else op.routing_attention
            arguments, heads = routing_arguments(t, request), Heads.of(t.site, request.config)
            centroids = _centroids(t, request, arguments["valid"])
            arguments["centroids"] = take(centroids, heads.own_sets, dim=0)
            if request.state:
                arguments |= _cached(t, request, arguments["valid"], centroids)
            outputs = dict(zip(heads.routing, routing_attention(**arguments).unbind(1), strict=True))
            for own, window in ((heads.local, request.config["local_window"]), (heads.dense, None)):
                if own:
                    outputs |= zip(own, _unrouted(t, request, own, window).unbind(1), strict=True)
            return torch.stack([outputs[head] for head in range(len(outputs))], dim=1)

        return routing


def routing_arguments(t: SiteTensors, request: Request) -> dict[str, Any]:
    """Return the arguments of ``routing_attention`` for the heads of a site that route; ``valid`` is of the call."""
    config, heads = request.config, Heads.of(t.site, request.config)
    q, k, v = common_dtype(t.query(), t.key(), t.attended())
    own, sets = heads.kv_of(heads.routing), heads.own_sets
    arguments = {
        "query": take(q, heads.routing),
        "key": take(k, own),
        "value": take(v, own),
        "centroids": take(t.extra["centroids"], sets, dim=0),
        "center_query": take(t.extra["center_query"], sets, dim=0),
        "attn_mask": _of_heads(_pair_bias(t, request), heads.routing),
        "valid": real_tokens(t, step_mask(t)) if continues(t.site, request) else valid_keys(t),
        "dropout_p": t.site.dropout,
        "is_causal": t.site.visibility.facts.offset is not None,
        "scale": t.site.scores.alpha if config["temperature"] is None else float(config["temperature"]),
        "enable_gqa": True,
        "window": t.site.visibility.facts.window,
        "rule": rule_of(t.site, config),
        "window_size": config["window_size"],
        "shared_qk": config["shared_qk"],
        "logits": config["logits"],
        "paper_causal": config["paper_causal"],
    }
    if not config["shared_qk"]:
        arguments["center_key"] = take(t.extra["center_key"], sets, dim=0)
    if config["logits"] == "raw":
        arguments["routing_query"] = take(routed(t, "query"), heads.routing)
        if not config["shared_qk"] and not request.state:
            arguments["routing_key"] = take(routed(t, "key"), own)
    return arguments


def routed(t: SiteTensors, role: Literal["query", "key"], *, newest: bool = False) -> Tensor:
    """Return what decides on membership: the projection before norms and rotary embedding, [B, H or Hkv, N, D].

    ``newest``: of the call's own keys, where its cache holds others.
    """
    wanted = t.site.query_layout if role == "query" else key_layout(t.site, newest=newest)
    return t.arranged(t.extra[f"routed_{role}"], projection(t.site, role, newest=newest).layout, wanted)


def valid_keys(t: SiteTensors) -> Tensor | None:
    """Return which keys are no padding, [B, S], or None where all are real."""
    padding = t.padding()
    return None if padding is None else padding[:, 0, 0].expand(t.query().shape[0], -1)


def _pair_bias(t: SiteTensors, request: Request) -> Tensor | None:
    """Return what is added to the logits of a pair, [B|1, H|1, L|1, S|1]: biases, and -inf between documents.

    The last keys of a cluster are those of the query's own document first, so that hiding the others costs no key.
    The same holds of a window in the mask of a call that continues a cache; padding is in no cluster.
    """
    if continues(t.site, request):
        mask = step_mask(t)
        return mask if mask is None or mask.is_floating_point() else torch.where(mask, 0.0, float("-inf"))
    bias, documents = t.bias(), t.documents()
    if documents is None:
        return bias
    return torch.where(documents, 0.0 if bias is None else bias, float("-inf"))


def rule_of(site: Attention, config: Mapping[str, Any]) -> str:
    """Return the rule of membership: of ``auto``, the one that fits the site's mask."""
    if config["rule"] != "auto":
        return str(config["rule"])
    return "topw" if site.visibility.facts.offset is None else "argmax_window"


def _of_heads(mask: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else take(mask, heads)


def _centroids(t: SiteTensors, request: Request, real: Tensor | None) -> Tensor:
    """Return the centroids [Hc, C, D] once they are set; a layer in training learns from its batch."""
    from attnrewrite.kernels.routing import learn

    heads, newest = Heads.of(t.site, request.config), bool(request.state)
    if not request.learning:
        ready: Tensor = learn.routing_ready(t.extra["centroids"], t.extra["steps"])
        return ready
    torch.ops.attnrewrite.routing_learn(
        take(routed(t, "query"), heads.routing).detach(),
        None if request.config["shared_qk"] else take(routed(t, "key", newest=newest), heads.sets).detach(),
        *(t.extra[name] for name in _LEARNED),
        [heads.sets.index(head // heads.group) for head in heads.routing],
        request.config["reseed_every"],
        real if newest or same_length(t.site) else None,
        real,
    )
    return t.extra["centroids"]


def _cached(t: SiteTensors, request: Request, real: Tensor | None, centroids: Tensor) -> dict[str, Any]:
    """Note in the cache to which clusters the call's keys belong; return the arguments that take all keys from it."""
    heads, shared = Heads.of(t.site, request.config), request.config["shared_qk"]
    role: Literal["query", "key"] = "query" if shared else "key"
    raw = take(routed(t, role, newest=True), heads.sets).detach()
    own = nearest(affinity(routing_features(raw, t.extra[f"center_{role}"]), centroids), real)  # [B, Hc, L]
    clusters = put(t, "clusters", own.transpose(1, 2)).transpose(1, 2)  # [B, Hc, S]
    found = {
        "key_cluster": take(clusters, heads.own_sets),
        "position": t.extra.get("position"),
        "valid": clusters[:, 0] < centroids.shape[1],
        "rule": "argmax_window",
        "is_causal": True,
    }
    if shared:
        queries = put(t, "queries", take(t.query(), heads.sets).transpose(1, 2)).transpose(1, 2)  # [B, Hc, S, D]
        found["key"] = take(queries, heads.own_sets).to(t.query().dtype)
    return found


def _unrouted(t: SiteTensors, request: Request, heads: Sequence[int], window: int | None) -> Tensor:
    """Compute the heads that do not route: the site's own attention, to keys less than ``window`` positions away."""
    from attnrewrite.kernels.routing.mass import near_pairs

    kv = [head // (t.site.sizes()["H"] // t.site.sizes()["Hkv"]) for head in heads]
    q, k, v = common_dtype(t.query(), t.key(), t.attended())
    q, k, v = take(q, heads), take(k, kv), take(v, kv)
    mask, is_causal, _ = mask_arguments(t, q.dtype)  # windows go apart only beside sinks, which are refused
    mask = _of_heads(mask, heads)
    if window is not None:
        first = first_position(t) if request.state else 0
        is_causal = t.site.visibility.facts.offset is not None or bool(request.state)
        near = near_pairs(t.length, t.width, window, is_causal=is_causal, device=q.device, first=first)
        mask, is_causal = _within(near[None, None], mask), False
    out = attention(q, k, v, mask, t.site.dropout, is_causal=is_causal, scale=t.site.scores.alpha)
    return out if window is not None else empty_rows(t, out, q, k, v)


def _within(near: Tensor, mask: Tensor | None) -> Tensor:
    """Join a window [1, 1, L, S] with the site's mask. A real query is in its own window: its row is not empty."""
    if mask is None:
        return near
    if mask.dtype == torch.bool:
        return mask & near
    return torch.where(near, mask, torch.finfo(mask.dtype).min)


def _check_mask(site: Attention, config: Mapping[str, Any]) -> None:
    seen = site.visibility
    if seen.dense:
        detail = "membership of a cluster has no query, and this mask has one"
        raise Reject("AR307", detail, site.anchor, _NEAREST)
    if seen.documents and (seen.facts.offset is None or rule_of(site, config) == "topw"):
        detail = "only the rule 'argmax_window' of causal layers keeps to the packed documents of a sequence"
        raise Reject("AR307", detail, site.anchor, _NEAREST)


def _check_width(site: Attention, config: Mapping[str, Any]) -> None:
    if config["window_size"] is None:
        detail = "window_size is None, so that it follows the length, and earlier tokens would change with later ones"
        raise Reject("AR307", detail, site.anchor, "a number as window_size, or generation with use_cache=False")


def _check_lengths(site: Attention, request: Request) -> None:
    config = request.config
    offset, rule = site.visibility.facts.offset, rule_of(site, config)
    whole = same_length(site)
    if offset is not None and (offset != 0 or not whole):
        detail = (
            "the queries continue a key-value cache that does not hold the clusters of its keys; convert() a model of "
            "transformers with rule='argmax_window', or call it with use_cache=False"
        )
        raise Reject("AR307", detail, site.anchor, _NEAREST)
    if offset is not None and rule == "topw" and not config["paper_causal"]:
        detail = "rule 'topw' lets later tokens decide which earlier ones a cluster takes: take 'argmax_window', or "
        raise Reject("AR307", detail + "accept the leak with paper_causal=True", site.anchor, _NEAREST)
    if whole:
        return
    if config["rule"] != "topw" or config["paper_causal"] or config["shared_qk"] or same(site.sizes()["L"], 1):
        detail = (
            "queries and keys are different sequences, which have no common order, or the queries continue a "
            "key-value cache (use_cache=False); cross-attention takes rule='topw', not shared, and several queries"
        )
        raise Reject("AR307", detail, site.anchor, _NEAREST)


def _check_scores(site: Attention, request: Request) -> None:
    config, newest = request.config, bool(request.state)
    if site.scores.sink is not None:
        detail = "a sink is learned beside all keys; beside the few of a cluster it would take weight that is theirs"
        raise Reject("AR401", detail, site.anchor, "attention without sinks, or another variant")
    check_terms(site)
    if site.scores.softcap is not None:
        raise Reject("AR401", "routing attention has no soft-cap", site.anchor)
    if config["shared_qk"]:
        if not same(site.sizes()["H"], site.sizes()["Hkv"]):
            raise Reject("AR307", "shared_qk needs a key head per query head; this layer groups them", site.anchor)
    else:
        scored = newest_key(site) if newest else site.key
        if projection(site, "key", newest=newest).node is not scored.node and config["logits"] == "normed":
            _refuse_normed(site)
    plain = projection(site, "query").node is site.query.node and not site.scores.factors
    if config["logits"] == "normed" and not plain:
        _refuse_normed(site)


def _refuse_normed(site: Attention) -> None:
    detail = "logits='normed' scores what is routed, and here rotary embedding, a norm or a factor comes between"
    raise Reject("AR307", detail, site.anchor, "queries and keys that are scored as the projections give them")
