"""Which configurations a launch tries: what is stored for it first, else what the cost model prefers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnrewrite.kernels.dense.configs import Config, configs

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch
    from attnrewrite.kernels.store.modes import Search
    from attnrewrite.kernels.store.record import Timing

_CHOSEN: dict[tuple[object, ...], Sequence[Config]] = {}
"""By what tells launches apart; asked at every launch, so that no key is made."""


def configurations(launch: Launch) -> Sequence[Config]:
    """Return what to try, one after another. The last ones are small: any device can run them."""
    query = launch.call.query
    if not query.is_cuda:  # triton's interpreter, which knows no fast and slow
        return configs(launch.name, launch.widest, launch.bits)
    B, H, _, L, S = launch.call.sizes
    lengths = (B * H - 1).bit_length(), (L - 1).bit_length(), (S - 1).bit_length()
    kind = (launch.emitted.digest, query.dtype, query.device.index, *lengths)
    found = _CHOSEN.get(kind)
    if found is None:
        first = configs(launch.name, launch.widest, launch.bits)
        if torch.cuda.is_current_stream_capturing():
            return first  # no time to look anything up
        found = _CHOSEN[kind] = tuple(dict.fromkeys((*_best(launch), *first)))
    return found


def search_as(search: Search) -> None:
    """Let this process do so from now on about kernels without a record; what was chosen is chosen anew."""
    from attnrewrite.kernels.store.settings import default_store

    store = default_store()
    if store.mode.search != search:
        store.mode = replace(store.mode, search=search)
        _CHOSEN.clear()


def _best(launch: Launch) -> Sequence[Config]:
    from attnrewrite.kernels.dense.keys import here, key_of
    from attnrewrite.kernels.dense.space import SPACES
    from attnrewrite.kernels.store.settings import default_store

    store = default_store()
    first = configs(launch.name, launch.widest, launch.bits)[0]
    if store.mode.search == "off":
        return (first,)
    key = key_of(launch, here(launch.call.query.device.index))
    found = store.find(key, SPACES[launch.name])
    if store.mode.search in ("quick", "full") and (found is None or found.tier == "near"):
        from attnrewrite.kernels.tuning.now import tune_now

        tune_now(launch, key, store)
        found = store.find(key, SPACES[launch.name])
    if found is not None:
        known = (*found.record.timings, *store.timings(found.record.key, SPACES[launch.name]).values())
        return stored(Config.stored(found.record.winner), known)
    from attnrewrite.kernels.tuning.model import preferred

    return (preferred(launch, key, store),)


def stored(winner: Config, known: Iterable[Timing]) -> Sequence[Config]:
    """Return the winner, and after one with descriptors the fastest without: not every launch can have them."""
    if not winner.descriptors:
        return (winner,)
    timed = [(timing.median, Config.stored(timing.config)) for timing in known if timing.median is not None]
    without = [config for _, config in sorted(timed) if not config.descriptors]
    return winner, *without[:1]
