"""Which variant is wanted at which site: globs on layer paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.rewriting.markers import Marker
from attnrewrite.passes.rules.base import Request


@dataclass(eq=False, repr=False)
class Plan:
    """One variant for the layers that ``targets`` name and ``exclude`` does not."""

    variant: str = "sdpa"
    config: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def covers(self, layer: str) -> bool:
        """Whether the plan names this layer."""
        return matches(layer, self.targets) and not matches(layer, self.exclude)


def matches(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a layer path matches one of the globs, as a whole or from a dot on."""
    return any(fnmatchcase(layer, p) or fnmatchcase(layer, f"*.{p}") for p in patterns)


def request_for(site: Attention, markers: list[Marker], plan: Plan) -> Request | None:
    """Return what is wanted at ``site``: its layer's marker first, then the plan; None to leave it out."""
    before = [m for m in markers if m.node.graph is site.output.graph and m.node < site.output and owns(m.layer, site)]
    if before:
        before[-1].used = True
        return before[-1].request
    return Request(plan.variant, plan.config) if plan.covers(site.layer) else None


def owns(layer: str, site: Attention) -> bool:
    """Whether ``layer`` is the site's layer or a module around it."""
    return site.layer == layer or site.layer.startswith(layer + ".")
