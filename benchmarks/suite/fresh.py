"""Fresh processes of the same interpreter, in which neither Python's modules nor torch's caches are warm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SUITE = str(Path(__file__).parents[1])


def python(*arguments: str) -> str:
    """Run the interpreter and return what it printed; torch's and triton's caches are empty folders."""
    with tempfile.TemporaryDirectory() as caches:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), _SUITE)))
        variables = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
            "TRITON_CACHE_DIR": os.path.join(caches, "triton"),
        }
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"a fresh process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
