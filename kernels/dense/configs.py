"""How kernels are cut into programs and compiled, before anything was tuned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Config(NamedTuple):
    """Rows and keys per tile, warps per program, stages of software pipelining, and whether tiles come by TMA."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    descriptors: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for: its parameters that are no flags."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "DESCRIPTORS": self.descriptors}

    @classmethod
    def stored(cls, fields: Iterable[tuple[str, Any]]) -> Config:
        """Return what a tuning record says, which was found valid."""
        return cls(**dict(fields))

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n}, {self.warps}, {self.stages}{', TMA' if self.descriptors else ''}"


_SMALLEST = Config(16, 16, 4, 1)
_NARROW, _MIDDLE = 64, 128
_FORWARD = (Config(128, 32, 8, 3), Config(128, 128, 8, 2), Config(128, 32, 8, 2))
_WIDTHS: dict[str, tuple[Config, Config, Config]] = {
    "forward": _FORWARD,
    "live": _FORWARD,
    "delta": (Config(128, 16), Config(128, 16), Config(64, 16)),
    "backward_keys": (Config(64, 128, 8, 3), Config(16, 128, 8, 2), Config(16, 128, 8, 2)),
    "backward_values": (Config(64, 128, 8, 3), Config(16, 128, 8, 2), Config(32, 128, 8, 3)),
    "backward_queries": (Config(64, 32, 4, 3), Config(128, 32, 8, 3), Config(128, 16, 8, 2)),
    "backward_shared": (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 8, 2)),
    "decode": (Config(16, 128, 4, 3), Config(16, 64, 4, 3), Config(16, 32, 4, 2)),
    "merge": (Config(4, 16), Config(4, 16), Config(4, 16)),
    "votes": (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
    "backward_logits": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 1)),
    "backward_votes": (Config(32, 64, 4, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
}
"""For heads of up to 64, 128 and 256 features in 16 bit; docs/kernels.md says what they use."""


def configs(name: str, widest: int, bits: int) -> list[Config]:
    """Return what to try for kernel ``name``, the next one where the device cannot run or compile the one before.

    widest: the larger of the two padded numbers of features.
    bits: of an element; tiles of 32-bit numbers are half as large.
    """
    first = _WIDTHS[name][0 if widest <= _NARROW else 1 if widest <= _MIDDLE else 2]
    if bits == 32:
        first = Config(max(16, first.block_m // 2), max(16, first.block_n // 2), 4, 1)
    halved = Config(max(16, first.block_m // 2), max(16, first.block_n // 2), 4, 1)
    return list(dict.fromkeys((first, first._replace(stages=1), halved, _SMALLEST)))
