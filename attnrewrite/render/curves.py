"""Curves as SVG, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jinja2

WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 640, 420, 64, 48, 300
COLOURS = (
    "#1b6ca8",
    "#c8553d",
    "#588157",
    "#7b2cbf",
    "#b08900",
    "#3a3a3a",
    "#d62976",
    "#00798c",
    "#8d5524",
    "#6b705c",
)


class Curve(NamedTuple):
    """A label, and points in the order in which they are joined; all numbers are positive."""

    label: str
    points: Sequence[tuple[float, float]]


_PAGE = jinja2.Template(
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width + legend }} {{ height }}" \
font-family="sans-serif" font-size="12">
<title>{{ title }}</title>
<rect width="100%" height="100%" fill="white"/>
{%- for x, text in across %}
<line x1="{{ x }}" y1="16" x2="{{ x }}" y2="{{ floor }}" stroke="#ddd"/>
<text x="{{ x }}" y="{{ floor + 16 }}" text-anchor="middle">{{ text }}</text>
{%- endfor %}
{%- for y, text in up %}
<line x1="{{ left }}" y1="{{ y }}" x2="{{ width - 16 }}" y2="{{ y }}" stroke="#ddd"/>
<text x="{{ left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{%- endfor %}
{%- for label, colour, place, dots in lines %}
<polyline points="{{ dots | map('join', ',') | join(' ') }}" fill="none" stroke="{{ colour }}" stroke-width="2"/>
{%- for x, y in dots %}
<circle cx="{{ x }}" cy="{{ y }}" r="3" fill="{{ colour }}"><title>{{ label }}</title></circle>
{%- endfor %}
<circle cx="{{ width + 8 }}" cy="{{ place - 4 }}" r="4" fill="{{ colour }}"/>
<text x="{{ width + 18 }}" y="{{ place }}">{{ label }}</text>
{%- endfor %}
<text x="{{ (left + width) / 2 }}" y="{{ height - 8 }}" text-anchor="middle">{{ x_label }}</text>
<text x="14" y="{{ height / 2 }}" text-anchor="middle" \
transform="rotate(-90 14 {{ height / 2 }})">{{ y_label }}</text>
</svg>
""",
    autoescape=True,
)


def curves(title: str, x_label: str, y_label: str, found: Sequence[Curve]) -> str:
    """Draw the curves, with their sizes below: the numbers on the lower axis are those that occur."""
    sizes = sorted({x for curve in found for x, _ in curve.points}) or [1.0]
    low, high = decades([y for curve in found for _, y in curve.points] or [1.0])
    floor, height = HEIGHT - BOTTOM, max(HEIGHT, 40 + 16 * len(found))

    def x(value: float) -> float:
        part = math.log(value / sizes[0]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else 0.5
        return round(LEFT + part * (WIDTH - 16 - LEFT), 1)

    def y(value: float) -> float:
        return round(floor - (math.log10(value) - low) / (high - low) * (floor - 16), 1)

    drawn: str = _PAGE.render(
        title=title,
        x_label=x_label,
        y_label=y_label,
        width=WIDTH,
        height=height,
        legend=LEGEND,
        left=LEFT,
        floor=floor,
        across=[(x(size), f"{size:g}") for size in sizes],
        up=[(y(10.0**n), f"{10.0**n:g}") for n in range(low, high + 1)],
        lines=[
            (curve.label, COLOURS[n % len(COLOURS)], 28 + 16 * n, [(x(a), y(b)) for a, b in curve.points])
            for n, curve in enumerate(found)
        ],
    )
    return drawn


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten around the values, at least one decade apart."""
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values)) + 1e-9))
