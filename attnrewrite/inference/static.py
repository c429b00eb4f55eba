"""Layers of fixed size that hold state, and which kind takes the place of which ordinary one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from attnrewrite.inference.layers import DynamicStateLayer, SlidingStateLayer, StateLayer

if TYPE_CHECKING:
    from attnrewrite.variants import VariantConfig


class StaticStateLayer(StateLayer, StaticLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer of fixed size."""

    def __init__(self, max_cache_len: int, config: VariantConfig) -> None:
        super().__init__(max_cache_len)
        self.config = config
        self.state, self.summary = {}, {}

    @classmethod
    def like(cls, layer: Any, config: VariantConfig) -> StaticStateLayer:
        """Return an empty layer in the place of an ordinary one, for the state of a variant."""
        return cls(layer.max_cache_len, config)

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Write behind the keys that are held; ``position`` says where."""
        first = next(iter(fresh.values()))
        self.awaited, device = first.shape[1], first.device
        position = self.cumulative_length.to(device, copy=True)  # the layer counts on in place
        for name, new in fresh.items():
            if name not in self.state:
                self.state[name] = new.new_zeros(new.shape[0], self.max_cache_len, *new.shape[2:])
            self.state[name].index_copy_(1, torch.arange(new.shape[1], device=device) + position, new)
        return {**self.state, "position": position}


class _Shifting(StaticSlidingWindowLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A sliding layer of fixed size that keeps what it hands out and no copy: what is written into values stays.

    So past its window it does not keep its memory, either.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys, in place while all fit; return all that the call can see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = self.shifted(key_states.shape[-2])
        self.cumulative_length_int += key_states.shape[-2]
        if kept is None:
            return StaticLayer.update(self, key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat((self.keys[:, :, kept], key_states), -2)
        values = torch.cat((self.values[:, :, kept], value_states), -2)
        self.keys, self.values = keys[:, :, -self.max_cache_len :], values[:, :, -self.max_cache_len :]
        return keys, values

    def shifted(self, L: int) -> slice | None:
        """Return which places hold the earlier keys that a call of L sees, if they and its own do not fit."""
        held, size = self.cumulative_length_int, self.max_cache_len
        if held + L <= size:
            return None
        return slice(1, None) if held >= size else slice(0, held)


class StaticSlidingStateLayer(StaticStateLayer, _Shifting):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer of the size of a sliding window: of fixed size until it is full, and then as one that grows."""

    def __init__(self, max_cache_len: int, config: VariantConfig) -> None:
        _Shifting.__init__(self, max_cache_len, max_cache_len)
        self.config = config
        self.state, self.summary = {}, {}

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Write behind the keys that are held, at ``position``; where they shift, append."""
        L = next(iter(fresh.values())).shape[1]
        kept = self.shifted(L)
        if kept is None:
            return super().extend(fresh, summed)
        self.awaited = L
        for name, new in fresh.items():
            self.state[name] = torch.cat((self.state[name][:, kept], new), 1) if name in self.state else new
        return dict(self.state)

    def settle(self) -> None:
        """Keep the state of the keys that are kept."""
        size = self.max_cache_len
        self.state = {name: held if held.shape[1] <= size else held[:, -size:] for name, held in self.state.items()}


KINDS: dict[type, Any] = {
    DynamicLayer: DynamicStateLayer,
    DynamicSlidingWindowLayer: SlidingStateLayer,
    StaticLayer: StaticStateLayer,
    StaticSlidingWindowLayer: StaticSlidingStateLayer,
}
"""An ordinary layer -> the one that takes its place."""
