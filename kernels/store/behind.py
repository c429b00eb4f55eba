"""A shared store as a process sees it: reading waits a limited time, writing does not wait."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from attnrewrite.kernels.diagnostics import AttnRewriteError
from attnrewrite.kernels.places import without_credentials
from attnrewrite.kernels.store.breaker import Breaker, Worker
from attnrewrite.kernels.store.place import Place, open_place
from attnrewrite.kernels.store.record import Record

log = logging.getLogger(__name__)


class Shared:
    """The store at an address. It is opened at first use; what goes wrong is kept as ``reason`` and never raised."""

    def __init__(self, url: str, breaker: Breaker | None = None) -> None:
        self._url, self._breaker = url, breaker or Breaker()
        self._place: Place | None = None
        self._writer = Worker()
        self._pending: set[Future[None]] = set()
        self._flushed_at_exit = False

    @property
    def address(self) -> str:
        """The address without credentials."""
        return without_credentials(self._url)

    @property
    def reason(self) -> str:
        """Why nothing is asked any more, or empty."""
        return self._breaker.reason.replace(self._url, self.address)

    def fetch(self, folder: str) -> dict[str, bytes]:
        """Return the records of one key's folder by their paths; nothing where the store does not answer in time."""
        place = self._open()
        return {} if place is None else self._breaker.call(lambda: place.fetch(folder)) or {}

    def put(self, record: Record) -> None:
        """Send a record from another thread."""
        place = self._open()
        if place is None or self.reason:
            return
        if not self._flushed_at_exit:
            self._flushed_at_exit = True
            _before_threads_end(self.flush)
        future = self._writer.submit(lambda: place.write(record.path, record.data))
        self._pending.add(future)
        future.add_done_callback(self._sent)

    def flush(self) -> None:
        """Wait until everything is sent, but no longer than a process waits for this store in all."""
        wait(list(self._pending), 0 if self.reason else max(self._breaker.in_all, 0))

    def _open(self) -> Place | None:
        if self._place is None and not self.reason:
            try:
                self._place = open_place(self._url)
            except AttnRewriteError as cause:
                self._breaker.reason = cause.detail
        return self._place

    def _sent(self, future: Future[None]) -> None:
        self._pending.discard(future)
        cause = future.exception()
        if cause is not None:
            log.info("%s refused a record: %s", self.address, cause)


def _before_threads_end(function: Callable[[], None]) -> None:
    """Call a function at the end of the process, while event loops can still start threads: atexit is too late."""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(function)
