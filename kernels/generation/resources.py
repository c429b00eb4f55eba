"""Compile an emitted kernel for a GPU that need not be there, and read off what it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrewrite.kernels.generation.emit import Emitted
from attnrewrite.kernels.generation.loading import load


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses. ``spills``: instructions that store registers to local memory."""

    registers: int
    spills: int
    shared: int
    """Bytes of shared memory."""
    matrix: str
    """The widest matrix instruction: HMMA, HGMMA, UTCHMMA (NVIDIA), MFMA (AMD), or empty."""
    bulk: int = 0
    """Instructions that load a tile by its descriptor: UTMALDG."""


def compiled(
    kernel: Emitted, types: Mapping[str, str], values: Mapping[str, int], target: str, *, warps: int, stages: int
) -> Resources:
    """Compile ``kernel`` for ``target`` ("sm_90", "gfx942").

    Args:
        kernel: what is compiled.
        types: a triton type of each parameter, such as ``"*bf16"`` or ``"i32"``; pointers are taken to be aligned to 16
            bytes, and parameters of type ``"i32:16"`` to be multiples of 16.
        values: the constexpr parameters, and strides that are 1.
        target: the chip.
        warps: per program.
        stages: of software pipelining.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in values else types[name].split(":")[0] for name in kernel.parameters}
    # As triton itself specialises, with an empty list for what has no attribute: so a launch finds this in its cache.
    # Constants have such a list from 3.7 on.
    kinds = {name: "" if name in values else types[name] for name in kernel.parameters}
    of_constants = not triton.__version__.startswith("3.6.")
    aligned = {
        (number,): [["tt.divisibility", 16]] if kind.startswith("*") or kind.endswith(":16") else []
        for number, (name, kind) in enumerate(kinds.items())
        if not kind.startswith("fp") and (of_constants or name not in values)
    }
    constants = {name: values[name] for name in kernel.parameters if name in values}
    source = ASTSource(load(kernel), signature, constants, aligned)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    result = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    return _nvidia(result) if target.startswith("sm_") else _amd(result)


def _nvidia(result: Any) -> Resources:
    from triton.backends import nvidia

    tools = Path(nvidia.__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        text = _output(tools / "nvdisasm", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    found = [name for name in ("UTCHMMA", "HGMMA", "HMMA") if re.search(rf"\b{name}\b", text)]
    return Resources(
        int(registers[1]) if registers else 0,
        len(re.findall(r"\bSTL\b", text)),
        result.metadata.shared,
        found[0] if found else "",
        len(re.findall(r"\bUTMALDG\b", text)),
    )


def _amd(result: Any) -> Resources:
    text = result.asm["amdgcn"]
    count = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    matrix = "MFMA" if "v_mfma" in text else ""
    return Resources(int(count[1]) if count else 0, int(spilled[1]) if spilled else 0, result.metadata.shared, matrix)


def _output(*command: object) -> str:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True).stdout
