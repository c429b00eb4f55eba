"""What one program of a kernel of the dense family uses, compiled for a GPU that need not be there."""

from __future__ import annotations

import functools

from attnrewrite.kernels.dense.catalogue import VARIANTS, flags, kernel
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.signature import constants, types
from attnrewrite.kernels.generation.resources import Resources, compiled


@functools.cache
def usage(name: str, variant: str, width: int, config: Config, target: str, causal: bool = True) -> Resources:
    """Compile kernel ``name`` for heads of ``width`` features, in bfloat16."""
    made = kernel(name, flags(width, width, {"CAUSAL": causal, **VARIANTS[variant]}))
    values = constants(made, {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n})
    return compiled(made, types(made, "bf16"), values, target, warps=config.warps, stages=config.stages)
