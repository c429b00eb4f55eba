"""Grids of (query, key): evaluate conditions on positions, and name what they make visible."""

from __future__ import annotations

import torch

from attnrewrite.passes.attention.form import Leaf
from attnrewrite.passes.graph.axes import Dim, Layout, flat, size_of
from attnrewrite.passes.graph.evaluate import Evaluator
from attnrewrite.passes.report import Mask


def grid(evaluator: Evaluator, static: list[Leaf], rows: Dim, cols: Dim) -> torch.Tensor | None:
    """Evaluate the conjunction as a bool tensor [L, S], or None where it differs between batches or heads."""
    out: torch.Tensor | None = None
    axes = (flat(rows), flat(cols))
    for leaf in static:
        value = evaluator.value(leaf.node)
        value = value > leaf.threshold if leaf.threshold is not None else value.bool() == leaf.polarity
        value = _to_rows_cols(value, leaf.layout, axes)
        if value is None:
            return None
        out = value if out is None else out & value
    if out is None:
        return None
    sizes = [int(evaluator.concrete(size_of(axis))) for axis in axes]
    return out.expand(sizes)


def _to_rows_cols(value: torch.Tensor, layout: Layout, axes: tuple[Dim, Dim]) -> torch.Tensor | None:
    """Reduce other axes, which must be constant, and order the rest as [rows or 1, cols or 1]."""
    layout = layout[len(layout) - value.dim() :]
    for d, dim in enumerate(layout):
        if flat(dim) in axes and dim:
            continue
        first = value.narrow(d, 0, 1)
        if value.shape[d] != 1 and not bool((value == first).all()):
            return None
        value = first
    positions = {flat(dim): d for d, dim in enumerate(layout) if dim}
    row, col = positions.get(axes[0]), positions.get(axes[1])
    keep = [d for d in (row, col) if d is not None]
    value = value.permute([*(d for d in range(value.dim()) if d not in keep), *keep])
    value = value.reshape([value.shape[value.dim() - len(keep) + i] for i in range(len(keep))])
    if row is None:
        value = value.unsqueeze(0)
    return value.unsqueeze(-1) if col is None else value


def draw(mask: Mask, like: torch.Tensor) -> torch.Tensor:
    """Return the boolean grid [L, S] that a name stands for, in the size of ``like``."""
    i = torch.arange(like.shape[0], device=like.device)[:, None]
    j = torch.arange(like.shape[1], device=like.device)[None, :]
    grid = torch.ones_like(like)
    if mask.offset is not None:
        grid = grid & (j <= i + mask.offset)
    if mask.offset is not None and mask.window is not None:
        grid = grid & (j > i + mask.offset - mask.window)
    return grid


def name_grid(visible: torch.Tensor) -> Mask | None:
    """Name a boolean grid [L, S]: none, causal with offset, or window; None if no predicate equals it everywhere."""
    if bool(visible.all()):
        return Mask("none")
    counts = visible.sum(-1)
    if not bool(counts.any()):
        return None
    row = int(counts.nonzero()[0])
    offset = int(visible[row].nonzero()[-1]) - row
    for mask in (Mask("causal", offset=offset), Mask("window", offset=offset, window=int(counts.max()))):
        if bool((visible == draw(mask, visible)).all()):
            return mask
    return None
