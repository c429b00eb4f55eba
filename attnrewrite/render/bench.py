"""Measured attentions: a table for people, CSV, and curves over a swept size."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.bench.run import Row
from attnrewrite.render.curves import Curve, curves

COLUMNS = ("ms", "p20", "p80", "rounds", "tflops", "gib", "error", "ratio", "why")


def bench_view(rows: Sequence[Row], settings: Mapping[str, Any]) -> RenderableType:
    """Show a line for each attention, with the sizes and passes in which lines differ; the rest stands above."""
    varied = _varied(rows)
    passes = list(dict.fromkeys(row.metric for row in rows))
    same = [f"{axis} {size}" for axis, size in rows[0].point.items() if axis not in varied] if rows else []
    same += passes if len(passes) == 1 else []
    facts = [settings["device_name"], settings["dtype"], "causal" if settings["causal"] else "bidirectional", *same]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in (*varied, *(["pass"] if len(passes) > 1 else []), "attention"):
        table.add_column(title, overflow="fold")
    for title in ("ms", "p20 to p80", "TFLOP/s", "GiB", "error", f"÷ {settings['baseline']}"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    place: tuple[object, ...] = ()
    for row in rows:
        here = (*(row.point[axis] for axis in varied), *([row.metric] if len(passes) > 1 else []))
        if place and here != place:
            table.add_section()
        heads = ["" if here == place else str(x) for x in here]
        place = here
        table.add_row(*heads, Text(row.name), *_figures(row), Text(row.why, style="yellow"))
    return Group(Text(" · ".join(facts), style="bold"), table)


def to_csv(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """Return a line for each row, with a header; what holds for the whole run stands in every line."""
    same = {name: settings[name] for name in ("device", "device_name", "dtype", "causal", "baseline")}
    file = io.StringIO()
    axes = list(rows[0].point) if rows else []
    writer = csv.DictWriter(file, [*same, *axes, "pass", "name", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**same, **row.to_dict()} for row in rows)
    return file.getvalue()


def to_svg(rows: Sequence[Row], settings: Mapping[str, Any], axis: str) -> str:
    """Draw milliseconds over the sizes of ``axis``, a curve for each attention, pass and other size that varies."""
    others = [name for name in _varied(rows) if name != axis]
    passes = {row.metric for row in rows}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.ms is not None:
            parts = [row.name, *([row.metric] if len(passes) > 1 else []), *(f"{x} {row.point[x]}" for x in others)]
            found.setdefault(", ".join(parts), []).append((row.point[axis], row.ms))
    title = f"Attention on {settings['device_name']}, {settings['dtype']}"
    return curves(title, axis, "ms", [Curve(label, sorted(dots)) for label, dots in found.items()])


def _varied(rows: Sequence[Row]) -> list[str]:
    return [axis for axis in rows[0].point if len({row.point[axis] for row in rows}) > 1] if rows else []


def _figures(row: Row) -> list[str]:
    if row.ms is None:
        return [""] * 6
    cells = [f"{row.ms:.3g}", f"{row.p20:.3g} to {row.p80:.3g}", f"{row.tflops:.3g}", f"{row.gib:.3g}"]
    return [*cells, "" if row.error is None else f"{row.error:.1e}", "" if row.ratio is None else f"{row.ratio:.2f}"]
