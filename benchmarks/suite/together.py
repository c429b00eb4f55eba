"""Commands side by side in processes of their own, with a time limit, so that none can hang or break the caller."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_SUITE = str(Path(__file__).parents[1])


class Done(NamedTuple):
    """How a command ended: its exit code, None where it was stopped, and what it printed."""

    code: int | None
    output: str
    seconds: float


def together(commands: Mapping[str, Sequence[str]], seconds: float) -> dict[str, Done]:
    """Run all commands (arguments of this interpreter) at once, and stop after ``seconds`` those that still run."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _SUITE)))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    start, running, found = time.monotonic(), {}, {}
    for name, arguments in commands.items():
        file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # read and closed below
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, *arguments], env=variables, start_new_session=True, **output)  # type: ignore[call-overload]  # the dict has two types
        running[name] = process, file
    for name, (process, file) in running.items():
        try:
            process.wait(max(0.0, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with the processes that it has started
        code = process.poll()
        process.wait()
        file.seek(0)
        found[name] = Done(code, file.read(), time.monotonic() - start)
        file.close()
    return found
