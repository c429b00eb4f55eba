"""What one program of a kernel of the dense family uses, compiled for a GPU that need not be there.

``python -m suite.usage TARGET`` compiles what the rates of the cost model are fitted to, into triton's cache.
"""

from __future__ import annotations

import functools
import sys

from attnrewrite.kernels.dense.catalogue import KERNELS, flags, kernel, used, users
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.launch import BLOCK_LIST
from attnrewrite.kernels.dense.signature import constants, types
from attnrewrite.kernels.generation.resources import Resources, compiled


@functools.cache
def usage(name: str, variant: str, width: int, config: Config, target: str, causal: bool = True) -> Resources:
    """Compile kernel ``name`` for heads of ``width`` features, in bfloat16."""
    made = kernel(name, flags(width, width, used(name, variant, causal=causal)))
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
