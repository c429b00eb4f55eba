"""Commands side by side in processes of their own, with a time limit, so that none can hang or break the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_SUITE = str(Path(__file__).parents[1])


class Done(NamedTuple):
    """How a command ended: its exit code, what it printed, and whether it was stopped."""

    code: int
    output: str
    seconds: float
    stopped: bool


def together(commands: Mapping[str, Sequence[str]], seconds: float) -> dict[str, Done]:
    """Run all commands (arguments of this interpreter) at once, and stop after ``seconds`` those that still run."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _SUITE)))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    start, running, found = time.monotonic(), {}, {}
    for name, arguments in commands.items():
        file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # read and closed below
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file, start_new_session=True)
        running[name] = process, file
    for name, (process, file) in running.items():
        stopped = False
        try:
            process.wait(max(0.0, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            stopped = True
        code = process.wait()
        with file:
            file.seek(0)
            found[name] = Done(code, file.read(), time.monotonic() - start, stopped)
    return found
