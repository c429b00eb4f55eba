"""Tune one launch: search within an effort, one process at a time, and keep what was measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.store.key import Key, Pairs, pairs
from attnrewrite.kernels.store.tiers import Store
from attnrewrite.kernels.tuning.calibration import Point
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.rates import rates_of
from attnrewrite.kernels.tuning.search import Bench, Effort, Outcome, Problem, search
from attnrewrite.kernels.tuning.tasks import Task


def tune(
    task: Task,
    device: Device,
    bench: Bench,
    store: Store,
    effort: Effort,
    *,
    among: Sequence[Config] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Outcome | None:
    """Search, and put the record into ``store``, also where the search is interrupted.

    Args:
        task: what is tuned.
        device: where, for the cost model.
        bench: what compiles and times it.
        store: what is there is not timed again; what is found is put there.
        effort: how much may be done.
        among: configurations to compare once more, in the place of all that the kernel declares.
        clock: seconds.

    Returns None where another process is tuning the same key, or there is a record already.
    """
    key = task.key
    space = SPACES[key.kernel]
    with store.lease(key, effort.seconds) as mine:
        if not mine or (not among and stored(store, key)):
            return None
        known = {} if among else store.timings(key, space)
        first = None if among else configs(key.kernel, _widest(key), task.shape.bits)[0]
        allowed = space if task.descriptors else replace(space, descriptors=(False,))
        problem = Problem(key, task.shape, among or allowed, first)

        def keep(outcome: Outcome) -> None:
            record = outcome.record(key, time.time(), origin())
            if record is not None:
                store.put(record)

        return search(problem, bench, device, rates_of(device, key, store), effort, known, clock, keep)


def stored(store: Store, key: Key) -> bool:
    """Whether there is a record of this very key by now."""
    found = store.find(key, SPACES[key.kernel])
    return found is not None and found.tier != "near"


def two_best(store: Store, key: Key) -> list[Config]:
    """Return the winner of a key and the fastest other one: fewer where fewer were timed."""
    found = store.find(key, SPACES[key.kernel])
    if found is None or found.tier == "near":
        return []
    timings = [t for t in store.timings(key, SPACES[key.kernel]).values() if t.median is not None]
    order = sorted(timings, key=lambda timing: (timing.config != found.record.winner, timing.median))
    return [Config.stored(timing.config) for timing in order[:2]]


def points(task: Task, outcome: Outcome) -> list[Point]:
    """Return what was measured, for fitting rates."""
    measured = [(config, timing.median) for config, timing in outcome.timings.items() if timing.median is not None]
    return [Point(task.key.kernel, c, task.shape, outcome.used[c], median / 1e3) for c, median in measured]


def _widest(key: Key) -> int:
    return max((int(value) for name, value in key.dims if name.startswith("PAD_")), default=0)


def origin() -> Pairs:
    """Return what decides nothing, but is good to know."""
    import torch

    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    return pairs(facts)
