"""A bounded key-value cache for selective attention: what has been voted out is evicted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from attnrewrite.inference.layers import DynamicStateLayer
from attnrewrite.kernels.diagnostics import error


class SelectiveCache(DynamicCache):
    """A cache of which layer l holds at most ``budgets[l]`` tokens (arXiv 2410.02703, context pruning).

    Pass it as ``past_key_values`` to a model whose full-attention layers are all converted to selective attention, or
    to its ``generate``. When a new token makes them too many, the one with the most votes goes, for good: never the
    first real token nor the new one. Sliding layers are bounded by their window.

    Args:
        config: the model's config.
        budgets: tokens per layer, at least 2: one number, or one per layer, None for no bound.

    Raises:
        LoweringError: AR402 for budgets that are too small or not one per layer.
    """

    def __init__(self, config: Any, budgets: int | Sequence[int | None] | None = None) -> None:
        super().__init__(config=config)
        count = len(self.layers)
        given = list(budgets) if isinstance(budgets, Sequence) else [budgets] * count
        if len(given) != count or any(budget is not None and budget < 2 for budget in given):
            raise error("AR402", f"budgets are {budgets}; needed are {count} numbers of at least 2", hint="")
        limits = [sys.maxsize if budget is None else budget for budget in given]
        full = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        for index in full:
            self.layers[index] = PrunedLayer(limits[index], max(limits[i] for i in full))

    def nbytes(self) -> int:
        """Return the bytes of memory that the cache holds: of whole storages, each once."""
        layers: list[Any] = self.layers
        held = [x for layer in layers for x in (layer.keys, layer.values, *getattr(layer, "state", {}).values())]
        storages = [x.untyped_storage() for x in held if x is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PrunedLayer(DynamicStateLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that holds at most ``budget`` tokens between calls; ``widest`` is the largest budget of the cache.

    The model makes one mask for all layers, so that in a call each layer looks as long as the widest one: what it does
    not hold is there as evicted.
    """

    is_croppable = False

    def __init__(self, budget: int, widest: int) -> None:
        super().__init__()
        self.budget, self.widest = budget, widest
        self.limit = torch.tensor(budget)
        self.cumulative_length = 0

    def get_seq_length(self) -> int:
        """Return how many tokens the layer has seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys of the next call, and the position of the first if the newest stands in its place."""
        width = _at_most(self.widest, self.cumulative_length)
        return width + query_length, self.cumulative_length - width

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Grow by what is evicted and by L keys; ``budget`` says how many may live. What is evicted is not got back."""
        for name, held in self.state.items():
            gone = held.new_full((held.shape[0], self._missing(), *held.shape[2:]), torch.inf if name == "votes" else 0)
            self.state[name] = torch.cat((gone, held), 1)
        grown = super().extend(fresh)
        self.summed = tuple(summed)  # nothing is held of drafts: what they evicted is gone
        return {**grown, "budget": self.limit}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens. Raises VariantError AR323 where the layer that calls is not converted."""
        if "votes" not in self.state:
            raise error("AR323", "a layer that is not converted to selective attention uses a cache with budgets")
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (
                torch.nn.functional.pad(held, (0, 0, self._missing(), 0)) for held in (self.keys, self.values)
            )
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def settle(self) -> None:
        """Give the memory of evicted keys back."""
        assert self.keys is not None and self.values is not None
        size = _at_most(self.budget, self.cumulative_length)
        if self.keys.shape[-2] == size:
            return
        live = ~self.state["votes"].isinf()
        order = live.to(torch.uint8).argsort(dim=1, stable=True)[:, -size:]  # [B, K], the living behind, as they were
        for name, held in self.state.items():
            index = order.view(*order.shape, *(1 for _ in held.shape[2:])).expand(-1, -1, *held.shape[2:])
            self.state[name] = held.gather(1, index)
        index = order[:, None, :, None]
        self.keys, self.values = (
            held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[3])) for held in (self.keys, self.values)
        )

    def _missing(self) -> int:
        """How many keys of the widest layer this one does not hold, in a call."""
        held = self.state["votes"].shape[1] if self.keys is None else self.keys.shape[-2]
        return _at_most(self.widest, self.cumulative_length) - held


def _at_most(bound: int, length: int) -> int:
    """Return the smaller one. ``min`` would leave a compiler an expression that it has to carry along."""
    return bound if length > bound else length
