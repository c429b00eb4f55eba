"""Which heads of a layer route, attend locally, or stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.passes.attention.form import Attention, Reject


@dataclass(frozen=True)
class Heads:
    """Which query heads route, attend locally, or stay as they are; ``group`` of them share a KV head."""

    routing: tuple[int, ...]
    local: tuple[int, ...]
    dense: tuple[int, ...]
    group: int

    @classmethod
    def of(cls, site: Attention, config: Mapping[str, Any], node: fx.Node | None = None) -> Heads:
        """Split the site's heads as the config says. Raises Reject (AR307) where it has no such heads."""
        H, Hkv = site.sizes()["H"], site.sizes()["Hkv"]
        if not isinstance(H, int) or not isinstance(Hkv, int):
            raise Reject("AR307", f"head counts must be numbers, not {H} and {Hkv}", node)
        local = tuple(config["local_heads"])
        chosen = config["routing_heads"]
        routing = tuple(h for h in range(H) if h not in local) if chosen is None else tuple(chosen)
        missing = [h for h in (*routing, *local) if not 0 <= h < H]
        if missing or not routing:
            what = f"has no head {missing[0]}: it has {H}" if missing else f"has {H} heads, all of them local"
            raise Reject("AR307", f"the layer {what}", node)
        return cls(routing, local, tuple(h for h in range(H) if h not in (*routing, *local)), H // Hkv)

    @property
    def sets(self) -> list[int]:
        """The KV heads that have centroids: those of which a query head routes."""
        return sorted({head // self.group for head in self.routing})

    @property
    def own_sets(self) -> list[int]:
        """The set of centroids of each KV head that ``kv_of`` gives the heads that route."""
        return [self.sets.index(number) for number in self.kv_of(self.routing)]

    def kv_of(self, heads: Sequence[int]) -> list[int]:
        """Return the KV heads for ``heads``: one per group where the groups are whole, else one per head."""
        own = [head // self.group for head in heads]
        each = sorted(set(own))
        return each if list(heads) == [g * self.group + n for g in each for n in range(self.group)] else own


def take(x: Tensor, heads: Sequence[int], dim: int = 1) -> Tensor:
    """Return some heads of a tensor, itself where that is all. No index tensor: it would be a constant of the graph."""
    if list(heads) == list(range(x.shape[dim])):
        return x
    return torch.stack([x.select(dim, head) for head in heads], dim=dim)
