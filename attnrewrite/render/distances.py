"""How far a converted model is from the original, in a few lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from attnrewrite.distances import Distance


def distance_lines(distance: Distance) -> Iterator[str]:
    """Say how far attention weights, results and next tokens are from the original's."""
    for what, part in (("attention weights", "maps"), ("attention results", "outputs")):
        yield spread(f"relative error of the {what}", {row.layer: getattr(row, part) for row in distance.layers})
    if distance.kl is not None:
        yield f"divergence of the next tokens: {abs(distance.kl):.2g} nats"


def spread(what: str, errors: Mapping[str, Sequence[float]]) -> str:
    """Say between which bounds the layers' errors lie: root mean square over heads."""
    mean = {layer: math.sqrt(sum(x * x for x in found) / len(found)) for layer, found in errors.items()}
    best, worst = min(mean, key=mean.__getitem__), max(mean, key=mean.__getitem__)
    return f"{what}: {mean[best]:.2g} ({best}) to {mean[worst]:.2g} ({worst})"
