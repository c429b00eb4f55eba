"""Emitted kernels as files: written once, under a name made of their content, and imported from there."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from attnrewrite.kernels.generation.emit import Emitted
from attnrewrite.kernels.places import cache_folder


def folder() -> Path:
    """Return where emitted kernels lie."""
    return cache_folder() / "kernels"


@functools.cache
def load(kernel: Emitted) -> Any:
    """Return the kernel's function, imported from its file. ``ATTNREWRITE_DUMP_DIR`` gets a copy."""
    dump = os.environ.get("ATTNREWRITE_DUMP_DIR")
    if dump:
        write(kernel, Path(dump))
    try:
        path = write(kernel, folder())
    except OSError:  # read-only or full: this process still needs a file, as triton reads the source
        path = write(kernel, _scratch())
    spec = importlib.util.spec_from_file_location(f"attnrewrite_generated.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


def write(kernel: Emitted, directory: Path) -> Path:
    """Write the kernel's file, in one step, unless it is there. Raises OSError."""
    path = directory / f"{kernel.stem}.py"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(kernel.text)
        os.replace(file.name, path)
    return path


@functools.cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="attnrewrite-"))
