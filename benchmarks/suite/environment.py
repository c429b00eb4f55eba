"""What a result depends on: versions, processor, threads, load, date. No host names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from attnrewrite.env import cpu_model

PACKAGES = ("attnrewrite", "torch", "triton", "transformers")


def environment() -> dict[str, Any]:
    """Return the facts as plain data."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_per_core_at_start": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_driver(),
        }
    return facts


def _driver() -> dict[str, str]:
    """Return what the driver's tool says, nothing without it."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
