"""Patterns that users register: their own ways of writing attention, found where the recogniser sees none.

A pattern is a function with the contract of torch's fused attention. Its matches become sites in the same normal form
as all others, and are proved like them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.masks.classify import MaskReader
from attnrewrite.passes.report import Rejection

if TYPE_CHECKING:
    from attnrewrite.passes.patterns.pattern import Pattern

PATTERNS: dict[str, Pattern] = {}
"""The registered patterns by name, in the order in which they are tried."""


@dataclass(eq=False, repr=False)
class Extra:
    """What the patterns find beyond the recogniser: sites, and matches that may not be moved."""

    attentions: list[Attention] = field(default_factory=list)
    refused: list[tuple[fx.Node, Rejection]] = field(default_factory=list)
    nodes: set[fx.Node] = field(default_factory=set)


def search(graph: fx.Graph, known: Sequence[Attention], reader: MaskReader) -> Extra:
    """Find every registered pattern in ``graph``, outside of the attentions that are known."""
    extra = Extra()
    if PATTERNS:
        # Imported here: most processes register no pattern, and need neither the search nor networkx.
        from attnrewrite.passes.patterns.monomorphism import Host
        from attnrewrite.passes.patterns.search import look_for

        host = Host(graph)
        taken = {node for site in known for _, node in site.region} | {site.output for site in known}
        for pattern in list(PATTERNS.values()):
            look_for(pattern, host, reader, taken, extra)
    return extra
