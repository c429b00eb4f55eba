"""Facts about the machine and the packages; every probe is guarded, none changes anything."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from attnrewrite.kernels.places import without_credentials

PACKAGES = ("attnrewrite", "torch", "triton", "transformers", "gguf", "safetensors", "networkx", "torch-mlir")
VARIABLES = (
    "ATTNREWRITE_",
    "TORCH_LOGS",
    "TORCH_TRACE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
)


def environment() -> dict[str, Any]:
    """Return versions (None: not installed), devices and the settings that matter here, as plain data."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "devices": devices(),
        "variables": {name: _shown(name) for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }


def devices() -> list[dict[str, Any]]:
    """Return the CPU and every GPU that torch can use."""
    try:
        import torch
    except Exception as cause:
        return [{"kind": "none", "name": f"torch cannot be imported: {cause}"}]
    found: list[dict[str, Any]] = [
        {
            "kind": "cpu",
            "name": cpu_model(),
            "threads": torch.get_num_threads(),
        }
    ]
    try:
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            capability = f"{facts.major}.{facts.minor}"
            memory = round(facts.total_memory / 2**30, 1)
            found.append({"kind": "cuda", "name": facts.name, "capability": capability, "memory_gib": memory})
    except Exception as cause:
        found.append({"kind": "cuda", "name": f"cannot be asked: {cause}"})
    return found


def cpu_model() -> str:
    """Return the processor's name."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _shown(name: str) -> str:
    """Return the value of a variable without secrets."""
    return "***" if name.endswith("_SECRET") else without_credentials(os.environ[name])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
