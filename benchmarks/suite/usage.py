"""What one program of a kernel of the dense family uses, compiled for a GPU that need not be there.

``python -m suite.usage TARGET`` compiles what the rates of the cost model are fitted to, into triton's cache.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import replace

from attnrewrite.kernels.dense.catalogue import KERNELS, flags, kernel, used, users
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.launch import BLOCK_LIST
from attnrewrite.kernels.dense.signature import constants, types
from attnrewrite.kernels.generation.emit import Flag
from attnrewrite.kernels.generation.resources import Resources, compiled
from attnrewrite.kernels.tuning.cost import Rates
from attnrewrite.kernels.tuning.device import H200
from attnrewrite.kernels.tuning.published import RATES
from attnrewrite.kernels.tuning.spills import spilling_least
from attnrewrite.kernels.tuning.work import WORK, Shape

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB that one program may have."""
NO_FLAGS: Mapping[str, Flag] = {}


@functools.cache
def usage(name: str, variant: str, width: int, config: Config, target: str, causal: bool = True) -> Resources:
    """Compile kernel ``name`` for heads of ``width`` features, in bfloat16."""
    return _compiled(name, variant, width, config, target, {"CAUSAL": causal})


def untuned(
    name: str, variant: str, width: int, target: str, first: Config, more: Mapping[str, Flag] = NO_FLAGS
) -> tuple[Config, Resources]:
    """Return what runs on ``target`` where nothing is stored, if it has enough to do: ``first``, unless that spills."""
    found: dict[Config, Resources] = {}

    def uses(config: Config) -> Resources:
        found[config] = _compiled(name, variant, width, config, target, more)
        return found[config]

    if name not in WORK:
        uses(first)
        return first, found[first]
    selective = variant == "selective"
    shape = Shape(2, 16, 16, 8192, 8192, width, width, causal=True, penalty=selective, temperatures=variant == "ssa")
    if name == "decode":
        shape = replace(shape, L=1, parts=8)
    device = replace(H200, target=target, shared=SHARED[target] * 1024, shared_block=SHARED[target] * 1024)
    rates = RATES[H200.name] if target == H200.target else Rates()
    config = spilling_least(name, first, shape, uses, device, rates)
    return config, found[config]


def _compiled(name: str, variant: str, width: int, config: Config, target: str, more: Mapping[str, Flag]) -> Resources:
    made = kernel(name, flags(width, width, {**used(name, variant), **more}))
    values = constants(made, {**config.constants, "BLOCK_LIST": BLOCK_LIST})
    return compiled(made, types(made, "bf16"), values, target, warps=config.warps, stages=config.stages)


def main(target: str) -> None:
    """Compile every kernel in the configuration that is tried first."""
    for width in (64, 128):
        for name in KERNELS:
            for variant in users(name):
                usage(name, variant, width, configs(name, width, 16)[0], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
