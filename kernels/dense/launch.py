"""Launch the generated kernels of the dense family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, chosen, named
from attnrewrite.kernels.generation.emit import Flag, emit, flags_of
from attnrewrite.kernels.generation.loading import load


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs, and compiled."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2


DEFAULT = Config(64, 64)


def forward(call: Call, config: Config = DEFAULT) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]`` in the dtype of the query, and the log-sum-exp ``[B, H, L]`` in float32."""
    B, H, _, L, _ = call.sizes
    out = call.query.new_empty(B, H, L, call.value.shape[3])
    lse = call.query.new_empty(B, H, L, dtype=torch.float32)
    more = {"Out": out, "Lse": lse, **_out_strides(out)}
    run("forward", "attention_forward", call, more, B * H * -(-L // config.block_m), config)
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
    call: Call, out: Tensor, lse: Tensor, upstream: Tensor, *, bias_gradient: bool = False, config: Config = DEFAULT
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
    more = {
        "Out": out,
        "Lse": lse,
        "DOut": upstream,
        "Delta": delta,
        **_out_strides(out),
        **named("g", "bhmd", upstream),
    }
    run("delta", "attention_delta", call, more, B * H * -(-L // config.block_m), config)
    keys = {"DKey": found.key, "DValue": found.value, "DValueTau": found.value_temperature}
    name = "attention_backward_keys"
    run("backward_keys", name, call, {**more, **keys}, B * Hkv * -(-S // config.block_n), config)
    queries = {"DQuery": found.query, "DQueryTau": found.query_temperature, "DBias": found.bias}
    name = "attention_backward_queries"
    flags = {"BIAS_GRADIENT": bias_gradient}
    run("backward_queries", name, call, {**more, **queries}, B * H * -(-L // config.block_m), config, flags)
    return found, delta


def run(
    template: str,
    name: str,
    call: Call,
    more: Mapping[str, Any],
    programs: int,
    config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> None:
    """Launch a template's function, specialised for ``call``, with the arguments and flags that the call lacks."""
    sums = "ieee" if call.query.dtype == torch.float32 else "tf32"
    given = call.flags(SUM_PRECISION=sums, CONTINUED=False, **(flags or {}))
    kernel = emit(template, name, chosen(flags_of(template, name), given))
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    arguments = chosen(kernel.parameters, {**call.arguments(), **more, **blocks})
    if programs:
        load(kernel)[(programs,)](**arguments, num_warps=config.warps, num_stages=config.stages)


def _out_strides(out: Tensor) -> dict[str, int]:
    return {"stride_ob": out.stride(0), "stride_oh": out.stride(1), "stride_om": out.stride(2)}
