"""The grid of spellings: every cell is found with the right facts, rewritten, and equal in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from grid import (
    DIM,
    EXTRAS,
    GROUPS,
    HEADS,
    KV_HEADS,
    LAYOUTS,
    MASKS,
    SCALES,
    SOFTMAXES,
    WINDOW,
    Cell,
    Composed,
    cells,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import Draw, assert_as_good_over, exact, run

import attnrewrite
from attnrewrite.passes.report import Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD = 23
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
    reports: list[Report] = []

    def draw(seed: int) -> Draw:
        torch.manual_seed(seed)
        torch._dynamo.reset()
        model = Composed(row).to(DTYPES[dtype])
        pad = torch.ones(batch, 9, dtype=torch.bool)
        pad[0, :2] = False
        inputs = {"x": torch.randn(batch, 9, HEADS * DIM).to(DTYPES[dtype]), "pad": pad}
        compiled = copy.deepcopy(model)
        compiled.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=reports.append))
        return run(compiled, inputs), run(model, inputs), exact(model, inputs)

    assert_as_good_over(draw)
    sites = reports[0].sites
    assert len(sites) == len(row)
    for cell, site in zip(row, sites, strict=True):
        seen = (site.mask.kind, site.mask.window, site.heads, site.kv_heads, bool(site.bias), site.certificate)
        kind = MASKS[cell.mask][0]
        kv_heads = HEADS if cell.groups in ("none", "index") else KV_HEADS
        window = WINDOW if kind == "window" else None
        assert seen == (kind, window, HEADS, kv_heads, cell.mask == "alibi", "proved"), (cell.name, site.rejections)
        assert site.status == "rewritten", (cell.name, site.rejections)
        assert site.scale == pytest.approx(1.0 if scale == "none" else DIM**-0.5, rel=1e-2), cell.name


PRECISE = sorted(set(SOFTMAXES) - {"float32", "upcast"})
CELLS = st.builds(
    Cell,
    *(st.sampled_from(sorted(axis)) for axis in (LAYOUTS, SCALES, MASKS)),
    st.sampled_from(PRECISE),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(EXTRAS),
    st.integers(1, 3),
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(cell=CELLS, length=st.integers(3, 9), seed=st.integers(0, 1 << 16))
def test_any_combination_is_exact(cell: Cell, length: int, seed: int) -> None:
    """In float64: whatever is put together, what runs is what was written, and nearly all of it is rewritten."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model = Composed([cell]).double()
    pad = torch.rand(cell.batch, length) > 0.3
    pad[:, -1] = True
    inputs = {"x": torch.randn(cell.batch, length, HEADS * DIM).double(), "pad": pad}
    reports: list[Report] = []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=attnrewrite.Backend(inner="eager", strict=True, report=reports.append))
    (ordinary, theirs), (found, ours) = run(model, inputs), run(compiled, inputs)
    assert torch.allclose(found, ordinary, rtol=1e-8, atol=1e-9)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-7, atol=1e-8), name
    (site,) = [site for report in reports for site in report.sites]
    odd = cell.softmax == "logsumexp" and cell.mask.startswith("padding")
    assert site.status == ("rejected" if odd else "rewritten"), site


def test_every_axis_is_covered() -> None:
    everything = [cell for layout in LAYOUTS for scale in SCALES for cell in cells(layout, scale)]
    assert {cell.groups for cell in everything} == set(GROUPS)
    for first, second in (("layout", "mask"), ("layout", "softmax"), ("mask", "softmax"), ("layout", "groups")):
        pairs = {(getattr(cell, first), getattr(cell, second)) for cell in everything}
        values = [{getattr(cell, axis) for cell in everything} for axis in (first, second)]
        replaced = sum(mask.startswith("padding") for mask in MASKS) if second == "softmax" and first == "mask" else 0
        assert len(pairs) == len(values[0]) * len(values[1]) - replaced, (first, second)
