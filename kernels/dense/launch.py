"""Launch the generated kernels of the dense family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, chosen, named
from attnrewrite.kernels.dense.catalogue import kernel
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.generation.emit import Emitted, Flag
from attnrewrite.kernels.generation.loading import load


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]`` in the dtype of the query, and the log-sum-exp in base 2 ``[B, H, L]``."""
    B, H, _, L, _ = call.sizes
    out = call.query.new_empty(B, H, L, call.value.shape[3])
    lse = call.query.new_empty(B, H, L, dtype=torch.float32)
    more = {"Out": out, "Lse": lse, **out_strides(out)}
    run("forward", call, more, partial(row_blocks, call), prepare=_live(call))
    return out, lse


@dataclass
class Gradients:
    """By query, key and value; by the temperatures and by the bias ``[B, H, L, S]`` where asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_temperature: Tensor | None = None
    value_temperature: Tensor | None = None
    bias: Tensor | None = None


def backward(
    call: Call, out: Tensor, lse: Tensor, upstream: Tensor, *, bias_gradient: bool = False, wide: bool = False
) -> tuple[Gradients, Tensor]:
    """Return the gradients of ``sum(upstream * out)``, and ``sum(upstream * out)`` of each row, ``[B, H, L]``.

    Those by key and value are ``wide``, in float32, where others will be added to them. No atomics: the same inputs
    give the same bits.
    """
    B, H, Hkv, L, S = call.sizes
    warm = call.query_temperature is not None
    dtype = torch.float32 if wide else call.key.dtype
    found = Gradients(
        call.query.new_empty(call.query.shape),
        call.key.new_empty(call.key.shape, dtype=dtype),
        call.value.new_empty(call.value.shape, dtype=dtype),
        lse.new_empty(B, H, L) if warm else None,
        lse.new_empty(B, Hkv, S) if warm else None,
        lse.new_zeros(B, H, L, S) if bias_gradient else None,
    )
    delta = torch.empty_like(lse)
    more: dict[str, Any] = {"Out": out, "Lse": lse, "DOut": upstream, "Delta": delta}
    more |= {**out_strides(out), **named("g", "bhmd", upstream)}
    keys = {"DKey": found.key, "DValue": found.value, "DValueTau": found.value_temperature}
    queries = {"DQuery": found.query, "DQueryTau": found.query_temperature, "DBias": found.bias}
    flags = {"BIAS_GRADIENT": bias_gradient}
    run("delta", call, more, partial(row_blocks, call))
    run("backward_keys", call, more | keys, lambda config: B * Hkv * -(-S // config.block_n))
    programs = partial(row_blocks, call)
    run("backward_queries", call, more | queries, programs, flags, prepare=_live(call))
    return found, delta


BLOCK_LIST = 16
"""Blocks of keys that are looked at together."""


class NoConfigurationError(Exception):
    """The device can run a kernel in none of its configurations."""


def run(
    name: str,
    call: Call,
    more: Mapping[str, Any],
    programs: Callable[[Config], int],
    flags: Mapping[str, Flag] | None = None,
    prepare: Callable[[Config], Mapping[str, Any]] | None = None,
) -> None:
    """Launch kernel ``name``, specialised for ``call``, with the arguments and flags that the call lacks.

    ``prepare`` makes those that depend on the configuration.

    Raises NoConfigurationError where the device can run it in none.
    """
    given = {**call.flags(), **(flags or {})}
    emitted = kernel(name, given)
    arguments = chosen(emitted.parameters, {**call.arguments(), **more})
    widest, bits = max(int(given["PAD_D"]), int(given["PAD_DV"])), call.query.element_size() * 8
    failure: Exception | None = None
    for config in configs(name, widest, bits):
        if (emitted, config) in _FAILED:
            continue
        blocks = chosen(emitted.parameters, {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n})
        try:
            if programs(config):
                own = {} if prepare is None else chosen(emitted.parameters, prepare(config))
                load(emitted)[(programs(config),)](
                    **{**arguments, **own}, **blocks, num_warps=config.warps, num_stages=config.stages
                )
            return
        except _cannot_run() as cause:
            _FAILED.add((emitted, config))
            failure = cause
    raise NoConfigurationError(f"{emitted.name}: {failure}") from failure


_FAILED: set[tuple[Emitted, Config]] = set()
"""What was tried in vain on this machine."""


def _cannot_run() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def row_blocks(call: Call, config: Config) -> int:
    """Return how many programs there are, one for a block of rows of a head."""
    B, H, _, L, _ = call.sizes
    return B * H * -(-L // config.block_m)


def _live(call: Call) -> Callable[[Config], Mapping[str, Any]] | None:
    """List the blocks of keys that count for each block of rows, where votes have put keys out of account."""
    return None if call.death is None else lambda config: live_blocks(call, config)


def live_blocks(call: Call, config: Config) -> dict[str, Tensor]:
    """Return the numbers of the blocks ``[B, row blocks, key blocks]``, and how many they are ``[B, row blocks]``."""
    assert call.death is not None
    B, _, _, L, S = call.sizes
    blocks = -(-L // config.block_m)
    lists = call.death.new_empty(B, blocks, -(-S // config.block_n))
    counts = call.death.new_empty(B, blocks)
    load(kernel("live", {}))[(B * blocks,)](
        Death=call.death,
        Live=lists,
        Lives=counts,
        L=L,
        S=S,
        offset=call.how.offset,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_LIST=BLOCK_LIST,
    )
    return {"Live": lists, "Lives": counts}


def out_strides(out: Tensor) -> dict[str, int]:
    """Name the strides of an output whose features lie side by side."""
    return {"stride_ob": out.stride(0), "stride_oh": out.stride(1), "stride_om": out.stride(2)}
