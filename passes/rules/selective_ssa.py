"""Selective attention over SSA's temperatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.selective import SelectiveRule
from attnrewrite.passes.rules.ssa import SSARule, tempered


class SelectiveSSARule:
    """Selective attention of ``tau_q q``, ``k`` and ``tau_v v``: what both rules cover."""

    variant = "selective_ssa"
    _votes, _temperatures = SelectiveRule(), SSARule()

    def check(self, site: Attention, request: Request) -> None:
        """Refuse (AR307) what either refuses."""
        self._votes.check(site, request)
        self._temperatures.check(site, request)

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return what both read."""
        return {**self._votes.extra(site, request), **self._temperatures.extra(site, request)}

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return selective attention on scaled queries and values."""
        attend = self._votes.function(request)

        return lambda t: attend(with_temperatures(t, request))


def with_temperatures(t: SiteTensors, request: Request) -> SiteTensors:
    """Return the tensors with temperatures on the queries and on what is attended."""
    queries, values = tempered(t, request)
    return _Tempered(t.site, t.values, t.extra, queries=queries, summed=values)


@dataclass(eq=False, repr=False, kw_only=True)
class _Tempered(SiteTensors):
    """A site's tensors with other queries [B, H, L, D], and other values [B, Hkv, S, Dv] to attend to."""

    queries: torch.Tensor
    summed: torch.Tensor

    def query(self) -> torch.Tensor:
        return self.queries

    def attended(self) -> torch.Tensor:
        return self.summed
