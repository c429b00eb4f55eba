"""Layers of transformers' caches that hold, per cached key, what a variant needs beside key and value.

That is a tensor ``[B, S, ...]`` by name in ``state``, for the S keys that the layer gives to the next call, and one of
fixed size ``[B, ...]`` in ``summary``, of all tokens so far. A converted layer puts one of these in the place of an
ordinary one when it first meets an empty cache, so that any cache of these kinds of layers serves, also the one that
``generate`` makes.

State that later tokens change cannot be cut as keys are when a cache is to take tokens back, as assisted generation
asks for. A layer that grows therefore also holds it as it was after each of the last tokens of the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attnrewrite.kernels.diagnostics import error

LONGEST_DRAFT = 64
"""Tokens of one call, at most, after each of which state is held."""


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers has no types here
    """What the kinds below share: the state of sequences goes where their keys go."""

    state: dict[str, Tensor]
    summary: dict[str, Tensor]

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Append ``[B, L, ...]`` for the next L keys; return the state of all keys, for the call to write into.

        ``summed`` are the names of the state that later tokens change.
        """
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
        self.summed: tuple[str, ...] = ()
        self.after: dict[str, Tensor] = {}

    @classmethod
    def like(cls, layer: Any) -> DynamicStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        return cls()

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Grow by L keys; ``NAME_after`` ``[B, K, S]`` takes what is summed, as it is after each of the last K tokens.

        One token alone cannot be a draft, nor can what is trained on.
        """
        for name, new in fresh.items():
            self.state[name] = torch.cat((self.state[name], new), 1) if name in self.state else new
        self.summed, self.after = tuple(summed), {}
        for name in summed:
            held, L = self.state[name], fresh[name].shape[1]
            if L > 1 and not torch.is_grad_enabled():
                room = LONGEST_DRAFT if L > LONGEST_DRAFT else L
                self.after[name] = held.new_zeros(held.shape[0], room, held.shape[1])
        return {**self.state, **{f"{name}_after": held for name, held in self.after.items()}}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises VariantError AR323 where a summary holds them, and for as many as the last call had, or more, where they
        changed the state of others.
        """
        count = abs(tokens_to_remove)
        if count:
            self._check_crop(count)
            self.state = {name: held[:, : held.shape[1] - count] for name, held in self.state.items()}
            self.after = {name: held[:, : held.shape[1] - count, :-count] for name, held in self.after.items()}
            self.state |= {name: held[:, -1] for name, held in self.after.items()}
        super().crop(tokens_to_remove)
        if self.state:
            self.settle()

    def _check_crop(self, count: int) -> None:
        if self.summary:
            raise error("AR323", f"{count} tokens are to be removed, and sums hold them")
        room = min((held.shape[1] for held in self.after.values()), default=0)
        if self.summed and count >= room:
            raise error(
                "AR323",
                f"{count} tokens are to be removed; what they did to others is known of {max(room - 1, 0)}",
                hint="remove fewer tokens than the last call had, before the next call",
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some sequences."""
        super().batch_select_indices(indices)
        self._each(lambda held: held[indices])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.after = {}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._each(change)
        self.after = {name: change(held) for name, held in self.after.items()}


class SlidingStateLayer(DynamicStateLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that keeps what the next query of a sliding window can see."""

    def __init__(self, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.state, self.summary, self.summed, self.after = {}, {}, (), {}

    @classmethod
    def like(cls, layer: Any) -> SlidingStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        made = cls(layer.sliding_window)
        made.record_past = layer.record_past
        return made

    def settle(self) -> None:
        """Keep the state of the keys that are kept: those of the window, and drafts until it is known what is right."""
        assert self.keys is not None
        kept = self.keys.shape[-2]
        self.state = {name: held[:, -kept:] for name, held in self.state.items()}
        self.after = {name: held[:, :, -kept:] for name, held in self.after.items()}


class StaticStateLayer(StateLayer, StaticLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer of fixed size."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.state, self.summary = {}, {}

    @classmethod
    def like(cls, layer: Any) -> StaticStateLayer:
        """Return an empty layer in the place of an ordinary one."""
        return cls(layer.max_cache_len)

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
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
