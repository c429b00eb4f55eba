"""How long a kernel of the dense family takes, by arithmetic: nothing is compiled, nothing is run.

A tile keeps several units of a multiprocessor busy: matrix products, exponentials, other arithmetic, shared memory and
the way from the L2 cache. One after another they take the sum of their times; with enough independent groups of four
warps on the multiprocessor, one group's products hide another's softmax, down to the time of the busiest unit. Programs
fill the device in waves; none ends before its own tiles are done, and all wait for the device's memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.work import WORK, Product, Shape, Tile, Work


class Rates(NamedTuple):
    """What kernels reach on a device, fitted to measured times (``calibration.py``)."""

    matmul: float = 0.9
    """The part of the device's rate of products."""
    overlap: float = 0.66
    """The part of the shorter units' time that very many groups of warps hide."""
    tile: float = 5e-8
    """Seconds of waiting at each tile, for a group of warps alone on a multiprocessor."""
    program: float = 2e-6
    """Seconds until a program's first tile and after its last."""
    launch: float = 3e-6
    """Seconds of a kernel that does nothing."""


_NARROW_PRODUCTS = 0.62
"""Of the rate of sm_90, where a program multiplies warp by warp (HMMA); arXiv 2402.13499, section on tensor cores."""
_RESERVED = 1024  # bytes of shared memory that the driver takes per program
_WARPS, _ROWS = 4, 64  # of a group of warps, which multiplies together


def predict(kernel: str, config: Config, shape: Shape, used: Resources, device: Device, rates: Rates) -> float:
    """Return the seconds that ``kernel`` takes, infinity where it does not fit.

    Args:
        kernel: its name in ``kernels/dense/catalogue.py``.
        config: how it is cut into programs.
        shape: the call.
        used: what one compiled program uses.
        device: where it would run.
        rates: what kernels reach there.
    """
    resident = occupancy(config, used, device)
    if not resident:
        return math.inf
    work = WORK[kernel](shape, config)
    if not work.programs:
        return 0.0
    busy = _arithmetic(work, config, shape, used, device, rates, resident)
    return rates.launch + max(busy, work.memory / device.memory)


def occupancy(config: Config, used: Resources, device: Device) -> int:
    """Return how many programs fit on a multiprocessor; 0 where not even one does."""
    if used.shared > device.shared_block:
        return 0
    lanes = 32 * config.warps
    registers = -(-max(used.registers, 1) // 8) * 8 * lanes
    return min(device.registers // registers, device.threads // lanes, device.shared // (used.shared + _RESERVED))


def floor(kernel: str, shape: Shape, device: Device) -> float:
    """Return the seconds below which no kernel of these products can come: its busiest unit, visible pairs only."""
    work = WORK[kernel](shape, Config(1, 1))
    matmul = work.tiles * _flops(work.tile) / device.matmul
    exponentials = work.tiles * min(work.tile.exponentials, 1) / device.exponentials
    return max(matmul, exponentials, work.memory / device.memory)


def _arithmetic(
    work: Work, config: Config, shape: Shape, used: Resources, device: Device, rates: Rates, resident: int
) -> float:
    """Return the seconds until the last program has done its tiles."""

    def tile(programs: int) -> float:
        """Return the seconds per tile of a multiprocessor that so many programs share."""
        return _tile(work.tile, config, shape, used, device, rates, programs)

    # Of programs of all lengths the long ones come first: full waves level out, the shortest ones are left over.
    crowd = min(resident, -(-work.programs // device.sms))
    waves, rest = divmod(work.programs, device.sms * crowd)
    last = -(-rest // device.sms)
    shortest, longest = (tiles * (1 - shape.dead) for tiles in (work.shortest, work.longest))
    level = (work.tiles - rest * shortest) / device.sms * tile(crowd) + waves * rates.program
    if rest:
        level += last * shortest * tile(last) + rates.program
    return max(level, longest * tile(1) + rates.program)


def _tile(
    tile: Tile, config: Config, shape: Shape, used: Resources, device: Device, rates: Rates, programs: int
) -> float:
    """Return the seconds that one tile costs a multiprocessor on which ``programs`` programs run."""
    sms = device.sms
    size = 2 if shape.bits == 16 else 4
    multiplied = [_multiplied(p, config, shape, used, device, rates) for p in tile.products]
    matmul = sms * sum(seconds for seconds, _ in multiplied)
    exponentials = sms * tile.exponentials / device.exponentials
    # A spilled register is stored and loaded again, 32 lanes in one clock.
    simple = sms * tile.simple / device.simple + 2 * used.spills * config.warps / device.clock
    shared = sms * sum(read for _, read in multiplied) * size / device.shared_memory
    loads = sms * tile.loads / device.l2_memory
    chain = matmul + exponentials + simple + rates.tile + (loads if config.stages == 1 else 0.0)
    busiest = max(matmul, exponentials, simple, shared, loads)
    groups = programs * max(1.0, config.warps / _WARPS)
    return busiest + max(0.0, chain - busiest) * (1 - rates.overlap * (1 - 1 / groups))


def _multiplied(
    p: Product, config: Config, shape: Shape, used: Resources, device: Device, rates: Rates
) -> tuple[float, int]:
    """Return the seconds that the device takes for a product, and the numbers that it reads from shared memory.

    On sm_90 a group of warps multiplies 64 rows at a time (HGMMA). Groups for which there are no rows share out the
    columns; but where the result feeds another product, triton lays groups along rows alone, and such groups make the
    rows of others again (``warpsPerTileV3`` in its AccelerateMatmul.cpp). Operands are read for each instruction.
    """
    if shape.bits == 32:  # exact float32 products have no matrix unit
        return 2 * p.m * p.n * p.k / (2 * device.simple * rates.matmul), _operands(p.m, p, 1)
    grouped = used.matrix == "HGMMA" and p.m >= _ROWS
    narrow = _NARROW_PRODUCTS if device.target == "sm_90" and not grouped else 1.0
    alike = max(1, config.warps // _WARPS * _ROWS // p.m) if grouped else 1  # groups at the same rows
    made = p.m * (alike if p.feeds else 1)
    return 2 * made * p.n * p.k / (device.matmul * rates.matmul * narrow), _operands(made, p, alike)


def _operands(rows: int, p: Product, parts: int) -> int:
    """Return the numbers that are read to make so many rows, 64 at a time, in so many parts of their columns."""
    return -(-rows // _ROWS) * p.n * p.k + rows * p.k * parts


def _flops(tile: Tile) -> int:
    return sum(2 * p.m * p.n * p.k for p in tile.products)
