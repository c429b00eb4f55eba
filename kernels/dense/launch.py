"""Launch the generated kernels of the dense family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, chosen, named
from attnrewrite.kernels.dense.catalogue import kernel
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.generation.emit import Emitted, Flag
from attnrewrite.kernels.generation.loading import load


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]`` in the dtype of the query, and the log-sum-exp in base 2 ``[B, H, L]``."""
    B, H, _, L, _ = call.sizes
    out = call.query.new_empty(B, H, L, call.value.shape[3])
    lse = call.query.new_empty(B, H, L, dtype=torch.float32)
    run("forward", call, {"Out": out, "Lse": lse, **_out_strides(out)}, lambda config: B * H * -(-L // config.block_m))
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
    call: Call, out: Tensor, lse: Tensor, upstream: Tensor, *, bias_gradient: bool = False
) -> tuple[Gradients, Tensor]:
    """Return the gradients of ``sum(upstream * out)``, and ``sum(upstream * out)`` of each row, ``[B, H, L]``.

    No atomics: the same inputs give the same bits.
    """
    B, H, Hkv, L, S = call.sizes
    warm = call.query_temperature is not None
    query, key, value = (x.new_empty(x.shape) for x in (call.query, call.key, call.value))
    found = Gradients(
        query,
        key,
        value,
        lse.new_empty(B, H, L) if warm else None,
        lse.new_empty(B, Hkv, S) if warm else None,
        lse.new_zeros(B, H, L, S) if bias_gradient else None,
    )
    delta = torch.empty_like(lse)
    more: dict[str, Any] = {"Out": out, "Lse": lse, "DOut": upstream, "Delta": delta}
    more |= {**_out_strides(out), **named("g", "bhmd", upstream)}
    keys = {"DKey": found.key, "DValue": found.value, "DValueTau": found.value_temperature}
    queries = {"DQuery": found.query, "DQueryTau": found.query_temperature, "DBias": found.bias}
    flags = {"BIAS_GRADIENT": bias_gradient}
    run("delta", call, more, lambda config: B * H * -(-L // config.block_m))
    run("backward_keys", call, more | keys, lambda config: B * Hkv * -(-S // config.block_n))
    run("backward_queries", call, more | queries, lambda config: B * H * -(-L // config.block_m), flags)
    return found, delta


def run(
    name: str,
    call: Call,
    more: Mapping[str, Any],
    programs: Callable[[Config], int],
    flags: Mapping[str, Flag] | None = None,
) -> None:
    """Launch kernel ``name``, specialised for ``call``, with the arguments and flags that the call lacks.

    Raises LoweringError AR405 where the device can run it in none of its configurations.
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
                load(emitted)[(programs(config),)](
                    **arguments, **blocks, num_warps=config.warps, num_stages=config.stages
                )
            return
        except _cannot_run() as cause:
            _FAILED.add((emitted, config))
            failure = cause
    raise error("AR405", f"{emitted.name}: {failure}") from failure


_FAILED: set[tuple[Emitted, Config]] = set()
"""What was tried in vain on this machine."""


def _cannot_run() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def _out_strides(out: Tensor) -> dict[str, int]:
    return {"stride_ob": out.stride(0), "stride_oh": out.stride(1), "stride_om": out.stride(2)}
