"""A roofline as SVG: what was reached, under what the device's memory and matrix units allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from attnrewrite.kernels.tuning.device import Device
from attnrewrite.render.curves import BOTTOM, COLOURS, HEIGHT, LEFT, LEGEND, WIDTH, decades


class Dot(NamedTuple):
    """FLOP per byte that must be moved, and TFLOP/s."""

    label: str
    intensity: float
    rate: float


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
<polyline points="{{ roof }}" fill="none" stroke="black" stroke-width="2"/>
{%- for y, text in ceilings %}
<line x1="{{ left }}" y1="{{ y }}" x2="{{ width - 16 }}" y2="{{ y }}" stroke="#888" stroke-dasharray="5 4"/>
<text x="{{ left + 6 }}" y="{{ y - 4 }}" fill="#555">{{ text }}</text>
{%- endfor %}
{%- for x, y, colour, label, place in dots %}
<circle cx="{{ x }}" cy="{{ y }}" r="4" fill="{{ colour }}"><title>{{ label }}</title></circle>
<circle cx="{{ width + 8 }}" cy="{{ place - 4 }}" r="4" fill="{{ colour }}"/>
<text x="{{ width + 18 }}" y="{{ place }}">{{ label }}</text>
{%- endfor %}
<text x="{{ (left + width) / 2 }}" y="{{ height - 8 }}" text-anchor="middle">FLOP per byte that must be moved</text>
<text x="14" y="{{ height / 2 }}" text-anchor="middle" \
transform="rotate(-90 14 {{ height / 2 }})">TFLOP/s of plain attention</text>
</svg>
""",
    autoescape=True,
)


def roofline(title: str, device: Device, widths: Sequence[int], dots: Sequence[Dot]) -> str:
    """Draw ``dots``, and a line for each of ``widths``, features per head: products and exponentials in turns."""
    matmul, memory = device.matmul / 1e12, device.memory / 1e12
    low_x, high_x = decades([matmul / memory, *(dot.intensity for dot in dots)])
    low_y, high_y = decades([matmul, *(dot.rate for dot in dots)])
    floor, height = HEIGHT - BOTTOM, max(HEIGHT, 40 + 16 * len(dots))

    def x(value: float) -> float:
        return round(LEFT + (math.log10(value) - low_x) / (high_x - low_x) * (WIDTH - 16 - LEFT), 1)

    def y(value: float) -> float:
        return round(floor - (math.log10(value) - low_y) / (high_y - low_y) * (floor - 16), 1)

    slope = max(10.0**low_x, 10.0**low_y / memory)
    corners = ((slope, slope * memory), (matmul / memory, matmul), (10.0**high_x, matmul))
    return _PAGE.render(
        title=title,
        width=WIDTH,
        height=height,
        legend=LEGEND,
        left=LEFT,
        floor=floor,
        across=[(x(10.0**n), f"{10.0**n:g}") for n in range(low_x, high_x + 1)],
        up=[(y(10.0**n), f"{10.0**n:g}") for n in range(low_y, high_y + 1)],
        roof=" ".join(f"{x(a)},{y(b)}" for a, b in corners),
        ceilings=[(y(1 / (1 / matmul + 1e12 / (4 * d * device.exponentials))), f"no overlap, d = {d}") for d in widths],
        dots=[
            (x(dot.intensity), y(dot.rate), COLOURS[n % len(COLOURS)], dot.label, 28 + 16 * n)
            for n, dot in enumerate(dots)
        ],
    )
