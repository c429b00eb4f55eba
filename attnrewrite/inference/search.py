"""Budgets by greedy search: how small each layer's cache may be before a held-out text says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from attnrewrite.inference.cache import SelectiveCache
from attnrewrite.kernels.diagnostics import error


def search_budgets(
    model: Any, batches: Sequence[Tensor], *, tolerance: float = 0.0, step: int | None = None, in_place: bool = False
) -> list[int]:
    """Return a budget per layer for ``SelectiveCache``, such that the model loses no more than ``tolerance``.

    Greedy, as the paper does it (arXiv 2410.02703): from the full length on, or from a layer's window, the layer whose
    budget can shrink by ``step`` with the least loss shrinks, until every further step would lose more.

    Args:
        model: a transformers model, all layers of which are converted to selective attention.
        batches: token ids ``[B, N]`` of one length, of text that the budgets will not be reported on.
        tolerance: how much the mean loss per token may rise, in nats.
        step: by how many tokens a budget shrinks; ``max(8, N / 64)`` if None.
        in_place: as in ``SelectiveCache``.

    Raises:
        LoweringError: AR402 for batches of different lengths, or none.
    """
    lengths = {ids.shape[1] for ids in batches}
    if len(lengths) != 1:
        raise error("AR402", f"batches have lengths {sorted(lengths)}; needed is one", hint="")
    length = lengths.pop()
    smaller = max(8, length // 64) if step is None else step
    layers = DynamicCache(config=model.config).layers
    budgets = [min(length, getattr(layer, "sliding_window", length)) for layer in layers]
    limit = _loss(model, batches, budgets, in_place) + tolerance
    while True:
        tries = [
            [*budgets[:layer], budget - smaller, *budgets[layer + 1 :]]
            for layer, budget in enumerate(budgets)
            if budget - smaller >= 2
        ]
        losses = [_loss(model, batches, given, in_place) for given in tries]
        if not losses or min(losses) > limit:
            return budgets
        budgets = tries[losses.index(min(losses))]


@torch.no_grad()
def _loss(model: Any, batches: Sequence[Tensor], budgets: list[int], in_place: bool) -> float:
    caches = (SelectiveCache(model.config, budgets, in_place=in_place) for _ in batches)
    losses = [
        model(ids, labels=ids, past_key_values=cache, use_cache=True).loss
        for ids, cache in zip(batches, caches, strict=True)
    ]
    return float(torch.stack(losses).double().mean())
