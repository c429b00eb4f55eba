"""What a rule is: whether a variant covers a site, and the function that takes the site's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.site import SiteTensors


@dataclass(eq=False, repr=False)
class Request:
    """What is wanted at a site: a variant with its config, and in a converted model the marker and what it carries.

    ``layer`` is the path of the converted layer, ``parameters`` the nodes of its new parameters and buffers; the first
    argument of ``marker`` is the layer's input. ``learning``: the layer trains, and the variant learns from what it
    sees, apart from gradients. ``state`` are the nodes of what a key-value cache holds for the keys, old and new,
    ``[B, S, ...]``; the function writes into them in place what the next call needs.
    """

    variant: str
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, fx.Node] = field(default_factory=dict)
    marker: fx.Node | None = None
    learning: bool = False
    layer: str = ""
    state: Mapping[str, fx.Node] = field(default_factory=dict)


class Rule(Protocol):
    """How a site becomes one variant."""

    variant: str

    def check(self, site: Attention, request: Request) -> None:
        """Raise Reject where the variant's definition or the available operators do not cover ``site``."""

    def extra(self, site: Attention, request: Request) -> dict[str, fx.Node]:
        """Return further nodes that the function reads, by name."""

    def function(self, request: Request) -> Callable[[SiteTensors], torch.Tensor]:
        """Return the function from the site's tensors to its result [B, H, L, Dv]."""
