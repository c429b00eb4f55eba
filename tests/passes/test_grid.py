"""The grid of spellings: every cell is found with the right facts, rewritten, and equal in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from grid import DIM, GROUPS, HEADS, KV_HEADS, LAYOUTS, MASKS, SCALES, WINDOW, Composed, cells
from oracle import assert_as_good, exact, run

import attnrewrite
from attnrewrite.passes.report import Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD = 11
"""One in so many rows of the grid runs in every change; `make test-all` runs them all."""

ROWS = [
    pytest.param(
        layout,
        scale,
        dtype,
        id=f"{layout}-{scale}-{dtype}",
        marks=[] if (5 * m + 3 * n + 7 * d) % SPREAD == 0 else pytest.mark.slow,
    )
    for m, layout in enumerate(LAYOUTS)
    for n, scale in enumerate(SCALES)
    for d, dtype in enumerate(DTYPES)
]


def test_the_grid_is_large() -> None:
    assert len(ROWS) * len(MASKS) >= 1000


@pytest.mark.parametrize(("layout", "scale", "dtype"), ROWS)
def test_row(layout: str, scale: str, dtype: str) -> None:
    """One row: all masks, with the other axes going round."""
    batch = 1 if (list(LAYOUTS).index(layout) + list(SCALES).index(scale)) % 4 == 3 else 2
    row = cells(layout, scale, batch)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Composed(row).to(DTYPES[dtype])
    pad = torch.ones(batch, 9, dtype=torch.bool)
    pad[0, :2] = False
    inputs = {"x": torch.randn(batch, 9, HEADS * DIM).to(DTYPES[dtype]), "pad": pad}
    reports: list[Report] = []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=reports.append))
    ordinary, ours, true = run(model, inputs), run(compiled, inputs), exact(model, inputs)
    sites = [site for report in reports for site in report.sites]
    assert len(sites) == len(row)
    for cell, site in zip(row, sites, strict=True):
        seen = (site.mask.kind, site.mask.window, site.heads, site.kv_heads, bool(site.bias), site.certificate)
        kind = MASKS[cell.mask][0]
        kv_heads = HEADS if cell.groups in ("none", "index") else KV_HEADS
        window = WINDOW if kind == "window" else None
        assert seen == (kind, window, HEADS, kv_heads, cell.mask == "alibi", "proved"), (cell.name, site.rejections)
        assert site.status == "rewritten", (cell.name, site.rejections)
        assert site.scale == pytest.approx(1.0 if scale == "none" else DIM**-0.5, rel=1e-2), cell.name
    assert_as_good("output", ours[0], ordinary[0], true[0])
    for name, gradient in true[1].items():
        assert_as_good(name, ours[1][name], ordinary[1][name], gradient)


def test_every_axis_is_covered() -> None:
    everything = [cell for layout in LAYOUTS for scale in SCALES for cell in cells(layout, scale)]
    assert {cell.groups for cell in everything} == set(GROUPS)
    for first, second in (("layout", "mask"), ("layout", "softmax"), ("mask", "softmax"), ("layout", "groups")):
        pairs = {(getattr(cell, first), getattr(cell, second)) for cell in everything}
        values = [{getattr(cell, axis) for cell in everything} for axis in (first, second)]
        assert len(pairs) == len(values[0]) * len(values[1]), (first, second)
