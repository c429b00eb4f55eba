"""Tuning at the first call of a kernel: the processes for it stay for a while, and another kernel finds them."""

import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from simulated import CPU, H200, HERE

from attnrewrite.kernels.dense import tuned
from attnrewrite.kernels.dense.keys import key_of
from attnrewrite.kernels.dense.launch import launched_by
from attnrewrite.kernels.dense.sample import Recipe, Sample
from attnrewrite.kernels.store.settings import default_store
from attnrewrite.kernels.tuning import now
from attnrewrite.kernels.tuning.workers import Workers


class Watched(Workers):
    """Says what is done to it."""

    def __init__(self):
        super().__init__()
        self.log, self.ended = [], threading.Event()

    def rest(self):
        self.log.append("rest")

    def close(self):
        self.log.append("close")
        self.ended.set()


@pytest.fixture
def tuned_with(monkeypatch):
    """What each search was given; the processes."""
    searches, workers = [], Watched()
    launch()
    tuned.search_as("quick")
    monkeypatch.setattr(now, "present", lambda index: H200)
    monkeypatch.setattr(now, "WorkerBench", lambda *given: SimpleNamespace(workers=given[-1]))
    monkeypatch.setattr(now, "tune", lambda task, facts, bench, *_: searches.append((task, bench)))
    monkeypatch.setattr(now, "_workers", workers)
    yield searches, workers
    if now._timer is not None:
        now._timer.cancel()


@functools.cache
def launch():
    found = []
    with launched_by(found.append):
        Sample(Recipe(1, 2, 2, 64, 64, 16, 16, scale=0.25), CPU).run()
    return found[0]


def tune_a_call():
    now.tune_now(launch(), key_of(launch(), HERE), default_store())


def test_processes_stay_for_the_next_kernel_and_end_when_nobody_comes(tuned_with, monkeypatch):
    searches, workers = tuned_with
    monkeypatch.setattr(now, "_IDLE", 60.0)
    tune_a_call()
    monkeypatch.setattr(now, "_IDLE", 0.01)
    tune_a_call()
    assert [bench.workers for _, bench in searches] == [workers, workers]
    assert workers.ended.wait(10)
    assert workers.log == ["rest", "rest", "close"]


def test_a_search_that_fails_gives_memory_back(tuned_with, monkeypatch):
    _, workers = tuned_with
    monkeypatch.setattr(now, "tune", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune_a_call()
    assert workers.log == ["rest"]
    assert now._using.acquire(timeout=1)
    now._using.release()


def test_two_threads_tune_one_after_another(tuned_with, monkeypatch):
    """Forward and backward run in threads of their own, and there is one process that times."""
    inside, most = [], []

    def tune(*_):
        inside.append(1)
        most.append(len(inside))
        torch.randn(100, 100) @ torch.randn(100, 100)
        inside.pop()

    monkeypatch.setattr(now, "tune", tune)
    threads = [threading.Thread(target=tune_a_call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
