"""Lookups of tuning records: in memory, in a large folder, in fresh processes, and with a shared store that is down."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from attnrewrite.bench.clock import interleave
from attnrewrite.kernels.store.behind import Shared
from attnrewrite.kernels.store.key import Device, Key, bucket, pairs
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.record import Record, Timing
from attnrewrite.kernels.store.tiers import Store
from suite.figures import Figure, Goal, Result
from suite.fresh import python

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size

NOTE = (
    "A record holds twelve timings. A launch looks a key up that was looked up before, with the same object. First "
    "lookups, of keys that are stored and of a key that is not, come each from a new store object and read the folder; "
    "the files are in the page cache. A miss looks for the nearest record, too. What is added to a start is a fresh "
    "process that imports the store and looks up as many keys as a model launches kernels, less one that only imports. "
    "The store that is down is a Redis server that takes connections and never answers; the import of its package is "
    "not counted. `cache ls` is the whole command in a fresh process; its floor is `--version`."
)
_START = """
import sys
from suite.entries.tuning_store import SPACE, keys
from attnrewrite.kernels.store.settings import default_store
here = default_store()
assert all(here.find(key, SPACE) for key in keys(int(sys.argv[1])))
"""
_IMPORTS = "from suite.entries import tuning_store"
_LS = "from attnrewrite.cli import main; raise SystemExit(main(['cache', 'ls']))"


class Everything:
    """A space of all configurations."""

    def valid(self, config: Any) -> bool:
        """Whether it is one."""
        return True


SPACE = Everything()


def keys(count: int) -> list[Key]:
    """Return different keys, the same ones in every process."""
    device = Device("NVIDIA H200", 132, 232448, 62914560)
    flags = pairs({f"FLAG_{number}": False for number in range(15)})
    dims, sizes = pairs({"D": 64, "Dv": 64}), bucket({"L": 4096, "S": 4096, "BH": 64})
    made = (f"{number:064x}" for number in range(count))
    return [Key("dense", "forward", x, "3.7.1", "sm_90", device, ("bf16",), dims, flags, sizes) for x in made]


def record(key: Key) -> Record:
    """Return a record of a usual size."""
    configs = [pairs({"block_m": 128, "block_n": 8 << n, "warps": 8, "stages": 3}) for n in range(12)]
    timings = tuple(Timing(config, "ok", 1.0, 0.99, 1.02, 20, 128, 0, 65536) for config in configs)
    return Record(key, timings, configs[3], 0.01, time=1_750_000_000)


def run(size: Size, tick: Tick) -> Result:
    result = Result(notes=[NOTE])
    with tempfile.TemporaryDirectory() as folder:
        stored = keys(size["records"])
        root = Folder(Path(folder) / "tuning")
        for done, key in enumerate(stored):
            if done % 1000 == 0:
                tick("writing", done, len(stored))
            made = record(key)
            root.write(made.path, made.data)
        result.facts["bytes of a record"] = len(record(stored[0]).data)
        result.figures = [*_lookups(root, stored, size, tick), *_processes(folder, size, tick), *_down(size, tick)]
    return result


def _lookups(root: Folder, stored: list[Key], size: Size, tick: Tick) -> list[Figure]:
    case, calls = f"{len(stored)} records", size["calls"]
    warm = Store(root)
    warm.find(stored[0], SPACE)
    chosen = stored[:: max(1, len(stored) // 100)]
    missing = [replace(stored[0], kernel="delta")]
    cases: dict[str, Callable[[], object]] = {
        "launch": lambda: [warm.find(stored[0], SPACE) for _ in range(calls)],
        "first lookup": partial(_find, root, chosen),
        "first miss": partial(_find, root, missing),
    }
    taken = interleave(cases, size["rounds"], tick, "lookups")
    launch = [1e6 * seconds / calls for seconds in taken["launch"]]
    first = [1e3 * seconds / len(chosen) for seconds in taken["first lookup"]]
    return [
        Figure(case, "attnrewrite", "lookup at a launch", "us", launch, goal=Goal("<=", 2.0)),
        Figure(case, "attnrewrite", "first lookup of a key", "ms", first),
        Figure(case, "attnrewrite", "first miss", "ms", [1e3 * seconds for seconds in taken["first miss"]]),
    ]


def _find(root: Folder, wanted: list[Key]) -> None:
    here = Store(root)
    for key in wanted:
        here.find(key, SPACE)


def _processes(folder: str, size: Size, tick: Tick) -> list[Figure]:
    cases = {
        "imports": partial(python, "-c", _IMPORTS),
        "warm start": partial(python, "-c", _START, str(size["launched"])),
        "cache ls": partial(python, "-c", _LS),
        "cli": partial(python, "-c", "from attnrewrite.cli import main; raise SystemExit(main(['--version']))"),
    }
    variables = {"ATTNREWRITE_CACHE_DIR": folder, "ATTNREWRITE_CACHE_URL": "", "ATTNREWRITE_AUTOTUNE": "cached"}
    with mock.patch.dict(os.environ, variables):
        taken = interleave(cases, size["fresh"], tick, "fresh processes")
    added = [a - b for a, b in zip(taken["warm start"], taken["imports"], strict=True)]
    floor = sorted(taken["cli"])[len(taken["cli"]) // 2]
    case = f"{size['launched']} keys of {size['records']}"
    return [
        Figure(case, "attnrewrite", "added to a start", "s", added, goal=Goal("<=", 0.2)),
        Figure(f"{size['records']} records", "attnrewrite", "cache ls", "s", taken["cache ls"], floor),
    ]


def _down(size: Size, tick: Tick) -> list[Figure]:
    """Measure what a Redis server that never answers adds to the lookups of a process."""
    if importlib.util.find_spec("redis") is None:
        return []
    importlib.import_module("attnrewrite.kernels.store.redis")
    waited = []
    with socket.socket() as silent, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is down
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        for turn in range(size["fresh"]):
            tick("shared store is down", turn, size["fresh"])
            alone, beside = (_seconds(size["launched"], shared) for shared in (None, Shared(url)))
            waited.append(beside - alone)
    case = f"{size['launched']} keys, nobody answers"
    return [Figure(case, "attnrewrite", "added to a start", "s", waited, goal=Goal("<=", 0.5))]


def _seconds(launched: int, shared: Shared | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        here = Store(Folder(Path(folder)), shared)
        start = time.perf_counter()
        for key in keys(launched):
            here.find(key, SPACE)
        return time.perf_counter() - start
