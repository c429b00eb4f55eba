"""Sweeps over sizes: ``seq_len=1k:32k:x2``, ``head_dim=64,128``, ``heads=4:16:+4``, and their product."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import prod

from attnrewrite.kernels.diagnostics import closest

AXES = ("batch", "heads", "kv_heads", "seq_len", "head_dim")
MOST_POINTS = 1000
"""More than anybody waits for: a mistyped step."""
_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20}
_FORMS = "AXIS=A,B,C, AXIS=A:B:xF or AXIS=A:B:+S, where k is 1024"


def sweep(text: str) -> tuple[str, list[int]]:
    """Return the axis of a sweep and its sizes, each once, in the order given.

    Parts are separated by commas: a size, or first and last size with a factor or a step. Raises ValueError.
    """
    name, equals, rest = text.partition("=")
    axis = name.strip().replace("-", "_")
    if not equals:
        raise ValueError(f"{text!r} is not of the form {_FORMS}")
    if axis not in AXES:
        raise ValueError(f"there is no axis {name!r}; {closest(axis, AXES)}")
    return axis, list(dict.fromkeys(size for part in rest.split(",") for size in _sizes(part.strip(), text)))


def points(fixed: Mapping[str, int], sweeps: Iterable[str]) -> list[dict[str, int]]:
    """Return the product of all sweeps over the ``fixed`` sizes; the last sweep turns fastest. Raises ValueError."""
    swept: dict[str, list[int]] = {}
    for text in sweeps:
        axis, sizes = sweep(text)
        if axis in swept:
            raise ValueError(f"{axis} is swept twice; put all its sizes into one sweep")
        swept[axis] = sizes
    count = prod(map(len, swept.values()))
    if count > MOST_POINTS:
        raise ValueError(f"that makes {count:,} points; at most {MOST_POINTS:,} are measured in one run")
    return [{**fixed, **dict(zip(swept, sizes, strict=True))} for sizes in product(*swept.values())]


def _sizes(part: str, text: str) -> Iterable[int]:
    ends = part.split(":")
    if len(ends) == 1:
        return [size_of(part, text)]
    if len(ends) != 3 or ends[2][:1] not in ("x", "+"):
        raise ValueError(f"{part!r} in {text!r} is not of the form A:B:xF or A:B:+S")
    first, last, step = size_of(ends[0], text), size_of(ends[1], text), size_of(ends[2][1:], text)
    if first > last:
        raise ValueError(f"{part!r} in {text!r} ends before it begins")
    if ends[2][0] == "+":
        return _few(range(first, last + 1, step), text)
    if step == 1:
        raise ValueError(f"{part!r} in {text!r} never ends: the factor is 2 or more")
    found = [first]
    while found[-1] * step <= last:
        found.append(found[-1] * step)
    return found


def _few(sizes: range, text: str) -> range:
    if len(sizes) > MOST_POINTS:
        raise ValueError(f"{text!r} has {len(sizes):,} sizes; at most {MOST_POINTS:,} are measured in one run")
    return sizes


def size_of(text: str, whole: str) -> int:
    """Return a size as it is written, of which k and m are binary; ``whole`` is where it stands. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,12})([km]?)", text.strip().lower())
    size = int(found[1]) * _SUFFIXES[found[2]] if found else 0
    if size < 1:
        place = "" if text == whole else f" in {whole!r}"
        raise ValueError(f"{text!r}{place} is no size: 1 or more, as 512 or 4k")
    return size
