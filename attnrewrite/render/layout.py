"""Where the boxes and lines of a drawing lie: layers from top to bottom, few crossings, straight ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx  # type: ignore[import-untyped]  # it ships no types

from attnrewrite.passes.report import Box, Drawing

_LETTER, _PADDING, _HEIGHT = 6.8, 20, 38
_GAP_X, _GAP_Y, _MARGIN = 18, 26, 8
_SWEEPS = 6

Point = tuple[float, float]
_Cell = str | tuple[str, str, int]
"""A box by its name, or the place at which the line of an edge passes a layer."""


@dataclass(frozen=True)
class Placed:
    """A box with its upper left corner and its two lines of text."""

    box: Box
    x: float
    y: float
    width: float
    height: float
    label: str
    value: str


@dataclass(frozen=True)
class Picture:
    """A drawing with places, in pixels; ``lines`` are SVG paths."""

    width: float = 0
    height: float = 0
    boxes: list[Placed] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def picture(drawing: Drawing) -> Picture:
    """Lay a drawing out; every edge points downwards."""
    if not drawing.nodes:
        return Picture()
    boxes = {box.name: box for box in drawing.nodes}
    graph = nx.DiGraph()
    graph.add_nodes_from(boxes)
    graph.add_edges_from((a, b) for a, b in drawing.edges)
    layers, ways = _with_ways(graph, _layers(graph))
    widths: dict[_Cell, float] = {name: _width(box) for name, box in boxes.items()}
    centres = _centres(_ordered(layers, ways), ways, widths)
    heights = {cell: n * (_HEIGHT + _GAP_Y) + _MARGIN for n, layer in enumerate(layers) for cell in layer}
    placed = [
        Placed(box, centres[name] - widths[name] / 2, heights[name], widths[name], _HEIGHT, *_texts(box))
        for name, box in boxes.items()
    ]
    right = max(p.x + p.width for p in placed)
    right = max(right, *centres.values())
    bottom = max(p.y + p.height for p in placed)
    lines = [_line(_points(way, centres, heights)) for way in _whole(graph, ways)]
    return Picture(right + _MARGIN, bottom + _MARGIN, placed, lines)


def _texts(box: Box) -> tuple[str, str]:
    label = box.name if box.op == "input" else box.op
    return label, f"{box.dtype} [{', '.join(map(str, box.shape))}]" if box.dtype else ""


def _width(box: Box) -> float:
    return max(map(len, _texts(box))) * _LETTER + _PADDING


def _layers(graph: nx.DiGraph) -> list[list[_Cell]]:
    """Put every box as low as what reads it allows, so that inputs stand beside the place where they enter."""
    return [sorted(layer, key=list(graph).index) for layer in nx.topological_generations(graph.reverse())][::-1]


def _with_ways(graph: nx.DiGraph, layers: list[list[_Cell]]) -> tuple[list[list[_Cell]], list[tuple[_Cell, _Cell]]]:
    """Add a cell for every layer that an edge passes; return the layers and the steps from layer to layer."""
    level = {cell: n for n, layer in enumerate(layers) for cell in layer}
    ways: list[tuple[_Cell, _Cell]] = []
    for a, b in graph.edges:
        passed: list[_Cell] = [(a, b, n) for n in range(level[a] + 1, level[b])]
        for cell, n in zip(passed, range(level[a] + 1, level[b]), strict=True):
            layers[n].append(cell)
        cells = [a, *passed, b]
        ways += pairwise(cells)
    return layers, ways


def _ordered(layers: list[list[_Cell]], ways: list[tuple[_Cell, _Cell]]) -> list[list[_Cell]]:
    """Sort each layer by the mean place of the neighbours above, then below, a few times: lines cross less."""
    up, down = _neighbours(ways)
    for sweep in range(_SWEEPS):
        turned = layers if sweep % 2 == 0 else layers[::-1]
        for fixed, layer in pairwise(turned):
            place = {cell: n for n, cell in enumerate(fixed)}
            near = up if sweep % 2 == 0 else down
            means = {
                cell: _mean([place[x] for x in near.get(cell, []) if x in place], n) for n, cell in enumerate(layer)
            }
            layer.sort(key=means.__getitem__)
    return layers


def _neighbours(ways: list[tuple[_Cell, _Cell]]) -> tuple[dict[_Cell, list[_Cell]], dict[_Cell, list[_Cell]]]:
    up: dict[_Cell, list[_Cell]] = {}
    down: dict[_Cell, list[_Cell]] = {}
    for a, b in ways:
        up.setdefault(b, []).append(a)
        down.setdefault(a, []).append(b)
    return up, down


def _centres(
    layers: list[list[_Cell]], ways: list[tuple[_Cell, _Cell]], widths: Mapping[_Cell, float]
) -> dict[_Cell, float]:
    """Pull every cell towards its neighbours while none overlap; return the middle of each."""
    up, down = _neighbours(ways)
    centres: dict[_Cell, float] = {}
    for layer in layers:
        centres |= _spread(layer, dict.fromkeys(layer, 0.0), widths)
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = {
                cell: _mean([centres[x] for x in [*up.get(cell, []), *down.get(cell, [])]], centres[cell])
                for cell in layer
            }
            centres |= _spread(layer, wanted, widths)
    left = min(centre - widths.get(cell, 0.0) / 2 for cell, centre in centres.items())
    return {cell: centre - left + _MARGIN for cell, centre in centres.items()}


def _spread(layer: list[_Cell], wanted: Mapping[_Cell, float], widths: Mapping[_Cell, float]) -> dict[_Cell, float]:
    """Place a layer from left to right, as near as can be to where its cells want to be."""
    found: dict[_Cell, float] = {}
    edge = float("-inf")
    for cell in layer:
        half = widths.get(cell, 0.0) / 2
        found[cell] = max(wanted[cell], edge + half)
        edge = found[cell] + half + _GAP_X
    shift = _mean([found[cell] - wanted[cell] for cell in layer], 0.0)
    return {cell: centre - shift for cell, centre in found.items()}


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _whole(graph: nx.DiGraph, ways: list[tuple[_Cell, _Cell]]) -> list[list[_Cell]]:
    """Return every edge as the cells it goes through."""
    passed: dict[tuple[str, str], list[_Cell]] = {}
    for _, cell in ways:
        if isinstance(cell, tuple):
            passed.setdefault(cell[:2], []).append(cell)
    return [[a, *passed.get((a, b), []), b] for a, b in graph.edges]


def _points(way: list[_Cell], centres: Mapping[_Cell, float], heights: Mapping[_Cell, float]) -> list[Point]:
    """Return the way from the lower edge of a box, past the boxes of the layers between, to the upper edge of one."""
    points = [(centres[way[0]], heights[way[0]] + _HEIGHT)]
    for cell in way[1:-1]:
        points += [(centres[cell], heights[cell]), (centres[cell], heights[cell] + _HEIGHT)]
    return [*points, (centres[way[-1]], heights[way[-1]])]


def _line(points: list[Point]) -> str:
    """Write a smooth SVG path with an arrow at its end."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (x, y), (u, v) in pairwise(points):
        middle = (y + v) / 2
        parts.append(f"L{u:.1f} {v:.1f}" if x == u else f"C{x:.1f} {middle:.1f} {u:.1f} {middle:.1f} {u:.1f} {v:.1f}")
    u, v = points[-1]
    parts.append(f"M{u - 3:.1f} {v - 6:.1f}L{u:.1f} {v:.1f}L{u + 3:.1f} {v - 6:.1f}")
    return "".join(parts)
