"""Our operators in operators of torch, for compilers that know only those.

A decomposition has static shapes, no loops and no data-dependent control flow; it scores all pairs, so its memory grows
with L x S. It has no closed-form backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Decomposition = Callable[..., Tensor]


def decompositions() -> dict[Any, Decomposition]:
    """Return a decomposition for every operator that an inference graph may hold, as a decomposition table of torch.

    Importing the operators defines them, which takes its time.
    """
    import attnrewrite.kernels.routing.learn
    import attnrewrite.kernels.routing.op
    import attnrewrite.kernels.sea.documents
    import attnrewrite.kernels.sea.op
    import attnrewrite.kernels.selective.op
    import attnrewrite.kernels.ssa.op
    import attnrewrite.kernels.symmetric.op  # noqa: F401  # defines the operators, as those before
    from attnrewrite.kernels.routing.decomposition import routing_attention, routing_ready
    from attnrewrite.kernels.sea.decomposition import sea_attention, sea_one_document
    from attnrewrite.kernels.selective.decomposition import selective_attention
    from attnrewrite.kernels.ssa.decomposition import ssa_attention
    from attnrewrite.kernels.symmetric.decomposition import symmetric_attention

    functions = (
        routing_attention,
        routing_ready,
        sea_attention,
        sea_one_document,
        selective_attention,
        ssa_attention,
        symmetric_attention,
    )
    return {getattr(torch.ops.attnrewrite, function.__name__).default: function for function in functions}
