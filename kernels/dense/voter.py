"""Who votes in selective attention: a head, or a selector of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, named
from attnrewrite.kernels.dense.catalogue import padded
from attnrewrite.kernels.dense.choice import LARGEST_HEAD
from attnrewrite.kernels.generation.emit import Flag
from attnrewrite.kernels.strips import one_head, seen_by_head

Selector = tuple[Tensor, Tensor]
"""Queries ``[B, L, Ds]`` and keys ``[B, S, Ds]`` of votes."""


@dataclass(frozen=True, eq=False)
class Voter:
    """The logits of the votes: ``query`` ``[B, L, Ds]``, ``key`` ``[B, S, Ds]``, ``mask`` ``[B, L, S]`` or None."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None
    slope: Tensor | None = None

    def flags(self, call: Call) -> dict[str, Flag]:
        """Return in what its kernels differ from those of the call."""
        D = self.query.shape[2]
        kind = call.mask_kind()
        if kind == "bias" and self.mask is not None and self.mask.dtype == torch.uint8:
            kind = "pairs"
        settings: dict[str, Flag] = {"SOFTCAP": self.softcap is not None, "ALIBI": self.slope is not None}
        return {"D": D, "PAD_D": padded(D), "MASK": kind, **settings}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of its kernels by these names."""
        found: dict[str, Any] = {"Q": self.query, "K": self.key, "Mask": self.mask, "Slopes": self.slope}
        found |= {"scale": self.scale, "softcap": self.softcap}
        found |= {**named("q", "bmd", self.query), **named("k", "bnd", self.key)}
        return found if self.mask is None else {**found, **named("m", "bmn", self.mask)}


def voter(call: Call, head: int, selector: Selector | None) -> Voter:
    """Return the head ``head`` of a call as voter, or a selector, which no bias and no soft cap acts on."""
    B, H, Hkv, L, S = call.sizes
    if selector is not None:
        seen = seen_by_head(call.mask, head)
        mask = None if seen is None else seen.view(torch.uint8).expand(B, 1, L, S)[:, 0]
        return Voter(*selector, mask, selector[0].shape[2] ** -0.5)
    mask = None
    if call.mask is not None:
        given = call.mask.view(torch.uint8) if call.mask.dtype == torch.bool else call.mask
        mask = one_head(given, head).expand(B, 1, L, S)[:, 0]
    slope = None if call.how.slopes is None else call.how.slopes[head]
    own = call.query[:, head], call.key[:, head // (H // Hkv)]
    return Voter(*own, mask, call.how.scale, call.how.softcap, slope)


def unfit(query: Tensor, vote_query: Tensor | None, vote_key: Tensor | None) -> str | None:
    """Return why the votes of a selector have no kernel beside heads ``query``, or None."""
    if vote_query is None or vote_key is None:
        return None
    if vote_query.dtype != query.dtype or vote_key.dtype != query.dtype:
        return f"its selector has {vote_query.dtype} and {vote_key.dtype} beside {query.dtype}"
    features = vote_query.shape[2]
    return None if 1 <= features <= LARGEST_HEAD else f"its selector has {features} features"
