"""Tune a kernel that is about to run: what the modes "quick" and "full" do where nothing is stored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attnrewrite.kernels.tuning.bench import WorkerBench
from attnrewrite.kernels.tuning.device import present
from attnrewrite.kernels.tuning.search import EFFORTS
from attnrewrite.kernels.tuning.tasks import Task
from attnrewrite.kernels.tuning.tune import tune
from attnrewrite.kernels.tuning.workers import Workers

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch
    from attnrewrite.kernels.store.key import Key
    from attnrewrite.kernels.store.tiers import Store

log = logging.getLogger(__name__)

_IDLE = 30.0
"""Seconds for which the processes wait for another kernel."""
_workers = Workers()
_using = threading.Lock()
_timer: threading.Timer | None = None


def tune_now(launch: Launch, key: Key, store: Store) -> None:
    """Search while the call waits. The workers have the device's memory beside what this process holds."""
    effort = EFFORTS[store.mode.search]
    device = launch.call.query.device
    try:
        facts = present(device.index)
    except ValueError as unknown:
        log.warning("%s is not tuned: %s", key.kernel, unknown)
        return
    log.info("tuning %s for at most %.0f s", launch.emitted.stem, effort.seconds)
    task = Task.of(launch, key)
    with _using, _kept() as workers:
        bench = WorkerBench(task.recipe, launch.name, str(device), key.target, workers)
        outcome = tune(task, facts, bench, store, effort)
    if outcome is None:
        log.info("%s is tuned by another process", launch.emitted.stem)
    else:
        log.info("%s: %s after %.1f s %s", launch.emitted.stem, outcome.winner, outcome.seconds, outcome.stopped)


@contextmanager
def _kept() -> Iterator[Workers]:
    """Yield the processes, which keep nothing of the device's memory afterwards and end when they are idle."""
    global _timer
    if _timer is not None:
        _timer.cancel()
    try:
        yield _workers
    finally:
        _workers.rest()
        _timer = threading.Timer(_IDLE, _end)
        _timer.daemon = True
        _timer.start()


def _end() -> None:
    with _using:
        _workers.close()
