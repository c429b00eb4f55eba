"""A process that answers requests, one JSON text a line, within a time; it can die, and another one takes its place."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

WORKER = (sys.executable, "-P", "-m", "attnrewrite.kernels.tuning.worker")


class WorkerDiedError(Exception):
    """The process ended, or did not answer in time."""


class Child:
    """Starts when it is first asked."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Return the answer. Raises WorkerDiedError, after which the process is gone."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line(process, seconds))
        except (OSError, EOFError, ValueError) as cause:
            self.close()
            raise WorkerDiedError(f"exit code {process.returncode}") from cause
        except BaseException:  # an answer for which nobody waited would be taken for the next one
            self.close()
            raise
        return answer

    @property
    def alive(self) -> bool:
        """Whether it has been started and has not died."""
        return self._process is not None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self._process, self._rest = None, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            variables = {**os.environ, "ATTNREWRITE_AUTOTUNE": "cached,readonly"}  # it must not tune in its turn
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=nowhere, env=variables)
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"no answer in {seconds:.0f} s")
                read = os.read(process.stdout.fileno(), 1 << 16)
                if not read:
                    process.wait()
                    raise EOFError
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line
