"""The key under which tuning records of a launch are stored, and the call as the cost model has it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from attnrewrite.kernels.dense.catalogue import KERNELS
from attnrewrite.kernels.generation.emit import Flag, flags_of
from attnrewrite.kernels.store.device import device_of
from attnrewrite.kernels.store.key import Device, Key, bucket, pairs

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.call import Call
    from attnrewrite.kernels.dense.launch import Launch
    from attnrewrite.kernels.tuning.work import Shape

FAMILY = "dense"
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DIMS = ("D", "DV", "PAD_D", "PAD_DV")


class Where(NamedTuple):
    """What runs kernels: triton's version, its name of the target, and the device."""

    triton: str
    target: str
    device: Device


@functools.cache
def here(index: int) -> Where:
    """Return what runs kernels on CUDA (or HIP) device ``index``."""
    import triton
    from triton.runtime import driver

    with torch.cuda.device(index):
        target = driver.active.get_current_target()
    name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return Where(triton.__version__, name, device_of(torch.cuda.get_device_properties(index)))


def key_of(launch: Launch, where: Where) -> Key:
    """Return the key of a launch. Lengths, and batch times heads, are in it as powers of two."""
    given: Mapping[str, Flag] = {flag: launch.given[flag] for flag in flags_of(*KERNELS[launch.name])}
    return Key(
        family=FAMILY,
        kernel=launch.name,
        source=launch.emitted.digest,
        triton=where.triton,
        target=where.target,
        device=where.device,
        dtypes=(DTYPES[launch.call.query.dtype],),
        dims=pairs({name: value for name, value in given.items() if name in _DIMS}),
        flags=pairs({name: value for name, value in given.items() if name not in _DIMS}),
        bucket=bucket(sizes_of(launch)),
    )


def sizes_of(launch: Launch) -> dict[str, int]:
    """Return the sizes that vary from call to call."""
    B, H, _, L, S = launch.call.sizes
    return {"heads": B * H, "L": L, "S": S}


def shape_of(launch: Launch) -> Shape:
    """Return the call of a launch as the cost model has it."""
    votes = launch.name in ("votes", "backward_votes") or "VOTES" in _on(launch)
    penalty = launch.call.penalty is not None or votes
    return replace(shape_of_call(launch.call), penalty=penalty, parts=launch.arguments.get("splits", 1))


def shape_of_call(call: Call) -> Shape:
    """Return a call of plain attention, SSA or selective attention as the cost model has it."""
    from attnrewrite.kernels.tuning.work import Shape

    return Shape(
        *call.sizes,
        call.query.shape[3],
        call.value.shape[3],
        causal=call.how.is_causal,
        window=call.how.window,
        bits=8 * call.query.element_size(),
        penalty=call.strength is not None,
        temperatures=call.query_temperature is not None,
        offset=call.how.offset,
    )


def _on(launch: Launch) -> set[str]:
    return {name for name, value in launch.given.items() if value is True}
