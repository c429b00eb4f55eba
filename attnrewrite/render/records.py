"""Tuning records for people: tables of keys, one record, and why a key was not found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.kernels.store.key import Difference, Key, Pairs
from attnrewrite.kernels.store.record import Record, Timing
from attnrewrite.kernels.store.upkeep import Row

SHORT = 12
"""Characters of a digest that are shown."""


def rows_view(rows: Sequence[Row], root: Path) -> RenderableType:
    """Show how many keys each family has on each device."""
    table = _table("family", "device")
    table.add_column("keys", justify="right")
    for row in rows:
        table.add_row(row.family, row.device, str(row.keys))
    total = sum(row.keys for row in rows)
    where = Text(f"{total} key{'' if total == 1 else 's'} in {root}", style="dim")
    return Group(table, where) if rows else where


def key_rows(records: Sequence[Record]) -> RenderableType:
    """Show a line for each key."""
    table = _table("key", "kernel", "device", "types", "sizes", "triton", "configuration")
    table.add_column("ms", justify="right")
    for record in records:
        key, winner = record.key, _winner(record)
        sizes = _text((*key.dims, *((f"log2 {name}", value) for name, value in key.bucket)))
        facts = (key.kernel, key.device.name, ", ".join(key.dtypes), sizes, key.triton, _text(record.winner))
        table.add_row(Text(key.digest[:SHORT], style="bold"), *map(Text, facts), _ms(winner.median))
    return table


def record_page(record: Record, timings: Sequence[Timing]) -> RenderableType:
    """Show a key with every timing that is known, the fastest first."""
    fields = _table("field", "value")
    for name, value in {**record.key.flat(), **dict(record.origin), "revision": record.revision}.items():
        fields.add_row(Text(name, style="dim"), Text(str(value)))
    table = _table("configuration", "status")
    for title in ("median, ms", "p20", "p80", "runs", "registers", "spills", "shared, bytes"):
        table.add_column(title, justify="right")
    for timing in sorted(timings, key=lambda timing: (timing.median is None, timing.median or 0.0, timing.config)):
        used = ("" if x is None else str(x) for x in (timing.registers, timing.spills, timing.shared))
        style = "bold" if timing.config == record.winner else ""
        times = (_ms(timing.median), _ms(timing.p20), _ms(timing.p80), str(timing.n))
        table.add_row(Text(_text(timing.config)), timing.status, *times, *used, style=style)
    return Group(Text(record.key.digest, style="bold"), fields, "", table)


def misses_view(explained: Sequence[tuple[Key, Sequence[tuple[Record, Sequence[Difference]]]]]) -> RenderableType:
    """Show for each key that was looked for in vain the fields in which the nearest records differ."""
    parts: list[RenderableType] = []
    for key, nearest in explained:
        facts = f"{key.kernel} on {key.device.name}, {_text(key.bucket)}"
        parts.append(Text.assemble((key.digest[:SHORT], "bold"), f"  {facts}"))
        for record, differences in nearest:
            parts.append(Text(f"  {record.key.digest[:SHORT]} differs in"))
            parts += [Text(f"    {difference}") for difference in differences]
        if not nearest:
            parts.append(Text(f"  no record of the family {key.family} is stored"))
    return Group(*parts) if parts else Text("every key that was looked for was found", style="dim")


def paths_view(found: Sequence[tuple[str, str]], summary: str) -> RenderableType:
    """Show paths with what was found out about them."""
    return Group(*(Text(f"{path}: {reason}") for path, reason in found), Text(summary, style="dim"))


def _winner(record: Record) -> Timing:
    return next(timing for timing in record.timings if timing.config == record.winner)


def _text(values: Pairs) -> str:
    return ", ".join(f"{name} {value}" for name, value in values)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title)
    return table
