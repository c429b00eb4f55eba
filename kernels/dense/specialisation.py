"""Types of a launch's arguments, as triton specialises a kernel for them: for compiling it ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnrewrite.kernels.generation.emit import TUNED

_POINTERS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNED = 16
_INT32 = 1 << 31


def specialised(arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the type of each argument, and the values of those that become part of the kernel.

    A number that can be divided by 16 is of type "i32:16"; that it is 1 becomes part of the kernel, as do
    parameters that are tuned.
    """
    types: dict[str, str] = {}
    values: dict[str, int] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            types[name] = f"*{_POINTERS[value.dtype]}"
        elif isinstance(value, float):
            types[name] = "fp32"
        elif name.startswith(TUNED) or value == 1:
            values[name] = value
        else:
            kind = "i32" if -_INT32 <= value < _INT32 else "i64"
            types[name] = f"{kind}:{_ALIGNED}" if value % _ALIGNED == 0 else kind
    return types, values
