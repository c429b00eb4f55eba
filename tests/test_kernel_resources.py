"""Kernels compile for GPUs that are not there, and use what docs/kernels.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import script

ROOT = Path(__file__).parents[1]
QUICK = ("forward", "backward_keys", "votes")
GROUPED = ("forward", "votes", "backward_keys", "backward_values", "backward_queries", "backward_logits")
"""Tiles of the others are too small for a group of warps, in some products or at 256 features."""
HOW = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, "benchmarks")
import kernel_resources as table
for case in table.cases():
    if list(case) in json.loads(sys.argv[1]):
        config, used = table.measured(case)
        print(json.dumps({"case": case, "row": table.row(case, config, used), **asdict(used)}), flush=True)
"""

FLAGS = """
import json, sys
sys.path.insert(0, "benchmarks")
from suite.usage import untuned
from attnrewrite.kernels.dense.configs import configs
of = {"ALIBI": True, "SINKS": True, "SLOPE_GRADIENT": True}
shared = {"GROUP": 4}
for name, variant, width, more in (
    ("forward", "sdpa", 64, of),
    ("backward_queries", "ssa", 64, of),
    ("backward_votes", "selective", 64, of),
    ("backward_keys", "ssa", 128, shared),
    ("backward_keys", "selective", 128, shared),
):
    first = configs(name, width, 16)[0]
    config, found = untuned(name, variant, width, "sm_90", first, more)
    print(json.dumps([name, variant, found.spills, config == first]), flush=True)
"""


def compiled(cases: list[Any]) -> list[dict[str, Any]]:
    """Compile cases of the table."""
    return in_a_process(HOW, json.dumps(cases))


def in_a_process(code: str, *words: str) -> list[Any]:
    """Return the JSON lines that code prints in a process of its own: triton either interprets or compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: dict[str, Any]) -> None:
    name, _, _, target, descriptors = found["case"]
    assert bool(found["bulk"]) == descriptors, found  # UTMALDG
    assert found["spills"] == 0, found
    assert found["shared"] <= script("suite.usage").SHARED[target] * 1024, found
    products = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "MFMA"}
    if name in GROUPED and target != "sm_100" and not descriptors:
        assert found["matrix"] == products[target], found


def up_to_date(found: dict[str, Any]) -> bool:
    import triton

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    return f"Triton {triton.__version__}," not in page or found["row"] in page


def test_kernels_for_hopper_do_not_spill_and_multiply_in_groups_of_warps() -> None:
    """With tensor descriptors and without; the last two are of wide heads."""
    cases = [list(x) for x in script("kernel_resources").cases() if x.target == "sm_90"]
    narrow = [x for x in cases if x[2] == 64 and x[0] in QUICK and x[1] != "ssa"]
    wide = [x for x in cases if x[2] == 256 and x[0] == "backward_values" and x[1] == "sdpa"]
    rows = compiled([*narrow, *wide])
    assert len(rows) == 11
    for found in rows:
        check(found)
        assert found["matrix"] == "HGMMA"
        assert up_to_date(found), "run `make resources`"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_for_every_target(target: str) -> None:
    cases = [list(x) for x in script("kernel_resources").cases() if x.target == target]
    rows = compiled(cases)
    assert len(rows) == len(cases)
    for found in rows:
        check(found)
        assert up_to_date(found), "run `make resources`"


def test_flags_beside_the_table_spill_nothing_either() -> None:
    """Not even in what is tried first: keys that heads share, sinks and slopes that learn."""
    assert in_a_process(FLAGS) == [
        ["forward", "sdpa", 0, True],
        ["backward_queries", "ssa", 0, True],
        ["backward_votes", "selective", 0, True],
        ["backward_keys", "ssa", 0, True],
        ["backward_keys", "selective", 0, True],
    ]
