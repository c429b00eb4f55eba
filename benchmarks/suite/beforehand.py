"""Before the clock runs: the tests of the kernels on this GPU, and the compilation of our own, side by side."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from suite.goals import CASES, MEMORY, OURS
from suite.together import Done, together

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu", "tests/kernels", "tests/api/test_kernels_option.py")
_NO_TIME = "stopped for lack of time"


def beforehand(seconds: float, cuda: bool) -> dict[str, Any]:
    """Run the tests and compile our kernels, all in processes of their own; return what came of it, as facts.

    Without a GPU nothing is compiled, and the tests that need one say so.
    """
    workers = ("-n", str(max(1, (os.cpu_count() or 2) - 6)), "--dist", "worksteal") if cuda else ("-p", "no:xdist")
    paths = [str(ROOT / path) for path in (TESTS if cuda else TESTS[:1])]
    how = ("-q", "-m", "gpu or triton", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    commands: dict[str, tuple[str, ...]] = {"tests": ("-P", "-m", "pytest", *workers, *how, *paths)}
    if cuda:
        commands |= {f"{case}, {name}": ("-m", "suite.warm", case, name) for case, name in _ours()}
        major, minor = torch.cuda.get_device_capability()
        commands["what kernels use"] = ("-m", "suite.usage", f"sm_{major}{minor}")
    done = together(commands, seconds)
    tests = done.pop("tests")
    failed = [{"process": name, "why": _last(x)} for name, x in done.items() if x.code != 0]
    return {
        "tests": _summary(tests),
        "failing tests": [{"test": x} for x in re.findall(r"^(?:FAILED|ERROR) (.{,200})", tests.output, re.MULTILINE)],
        "compiling": f"{len(done)} processes, {len(failed)} failed",
        "failing compilations": failed,
    }


def _ours() -> list[tuple[str, str]]:
    from suite.peers import providers

    return [(name, x) for name, case in CASES.items() if case != MEMORY for x in providers(case) if x in OURS]


def _summary(done: Done) -> dict[str, Any]:
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", _last(done))
    counts: dict[str, Any] = {word: int(n) for n, word in found}
    if done.stopped:
        counts["done"] = next(reversed(re.findall(r"\[ *(\d+%)\]", done.output)), "0%")
    return {**counts, "seconds": round(done.seconds), "ended": _NO_TIME if done.stopped else f"exit code {done.code}"}


def _last(done: Done) -> str:
    """Return the last line of what a command printed."""
    lines = done.output.strip().splitlines()
    return _NO_TIME if done.stopped else lines[-1][:200] if lines else ""
