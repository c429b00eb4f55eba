"""What a kernel will roughly use, before it is compiled: enough to choose what to compile."""

from __future__ import annotations

from attnrewrite.kernels.dense.catalogue import padded
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.work import WORK, Shape

_MOST = 255  # registers of a thread
_FIXED, _PER_RESULT = 40, 1.6
_TEMPERATURES = 40
_SPILLING = 300
"""Registers, as estimated, from which on the compiler spills; all fitted to the table of docs/kernels.md, sm_90."""
_ROWS_OF_WIDE_PRODUCTS = 64


def estimated(kernel: str, config: Config, shape: Shape) -> Resources:
    """Return what a program is likely to use: results of all products of a tile in registers, loads in every stage."""
    tile = WORK[kernel](shape, config).tile
    size = shape.bits // 8
    registers = wanted_registers(kernel, config, shape)
    held = (config.block_n if kernel.endswith(("keys", "values", "votes")) else config.block_m) * padded(shape.D) * size
    shared = config.stages * tile.loads + held if tile.products else 0
    wide = shape.bits != 32 and any(p.m >= _ROWS_OF_WIDE_PRODUCTS for p in tile.products)  # float32 has none
    spills = max(0, registers - _SPILLING)
    return Resources(min(registers, _MOST), spills, shared, "HGMMA" if wide else "HMMA")


def wanted_registers(kernel: str, config: Config, shape: Shape) -> int:
    """Return the registers that a thread would take if it could have any number of them."""
    tile = WORK[kernel](shape, config).tile
    results = sum(p.m * p.n for p in tile.products) or tile.loads // (4 * shape.bits // 8)  # loads are used and gone
    if shape.penalty:
        results += config.block_m * config.block_n
    return _FIXED + round(_PER_RESULT * results / (32 * config.warps)) + _TEMPERATURES * shape.temperatures
