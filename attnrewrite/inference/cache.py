"""A bounded key-value cache for selective attention: what has been voted out is evicted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from attnrewrite.inference.layers import DynamicStateLayer
from attnrewrite.kernels.diagnostics import error


class SelectiveCache(DynamicCache):
    """A cache of which layer l holds at most ``budgets[l]`` tokens (arXiv 2410.02703, context pruning).

    Pass it as ``past_key_values`` to a model whose layers are all converted to selective attention, or to its
    ``generate``. When a new token makes them too many, the one with the most votes goes, for good: never the first real
    token nor the new one. In a sliding layer what leaves the window goes first.

    Args:
        config: the model's config.
        budgets: tokens per layer, at least 2: one number, or one per layer, None for no bound.
        in_place: whether full-attention layers see what they hold at its place in the sequence, as attention needs it
            that has a bias by position, or a window which the config does not tell. A call then takes time, and while a
            layer runs memory, for all tokens so far. Sliding layers always do that, within their window.

    Raises:
        LoweringError: AR402 for budgets that are too small or not one per layer.
    """

    def __init__(
        self, config: Any, budgets: int | Sequence[int | None] | None = None, *, in_place: bool = False
    ) -> None:
        super().__init__(config=config)
        count = len(self.layers)
        given = list(budgets) if isinstance(budgets, Sequence) else [budgets] * count
        if len(given) != count or any(budget is not None and budget < 2 for budget in given):
            raise error("AR402", f"budgets are {budgets}; needed are {count} numbers of at least 2", hint="")
        limits = [sys.maxsize if budget is None else budget for budget in given]
        full = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        for index, layer in enumerate(self.layers):
            if index in full:
                widest = max(limits[i] for i in full)
                self.layers[index] = PlacedLayer(limits[index]) if in_place else PackedLayer(limits[index], widest)
            elif type(layer) is DynamicSlidingWindowLayer and given[index] is not None:
                self.layers[index] = PlacedLayer(limits[index], layer.sliding_window)

    def nbytes(self) -> int:
        """Return the bytes of memory that the cache holds: of whole storages, each once."""
        layers: list[Any] = self.layers
        held = [x for layer in layers for x in (layer.keys, layer.values, *getattr(layer, "state", {}).values())]
        storages = [x.untyped_storage() for x in held if x is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PrunedLayer(DynamicStateLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that holds at most ``budget`` tokens between calls. In a call, others are there as evicted."""

    is_croppable = False
    limit_name: str

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.limit = torch.tensor(budget)
        self.cumulative_length = 0

    def room(self, L: int) -> int:
        """Nothing is noted of drafts: what they evicted is gone."""
        return 0

    def get_seq_length(self) -> int:
        """Return how many tokens the layer has seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys of the next call, and the position of the first if the newest stands in its place."""
        return self._width() + query_length, self.cumulative_length - self._width()

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Grow by what is evicted and by L keys, and say how many may live. What is evicted is not got back."""
        for name in fresh.keys() & self.state.keys():
            self.state[name] = self._spread(self.state[name], 1, torch.inf if name == "votes" else 0)
        grown = super().extend(fresh, summed)
        return {**{name: grown[name] for name in fresh}, self.limit_name: self.limit}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens. Raises VariantError AR323 where the layer that calls is not converted."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (self._spread(held, 2, 0) for held in (self.keys, self.values))
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def settle(self) -> None:
        """Give the memory of evicted keys back."""
        assert self.keys is not None and self.values is not None
        size, first = _at_most(self.budget, self._width()), self._oldest()
        if self.keys.shape[-2] == size:
            return
        live = ~self.state["votes"][:, first:].isinf()
        kept = live.to(torch.uint8).argsort(dim=1, stable=True)[:, -size:].sort(1).values + first  # [B, K]
        self._note(kept)
        self.state |= {name: _taken(held, 1, kept) for name, held in self.state.items() if name != "places"}
        self.keys, self.values = (_taken(held, 2, kept) for held in (self.keys, self.values))

    def _width(self) -> int:
        """Return how many earlier keys the next call sees, evicted ones included."""
        raise NotImplementedError

    def _oldest(self) -> int:
        """Return the first key of a call that may be kept."""
        return 0

    def _note(self, kept: Tensor) -> None:
        """Note which keys of a call are kept."""

    def _spread(self, held: Tensor, dim: int, fill: float) -> Tensor:
        """Bring what is held to the width of a call; ``fill`` stands for what is evicted."""
        raise NotImplementedError


class PackedLayer(PrunedLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that gives what it holds side by side, to attention that does not ask for the places of keys.

    The model makes one mask for all layers, so that in a call each layer looks as long as the widest one of the cache.
    """

    limit_name = "budget"

    def __init__(self, budget: int, widest: int) -> None:
        super().__init__(budget)
        self.widest = widest

    def _width(self) -> int:
        return _at_most(self.widest, self.cumulative_length)

    def _spread(self, held: Tensor, dim: int, fill: float) -> Tensor:
        missing = list(held.shape)
        missing[dim] = self._width() - held.shape[dim]
        return torch.cat((held.new_full(missing, fill), held), dim)


class PlacedLayer(PrunedLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that gives what it holds at its place among all earlier tokens, or among those of a sliding window.

    ``state`` also holds the positions of the keys, ``places`` ``[B, K]``, once they are not all that there are.
    """

    limit_name = "budget_in_place"

    def __init__(self, budget: int, window: int = sys.maxsize) -> None:
        super().__init__(budget)
        self.window = window
        self.is_sliding = window != sys.maxsize

    def _width(self) -> int:
        return _at_most(self.window - 1, self.cumulative_length)

    def _oldest(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2] - self._width()

    def _note(self, kept: Tensor) -> None:
        assert self.keys is not None
        self.state["places"] = kept + (self.cumulative_length - self.keys.shape[-2])

    def _spread(self, held: Tensor, dim: int, fill: float) -> Tensor:
        width = self._width()
        if held.shape[dim] == width:
            return held
        shape = list(held.shape)
        shape[dim] = width
        places = self.state["places"] - (self.cumulative_length - width)
        return held.new_full(shape, fill).scatter(dim, _along(places, held, dim), held)


def _taken(held: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Take the keys ``kept`` ``[B, K]`` out of the dimension ``dim``."""
    return held.gather(dim, _along(kept, held, dim))


def _along(index: Tensor, held: Tensor, dim: int) -> Tensor:
    """Bring an index ``[B, K]`` to the shape of ``held``, with K in the place of its dimension ``dim``."""
    shape = [*held.shape[:dim], index.shape[1], *held.shape[dim + 1 :]]
    ones = [1 if at not in (0, dim) else size for at, size in enumerate(shape)]
    return index.view(ones).expand(shape)


def _at_most(bound: int, length: int) -> int:
    """Return the smaller one. ``min`` would leave a compiler an expression that it has to carry along."""
    return bound if length > bound else length
