"""Keys, records and servers for the tests of the store."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from attnrewrite.kernels.store.key import Device, Key, bucket, pairs
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.record import Record, Timing
from attnrewrite.kernels.store.tiers import Store

H100 = Device("NVIDIA H100 80GB HBM3", 132, 232448, 52428800)
H200 = Device("NVIDIA H200", 132, 232448, 62914560)
CONFIG = pairs({"block_m": 128, "block_n": 64, "warps": 8, "stages": 3})
SLOWER = pairs({"block_m": 64, "block_n": 64, "warps": 4, "stages": 2})


class Space:
    """Tiles of powers of two."""

    def valid(self, config):
        return set(config) == {"block_m", "block_n", "warps", "stages"} and config["block_m"] in (16, 32, 64, 128)


SPACE = Space()


class Nothing(Space):
    def valid(self, config):
        return False


def key(length=4096, **changes):
    given = {
        "family": "dense",
        "kernel": "forward",
        "source": "0f" * 32,
        "triton": "3.7.1",
        "target": "sm_90",
        "device": H200,
        "dtypes": ("bf16",),
        "dims": pairs({"D": 64, "Dv": 64}),
        "flags": pairs({"CAUSAL": True, "MASK": "none"}),
        "bucket": bucket({"L": length, "S": length}),
    }
    return Key(**{**given, **changes})


def record(of=None, ms=1.0, **changes):
    timings = (
        Timing(CONFIG, "ok", ms, 0.9 * ms, 1.1 * ms, 20, 128, 0, 65536),
        Timing(SLOWER, "ok", 2 * ms, 1.9 * ms, 2.1 * ms, 20, 96, 0, 32768),
    )
    made = Record(of or key(), timings, CONFIG, 0.01, time=1_750_000_000, origin=pairs({"torch": "2.13.0"}))
    return replace(made, **changes)


def many(count):
    """Yield records of different keys."""
    for number in range(count):
        yield record(key(source=f"{number:064x}"))


def store(root, *arguments, **options):
    return Store(Folder(Path(root)), *arguments, **options)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(port, process):
    for _ in range(200):
        assert process.poll() is None, "the server ended"
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(port)


@contextmanager
def server(command, port):
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            yield port
        finally:
            process.kill()


@contextmanager
def redis_server(folder):
    port = free_port()
    command = [shutil.which("redis-server"), "--port", str(port), "--save", "", "--dir", str(folder)]
    with server(command, port):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def silent_server():
    """Accept connections and never answer."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        yield sock.getsockname()[1]


def run_python(code, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
