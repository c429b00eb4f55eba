"""What a device can do: the numbers that the cost model needs, read from the driver or known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Device:
    """A GPU. Sizes are in bytes, rates per second and of the whole chip."""

    name: str
    target: str
    """As triton names it: "sm_90"."""
    sms: int
    registers: int
    """Of 32 bits, per multiprocessor."""
    threads: int
    """That may be resident, per multiprocessor."""
    shared: int
    """Per multiprocessor."""
    shared_block: int
    """That one program may have."""
    l2: int
    memory: float
    """Bandwidth of the device's memory, reads and writes together."""
    clock: float
    matmul: float
    """FLOP/s of products of 16-bit numbers."""
    exponentials: float
    l2_memory: float
    """Bandwidth from the L2 cache to all multiprocessors."""

    @property
    def simple(self) -> float:
        """Float32 operations per second, an fma counted once: 128 per clock and multiprocessor."""
        return 128.0 * self.sms * self.clock

    @property
    def shared_memory(self) -> float:
        """Bandwidth of shared memory: 128 bytes per clock and multiprocessor."""
        return 128.0 * self.sms * self.clock


class Generation(NamedTuple):
    """What one multiprocessor does in a clock. ``reached``: the part of ``matmul`` that large products reach."""

    matmul: int
    exponentials: int
    l2_bytes: float
    reached: float


_GENERATIONS = {
    "sm_80": Generation(2048, 16, 24.0, 0.8),
    "sm_86": Generation(1024, 16, 24.0, 0.8),
    "sm_89": Generation(1024, 16, 24.0, 0.8),
    "sm_90": Generation(4096, 16, 22.8, 0.8),
    "sm_100": Generation(8192, 16, 24.0, 0.8),
    "sm_120": Generation(1024, 16, 24.0, 0.8),
}
"""From the vendor's architecture papers; the bytes from the L2 cache are assumed, for sm_90 as 5.5 TB/s of an H200."""
_REACHED_MEMORY = 0.9
"""The part of the memory's bandwidth that a copy reaches."""

H200 = Device(
    name="NVIDIA H200",
    target="sm_90",
    sms=132,
    registers=65536,
    threads=2048,
    shared=233_472,
    shared_block=232_448,
    l2=60 << 20,
    memory=4.3e12,
    clock=1.83e9,
    matmul=788e12,
    exponentials=16 * 132 * 1.83e9,
    l2_memory=5.5e12,
)
"""Copy bandwidth, and a product of 8192 x 8192 bfloat16 matrices, as measured; the clock is that under such load. The
bandwidth of the L2 cache is assumed."""

KNOWN = {H200.name: H200}


def present(index: int = 0) -> Device:
    """Return CUDA device ``index`` of this machine: sizes from the driver, rates as known, else from its generation.

    Raises RuntimeError where torch sees no such device, ValueError for a generation without numbers here.
    """
    import torch
    from triton.runtime import driver

    facts = torch.cuda.get_device_properties(index)
    clocks = driver.active.utils.get_device_properties(index)  # in kHz and bits
    return described(facts, clocks["sm_clock_rate"] * 1e3, clocks["mem_clock_rate"] * 1e3 * clocks["mem_bus_width"] / 4)


def described(facts: object, clock: float, memory: float) -> Device:
    """Return the device of torch's properties ``facts``, with its highest clock and its memory's nominal bandwidth."""
    read = {name: getattr(facts, attribute) for name, attribute in _READ.items()}
    known = KNOWN.get(read["name"])
    if known is not None:
        part = read["sms"] / known.sms  # less than 1 where the GPU is divided
        rates = ("memory", "matmul", "exponentials", "l2_memory")
        return replace(known, **read, **{rate: getattr(known, rate) * part for rate in rates})
    target = f"sm_{getattr(facts, 'major')}{getattr(facts, 'minor')}"  # noqa: B009  # torch types lack some of them
    if target not in _GENERATIONS:
        raise ValueError(f"{read['name']} is {target}, of which only {', '.join(_GENERATIONS)} are known")
    of, sms = _GENERATIONS[target], read["sms"]
    return Device(
        **read,
        target=target,
        memory=memory * _REACHED_MEMORY,
        clock=clock,
        matmul=of.matmul * of.reached * sms * clock,
        exponentials=of.exponentials * sms * clock,
        l2_memory=of.l2_bytes * sms * clock,
    )


_READ = {
    "name": "name",
    "sms": "multi_processor_count",
    "registers": "regs_per_multiprocessor",
    "threads": "max_threads_per_multi_processor",
    "shared": "shared_memory_per_multiprocessor",
    "shared_block": "shared_memory_per_block_optin",
    "l2": "L2_cache_size",
}
"""Fields by the attribute of torch's device properties."""
