"""The library's variants as attentions that can be measured: what a config makes of queries, keys and values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from attnrewrite import functional
from attnrewrite.bench.attentions import Attention, UnsupportedError
from attnrewrite.bench.case import Attend, Setting
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.routing.clusters import affinity, nearest, routing_features
from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.variants import (
    RoutingConfig,
    SdpaConfig,
    SEAConfig,
    SelectiveConfig,
    SelectiveSSAConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    list_variants,
    parse_config,
)

_VOTES = ("mode", "selection_head", "protect_first")
_ROUTING = ("clusters", "window_size", "rule", "paper_causal", "logits", "shared_qk", "temperature")


def variant(text: str) -> Attention:
    """Return a variant, written as NAME or NAME:KEY=VALUE,KEY=VALUE with fields of its config.

    Raises VariantError AR301, AR302, AR303 as ``convert`` does, and AR102 for a field that is about the layer around
    the attention, or a variant from elsewhere.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for setting in re.split(r",(?=\w+=)", rest) if rest else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise error("AR102", f"{setting!r} in {text!r} is not of the form KEY=VALUE", hint="NAME:KEY=VALUE,...")
        settings[key] = value
    return of_config(parse_config(name, settings))


def names() -> list[str]:
    """Return the variants that can be measured."""
    return [info.name for info in list_variants() if info.config in _MAKERS]


def of_config(config: VariantConfig) -> Attention:
    """Return what a config makes of an attention. Raises AR102 as ``variant`` does."""
    if type(config) not in _MAKERS:
        raise error("AR102", f"{config.variant} is not one of this library's variants", hint="")
    make, counted = _MAKERS[type(config)]
    for field in fields(config):
        if field.name not in counted and getattr(config, field.name) != field.default:
            detail = f"{config.variant}.{field.name} is about the layer; what is measured is the attention alone"
            raise error("AR102", detail, hint=f"fields that count here: {', '.join(counted) or 'none'}")
    if isinstance(config, SelectiveConfig) and config.mode == "new-head":
        detail = f"{config.variant}.mode='new-head' adds a head to the layer: measure one head more"
        raise error("AR102", detail, hint="modes that count here: gate, ramp, raw, selector")
    votes = isinstance(config, SelectiveConfig)  # the gradient of the head that votes is a sum over all heads
    shared = isinstance(config, SEAConfig) and config.grouping == "causal_per_batch"

    def build(setting: Setting) -> Attend:
        return make(config, setting)

    every_pair = not isinstance(config, (RoutingConfig, SEAConfig))
    return Attention(build, build, heads=None if votes or shared else 2, every_pair=every_pair)


def _plain(config: SdpaConfig, s: Setting) -> Attend:
    return lambda q, k, v: functional.attention(q, k, v, is_causal=s.case.masked, enable_gqa=True)


def _temperatures(s: Setting) -> tuple[Tensor, Tensor]:
    return s.learned(s.uniform("tau_q", "B", "H", "L")), s.learned(s.uniform("tau_v", "B", "Hkv", "N"))


def _ssa(config: SSAConfig, s: Setting) -> Attend:
    taus = _temperatures(s)
    return lambda q, k, v: functional.ssa_attention(q, k, v, *taus, is_causal=s.case.masked, enable_gqa=True)


def _selective(config: SelectiveConfig, s: Setting) -> Attend:
    if not s.case.causal:
        raise UnsupportedError("votes count for later queries, so that it is causal")
    how: dict[str, Any] = {
        "selection_head": config.selection_head,
        "protect_first": config.protect_first,
        "enable_gqa": True,
    }
    if config.mode in ("gate", "ramp"):
        how["gamma"] = s.learned(torch.ones((), device=s.device))
    if config.mode == "selector":
        how["vote_query"] = s.learned(s.normal("vote_query", "B", "L", "D"))
        how["vote_key"] = s.learned(s.normal("vote_key", "B", "N", "D"))
    if not s.case.step:
        return lambda q, k, v: functional.selective_attention(q, k, v, **how)
    votes = s.uniform("votes", "B", "N")[:, 1:]
    state = functional.SelectionState(votes, torch.zeros_like(votes, dtype=torch.bool))
    return lambda q, k, v: functional.selective_decode(q, k, v, state, **how)[0]


def _selective_ssa(config: SelectiveSSAConfig, s: Setting) -> Attend:
    attend, (tau_q, tau_v) = _selective(config, s), _temperatures(s)
    return lambda q, k, v: attend(scaled(q, tau_q), k, scaled(v, tau_v))


def _symmetric(config: SymmetricConfig, s: Setting) -> Attend:
    """Take the keys as what queries and keys share; in a step the last of them is the query's."""
    pairwise = config.form == "pairwise"
    pair = s.learned(s.normal("pair", "H", "D", "D")) if pairwise else None
    if not s.case.step:
        how: dict[str, Any] = {"is_causal": s.case.causal, "enable_gqa": pairwise, "mask_self": config.mask_self}
        return lambda q, k, v: functional.symmetric_attention(k, v, pair, **how)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        newest = k[:, :, -1:]
        query = newest if pair is None else functional.pairwise_query(newest, pair)
        if config.mask_self and k.shape[2] > 1:
            k, v = k[:, :, :-1], v[:, :, :-1]
        return functional.attention(query, k, v, enable_gqa=True)

    return step


def _routing(config: RoutingConfig, s: Setting) -> Attend:
    """Route by centroids that are drawn; in a step the clusters of cached keys are known."""
    rule = ("argmax_window" if s.case.causal else "topw") if config.rule == "auto" else config.rule
    centroids = s.normal("centroids", "Hkv", config.clusters, "D", dtype=torch.float32)
    how: dict[str, Any] = {
        "rule": rule,
        "is_causal": s.case.causal,
        "scale": config.temperature,
        "enable_gqa": True,
        **{name: getattr(config, name) for name in ("window_size", "shared_qk", "logits", "paper_causal")},
    }
    if s.case.step:
        how["window_size"] = config.window_size or -(-s.case.N // config.clusters)
        how["key_cluster"] = nearest(affinity(routing_features(s.key), centroids))
    return lambda q, k, v: functional.routing_attention(q, k, v, centroids, **how)


def _sea(config: SEAConfig, s: Setting) -> Attend:
    if s.case.step:
        raise UnsupportedError("a step needs the estimator's sums, and the estimator is not part of what is measured")
    estimated = s.learned(s.normal("estimated", "B", "H", "L", config.slices, dtype=torch.float32))
    how = {name: getattr(config, name) for name in ("budget", "budget_rule", "grouping", "pooling")}
    return lambda q, k, v: functional.sea_attention(q, k, v, estimated, is_causal=s.case.causal, enable_gqa=True, **how)


_MAKERS: dict[type[VariantConfig], tuple[Callable[[Any, Setting], Attend], tuple[str, ...]]] = {
    SdpaConfig: (_plain, ()),
    SelectiveConfig: (_selective, _VOTES),
    SSAConfig: (_ssa, ()),
    SymmetricConfig: (_symmetric, ("form", "mask_self")),
    RoutingConfig: (_routing, _ROUTING),
    SEAConfig: (_sea, ("slices", "budget", "budget_rule", "grouping", "pooling")),
    SelectiveSSAConfig: (_selective_ssa, _VOTES),
}
"""What a config makes, and the fields of it that count."""
