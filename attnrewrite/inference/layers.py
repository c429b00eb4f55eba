"""Layers of transformers' caches that hold, per cached key, what a variant needs beside key and value.

That is a tensor ``[B, S, ...]`` by name in ``state``, for the S keys that the layer gives to the next call, and one of
fixed size ``[B, ...]`` in ``summary``, of all tokens so far. A converted layer puts one of these in the place of an
ordinary one when it first meets an empty cache, so that any cache of these kinds of layers serves, also the one that
``generate`` makes.

State that later tokens change cannot be cut as keys are when a cache is to take tokens back, as assisted generation
asks for. A layer that grows therefore also holds it as it was after each of the last tokens of the last call, and of a
summary what each of them did to it. While it records the past, it holds that of the last tokens of several calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.variants import VariantConfig

LONGEST_DRAFT = 64
"""Tokens of one call, at most, after each of which state is held."""


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers has no types here
    """What the kinds below share: the state of sequences goes where their keys go."""

    config: VariantConfig | None
    state: dict[str, Tensor]
    summary: dict[str, Tensor]
    awaited = 0

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Append ``[B, L, ...]`` for the next L keys; return the state of all keys, for the call to write into.

        ``summed`` are the names of the state that later tokens change.
        """
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys whose state is here. Raises VariantError AR323 where the layer that calls gave none."""
        expected, self.awaited = self.awaited, 0
        if expected != key_states.shape[-2]:
            raise error("AR323", "the cache was filled by a converted layer, and the layer that uses it now is not one")
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[safe-super]  # the ordinary layer's
        return found

    def summarize(self, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the summary, which begins as ``empty``, for the call to write into."""
        if not self.summary:
            self.summary = dict(empty)
        return dict(self.summary)

    def room(self, L: int) -> int:
        """Return of how many tokens of a call it is to be noted what they do to the state of others, and to sums."""
        return 0

    def activate_past_recording(self) -> None:
        """Note that of the tokens of all calls from now on, where the layer can take tokens back."""

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
        self._begin(None)

    def _begin(self, config: VariantConfig | None) -> None:
        self.config = config
        self.state, self.summary = {}, {}
        self.summed: tuple[str, ...] = ()
        self.after: dict[str, Tensor] = {}
        self.drafts: dict[str, Tensor] = {}
        self.record_past = False

    @classmethod
    def like(cls, layer: Any, config: VariantConfig) -> DynamicStateLayer:
        """Return an empty layer in the place of an ordinary one, for the state of a variant."""
        made = cls()
        made.config = config
        return made

    def activate_past_recording(self) -> None:
        """Note what tokens do in all calls from now on."""
        self.record_past = True

    def room(self, L: int) -> int:
        """Return the number of the last tokens of a call that can be taken back.

        One token alone cannot be a draft unless calls are recorded, nor can what is trained on.
        """
        if torch.is_grad_enabled() or (L == 1 and not self.record_past):
            return 0
        return LONGEST_DRAFT if L > LONGEST_DRAFT else L

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Grow by L keys; ``NAME_after`` ``[B, K, S]`` takes what is summed, as it is after each of K last tokens."""
        self.awaited = next(iter(fresh.values())).shape[1]
        if not self.room(self.awaited):
            self.drafts = {}  # those of calls before this one
        for name, new in fresh.items():
            self.state[name] = torch.cat((self.state[name], new), 1) if name in self.state else new
        earlier, self.summed, self.after, given = self.after, tuple(summed), {}, {}
        for name in summed:
            held, L = self.state[name], fresh[name].shape[1]
            if room := self.room(L):
                before = earlier.get(name)
                before = None if before is None else torch.nn.functional.pad(before, (0, L))
                new = held.new_zeros(held.shape[0], room, held.shape[1])
                self.after[name], given[f"{name}_after"] = self._behind(before, new, room)
        return {**self.state, **given}

    def draft(self, new: Mapping[str, Tensor], room: int) -> dict[str, Tensor]:
        """Return ``[B, room, ...]`` by name, or longer by a lead, for what the last tokens do to a summary."""
        earlier, self.drafts, given = self.drafts, {}, {}
        for name, held in new.items():
            self.drafts[name], given[name] = self._behind(earlier.get(name), held, room)
        return given

    def _behind(self, earlier: Tensor | None, new: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Put what is noted of this call behind that of calls before; return all, and the part that is this call's."""
        if earlier is None or not self.record_past:
            return new, new
        lead = new.shape[1] - room
        noted = torch.cat((earlier, new[:, lead:]), 1)[:, -LONGEST_DRAFT - lead :]
        return noted, noted[:, noted.shape[1] - new.shape[1] :]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises VariantError AR323 for as many as the last call had, or more, where they changed the state of others or
        a summary, and calls are not recorded.
        """
        count = abs(tokens_to_remove)
        if count:
            self._check_crop(count)
            self.state = {name: held[:, : held.shape[1] - count] for name, held in self.state.items()}
            self.after = {name: held[:, : held.shape[1] - count, :-count] for name, held in self.after.items()}
            self.state |= {name: held[:, -1] for name, held in self.after.items()}
            if self.config is not None and self.summary:
                self.summary = self.config.taken_back(self.summary, self.drafts, count)
                self.drafts = {name: held[:, : held.shape[1] - count] for name, held in self.drafts.items()}
        super().crop(tokens_to_remove)
        if self.state:
            self.settle()

    def _check_crop(self, count: int) -> None:
        known = min((held.shape[1] for held in (*self.after.values(), *self.drafts.values())), default=0)
        if (self.summed or self.summary) and count >= known:
            raise error(
                "AR323",
                f"{count} tokens are to be removed; what they did to others is known of {max(known - 1, 0)}",
                hint="remove fewer tokens than the last call had, before the next call; a model that drafts token by "
                "token is prepared for it by attnrewrite.inference.as_assistant(model)",
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
        self.after, self.drafts = {}, {}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._each(change)
        self.after = {name: change(held) for name, held in self.after.items()}
        self.drafts = {name: change(held) for name, held in self.drafts.items()}


class SlidingStateLayer(DynamicStateLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # transformers has no types here
    """A layer that keeps what the next query of a sliding window can see."""

    def __init__(self, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self._begin(None)

    @classmethod
    def like(cls, layer: Any, config: VariantConfig) -> SlidingStateLayer:
        """Return an empty layer in the place of an ordinary one, for the state of a variant."""
        made = cls(layer.sliding_window)
        made.config, made.record_past = config, layer.record_past
        return made

    def extend(self, fresh: Mapping[str, Tensor], summed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Grow by L keys; the call sees the state of those that the first of its tokens can see, and of its own."""
        grown = super().extend(fresh, summed)
        if not self.record_past:
            return grown
        seen = self.sliding_window - 1 + next(iter(fresh.values())).shape[1]
        return {
            name: held[:, :, -seen:] if name.endswith("_after") else held[:, -seen:] for name, held in grown.items()
        }

    def settle(self) -> None:
        """Keep the state of the keys that are kept: those of the window, and drafts until it is known what is right."""
        assert self.keys is not None
        kept = self.keys.shape[-2]
        self.state = {name: held[:, -kept:] for name, held in self.state.items()}
        self.after = {name: held[:, :, -kept:] for name, held in self.after.items()}
