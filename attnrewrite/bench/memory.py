"""How much memory a call takes, and a limit that turns too large a size into an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

_CGROUP = Path("/sys/fs/cgroup")


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that torch held at once during a call, beyond what it held before; results included.

    On a CPU the allocations are followed one by one; scratch memory of libraries, which torch does not see, is missing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    # The newer profiler has the same events, and writes to stderr from C++ whenever it starts.
    nothing = _ExperimentalConfig()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, nothing))
    try:
        out = run()
    finally:
        threads = _disable_profiler_legacy()
    del out
    events = (event for thread in threads for event in thread if str(event.kind()) == "memory_alloc")
    return int(max(accumulate(event.cpu_memory_usage() for event in events), default=0))


@contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """Let allocations beyond the free memory of this machine fail, where else the system would end the process."""
    free = _free() if device.type == "cpu" else None
    if free is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limit = min(x for x in (used + free, *before) if x != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def too_much(cause: BaseException) -> str | None:
    """Return what an exception says about memory that is not there, None where it is about something else."""
    wanted = re.search(r"tried to allocate (\d+) bytes", str(cause))
    if wanted:
        return f"does not fit into memory: {int(wanted[1]) / 2**30:,.1f} GiB more were needed"
    return "does not fit into memory" if isinstance(cause, MemoryError) else None


def _free() -> int | None:
    """Return the bytes that may still be taken, None where the system does not tell."""
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii")
        free = [int(x) * 1024 for x in re.findall(r"MemAvailable: +(\d+) kB", said)]
    except OSError:
        return None
    try:
        allowed, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        free += [max(0, int(allowed) - int(used))] if allowed != "max" else []
    except OSError:
        pass  # no limit for a group of processes
    return min(free, default=None)
