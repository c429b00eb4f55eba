"""Which attentions of the registry the memory and time entries run, and in which sizes those that have some."""

from __future__ import annotations

from attnrewrite.bench.attentions import Attention
from attnrewrite.bench.peers import PEERS
from attnrewrite.bench.variants import variant

CLUSTERS_OF, PIXELS, BUDGET = 128, 128, 64
NAMES = ("selective", "ssa", "symmetric", "routing", "sea")


def ours(name: str, length: int) -> Attention:
    """Return the library's attention over so many tokens."""
    options = {
        "selective": "mode=raw",
        "symmetric": "form=symmetric",
        "routing": f"clusters={max(1, length // CLUSTERS_OF)},window_size={CLUSTERS_OF}",
        "sea": f"slices={PIXELS},budget={BUDGET}",
    }
    return variant(f"{name}:{options[name]}" if name in options else name)


def dense(name: str) -> Attention:
    """Return the same in its dense form; routing and SEA have none, so there it is the attention they replace."""
    return PEERS.get(f"{name}-eager", PEERS["eager"])
