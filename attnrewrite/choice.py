"""Choose: which config each attention of a model gets, from a plan of globs on layer paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from attnrewrite.backend import resolve
from attnrewrite.kernels.diagnostics import AttnRewriteError, closest, error
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.pipeline import Pipeline, not_applied
from attnrewrite.passes.report import Site
from attnrewrite.passes.rewriting.select import matches
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.base import Request
from attnrewrite.variants import Swap, VariantConfig

Plan = VariantConfig | str | Mapping[str, VariantConfig | str]
Wishes = list[tuple[tuple[str, ...], VariantConfig]]
Chosen = dict[str, tuple[VariantConfig, Attention, Site]]


def wishes(plan: Plan, targets: tuple[str, ...]) -> Wishes:
    """Return what is wanted, in order: globs on layer paths, and the config for what they match."""
    if isinstance(plan, Mapping):
        return [((glob,), resolve(config)) for glob, config in plan.items()]
    return [(targets, resolve(plan))]


def choose(
    pipeline: Pipeline,
    capture: Capture,
    wanted: Wishes,
    exclude: tuple[str, ...],
) -> Chosen:
    """Pick a config for every site, and check that each can be done."""
    report, found = pipeline.inspect(capture)
    if not report.sites:
        raise error("AR201", f"{len(report.rejections)} softmaxes were found, none of them attention")
    layers = list(dict.fromkeys(row.layer for row in report.sites))
    for patterns, config in wanted:
        if not any(matches(layer, patterns) for layer in layers):
            raise error("AR306", f"{' '.join(patterns)} ({config.variant}): {closest(patterns[0], layers)}")
    chosen: Chosen = {}
    failed: list[Site] = []
    sites = dict(enumerate(found.attentions))
    for number, row in enumerate(report.sites):
        own = next((config for patterns, config in wanted if matches(row.layer, patterns)), None)
        if own is None or matches(row.layer, exclude) or own.variant == "sdpa":
            continue
        row.variant = own.variant
        if number not in sites or not _covers(own, sites[number], row):
            failed.append(row)
        else:
            chosen.setdefault(row.layer, (own, sites[number], row))
    if failed:
        raise not_applied(failed)
    if not chosen:
        raise _nothing(layers, wanted)
    return chosen


def _nothing(layers: list[str], wanted: Wishes) -> AttnRewriteError:
    if any(config.variant != "sdpa" for _, config in wanted):
        return error("AR306", f"nothing is left to convert among: {', '.join(layers)}")
    hint = "for the exact rewrite compile the model: torch.compile(model, backend='attnrewrite')"
    return error("AR306", "sdpa is the exact rewrite, which leaves every layer as it is", hint=hint)


def _covers(config: VariantConfig, site: Attention, row: Site) -> bool:
    if row.status == "rejected":
        return False
    settings = config.to_dict()
    try:
        RULES[config.variant].check(site, Request(settings.pop("variant"), settings))
    except Reject as reject:
        row.rejections.append(reject.rejection(row.layer, row.source))
        return False
    return True


def check_names(model: torch.nn.Module, chosen: Chosen) -> None:
    """Raise VariantError AR311 where a layer has something else under the name of its new parameters."""
    for layer, (config, _, _) in chosen.items():
        if config.adds_parameters and not config.swaps_modules and hasattr(model.get_submodule(layer), config.variant):
            raise error("AR311", f"the layer has an attribute {config.variant!r}", layer=layer)


def swaps(model: torch.nn.Module, capture: Capture, chosen: Chosen, run: Callable[[], object]) -> dict[str, Swap]:
    """Make what takes the places of modules, config by config; ``run`` runs the model as it is."""
    found: dict[str, Swap] = {}
    for config in dict.fromkeys(config for config, _, _ in chosen.values() if config.swaps_modules):
        sites = {layer: (site, row) for layer, (wanted, site, row) in chosen.items() if wanted == config}
        found |= config.swaps(model, capture, sites, run)
    return found
