"""How long a process waits for a shared store: each answer, all answers, and no more after the first failure."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")
IN_VAIN = 0.4
"""Seconds that a process waits in all for answers that bring nothing."""
PROMPT = 0.05
"""Seconds within which nothing is an answer like any other one: the store is well, and does not have it."""
IN_ALL = 2.0
"""Seconds that a process waits in all."""


class Breaker:
    """Calls of a store, until it has failed or the time is up; afterwards ``reason`` says why, and nothing is called.

    A store that is down costs ``in_vain`` seconds, one that is slow and has what is wanted up to ``in_all``.
    """

    def __init__(self, in_vain: float = IN_VAIN, in_all: float = IN_ALL) -> None:
        self.in_vain, self.in_all = in_vain, in_all
        self.reason = ""
        self._worker = Worker()

    def call(self, work: Callable[[], Answer]) -> Answer | None:
        """Return what ``work`` answers, None where it fails or takes too long. It may go on in the background."""
        patience = min(self.in_vain, self.in_all)
        if self.reason or patience <= 0:
            self.reason = self.reason or "it took too long"
            return None
        start = time.monotonic()
        try:
            answer = self._worker.submit(work).result(patience)
        except TimeoutError:
            self.reason = f"no answer in {patience:.1f} s"
            return None
        except Exception as cause:  # whatever the packages of all those stores raise
            self.reason = f"{type(cause).__name__}: {cause}"
            return None
        taken = time.monotonic() - start
        self.in_all -= taken
        if not answer and taken > PROMPT:
            self.in_vain -= taken
        return answer


class Worker:
    """One thread that does one thing after the other. It ends with the process, whatever it is waiting for."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Let the thread do this later."""
        future: Future[Answer] = Future()
        self._todo.put((work, future))  # type: ignore[arg-type]  # each future goes with its work
        if self._thread is None or not self._thread.is_alive():  # a forked process has lost it
            self._thread = threading.Thread(target=self._run, name="attnrewrite-store", daemon=True)
            self._thread.start()
        return future

    def _run(self) -> None:
        while True:
            work, future = self._todo.get()
            try:
                future.set_result(work())
            except BaseException as cause:  # it belongs to whoever asks the future
                future.set_exception(cause)
