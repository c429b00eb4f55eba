"""Selective attention over SSA's temperatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.site import SiteTensors
from attnrewrite.passes.rules.base import Request
from attnrewrite.passes.rules.selective import SelectiveRule
from attnrewrite.passes.rules.ssa import SSARule, temperatures


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

        return lambda t: attend(tempered(t, request))


def tempered(t: SiteTensors, request: Request) -> SiteTensors:
    """Return the tensors with temperatures on the queries and on what is attended."""
    tau_q, tau_v = temperatures(t, request)
    return _Tempered(t.site, t.values, t.extra, plain=t, tau_q=tau_q, tau_v=tau_v)


@dataclass(eq=False, repr=False, kw_only=True)
class _Tempered(SiteTensors):
    """The tensors ``plain`` with temperatures [B, H, L] on the queries and [B, Hkv, S] on what is attended."""

    plain: SiteTensors
    tau_q: torch.Tensor
    tau_v: torch.Tensor

    def query(self) -> torch.Tensor:
        return scaled(self.plain.query(), self.tau_q)

    def attended(self) -> torch.Tensor:
        return scaled(self.plain.attended(), self.tau_v)
