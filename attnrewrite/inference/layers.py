"""Layers of transformers' caches that hold, per cached key, what a variant needs beside key and value.

That is a tensor ``[B, S, ...]`` by name in ``state``, for the S keys that the layer gives to the next call, and one of
fixed size ``[B, ...]`` in ``summary``, of all tokens so far. A converted layer puts one of these in the place of an
ordinary one when it first meets an empty cache, so that any cache of these kinds of layers serves, also the one that
``generate`` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attnrewrite.kernels.diagnostics import error


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers has no types here
    """What the kinds below share: the state of sequences goes where their keys go."""

    state: dict[str, Tensor]
    summary: dict[str, Tensor]

    def extend(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append ``[B, L, ...]`` for the next L keys; return the state of all keys, for the call to write into."""
        raise NotImplementedError

    def summarize(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the summary, which begins as ``empty``, for the call to write into."""
        if not self.summary:
            self.summary = dict(empty)
        return dict(self.summary)

    def settle(self) -> None:
        """Let go of what no later call needs. Called when the layer has attended."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state, self.summary = {}, {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take over the sequences ``beam_idx`` ``[B]``."""
        super().reorder_cache(beam_idx)
        self._each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all that is held, sequence by sequence."""
        self.state = {name: change(held) for name, held in self.state.items()}
        self.summary = {name: change(held) for name, held in self.summary.items()}


class DynamicStateLayer(StateLayer, DynamicLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that grows with every call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers has no types here
        self.state, self.summary = {}, {}

    @classmethod
    def like(cls, layer: Any) -> DynamicStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        return cls()

    def extend(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Grow by L keys."""
        for name, new in fresh.items():
            self.state[name] = torch.cat((self.state[name], new), 1) if name in self.state else new
        return dict(self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens. Raises VariantError AR323 where what they did to other state cannot be undone."""
        if tokens_to_remove and (self.summary or "votes" in self.state):
            what = "sums hold them" if self.summary else "their votes are counted"
            raise error("AR323", f"{abs(tokens_to_remove)} tokens are to be removed, and {what}")
        super().crop(tokens_to_remove)
        self.state = {name: held[:, : self.get_seq_length()] for name, held in self.state.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some sequences."""
        super().batch_select_indices(indices)
        self._each(lambda held: held[indices])


class SlidingStateLayer(DynamicStateLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that keeps what the next query of a sliding window can see."""

    def __init__(self, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.state, self.summary = {}, {}

    @classmethod
    def like(cls, layer: Any) -> SlidingStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        return cls(layer.sliding_window)

    def settle(self) -> None:
        """Keep the state of the keys that are kept."""
        self.state = {name: held[:, -self.sliding_window + 1 :] for name, held in self.state.items()}

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens (VariantError AR323): the state of keys that come back into the window is gone."""
        if tokens_to_remove:
            detail = f"{abs(tokens_to_remove)} tokens are to be removed, and what came before the window is gone"
            raise error("AR323", detail)


class StaticStateLayer(StateLayer, StaticLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer of fixed size."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.state, self.summary = {}, {}

    @classmethod
    def like(cls, layer: Any) -> StaticStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        return cls(layer.max_cache_len)

    def extend(self, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write behind the keys that are held; ``position`` says where."""
        device = next(iter(fresh.values())).device
        position = self.cumulative_length.to(device, copy=True)  # the layer counts on in place
        for name, new in fresh.items():
            if name not in self.state:
                self.state[name] = new.new_zeros(new.shape[0], self.max_cache_len, *new.shape[2:])
            self.state[name].index_copy_(1, torch.arange(new.shape[1], device=device) + position, new)
        return {**self.state, "position": position}


KINDS: dict[type, Any] = {
    DynamicLayer: DynamicStateLayer,
    DynamicSlidingWindowLayer: SlidingStateLayer,
    StaticLayer: StaticStateLayer,
}
"""An ordinary layer -> the one that takes its place."""
