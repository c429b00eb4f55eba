"""The processes of a search, which stay for the next kernel: to start one takes longer than to compile a kernel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from attnrewrite.kernels.tuning.child import WORKER, Child, WorkerDiedError

_MOST_COMPILERS = 16
_REST = 10.0
"""Seconds until the memory of a device must have been given back."""


class Workers:
    """One process that runs candidates on a device, and some that compile. Each starts when it is first asked."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._compilers: list[Child] = []
        self.runner = Child(command)

    def compilers(self, count: int) -> Sequence[Child]:
        """Return so many processes that compile, and not more than there are processors."""
        most = max(1, min(count, os.cpu_count() or 1, _MOST_COMPILERS))
        self._compilers += (Child(self._command) for _ in range(most - len(self._compilers)))
        return self._compilers[:most]

    def rest(self) -> None:
        """Give the memory of the device back."""
        if self.runner.alive:
            with suppress(WorkerDiedError):
                self.runner.ask(_REST, do="rest")

    def close(self) -> None:
        """End all of them. What is asked later starts others."""
        for child in (self.runner, *self._compilers):
            child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
