"""The terminal view of a Report."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnrewrite.passes.report import Report, Site
from attnrewrite.render.rows import TIMES, duration, facts_text, rejections, rows, short_source

STYLES = {"rewritten": "green", "matched": "green", "rejected": "red", "skipped": "dim"}


def plain_text(report: Report) -> str:
    """Return the view as plain text, with every layer and every source in full."""
    console = Console(file=io.StringIO(), width=1000, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(text_view(report, verbose=True))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def text_view(report: Report, *, verbose: bool = False, only: str | None = None) -> RenderableType:
    """Lay out the report: a header, the sites, then each rejection with the nearest accepted form and a hint.

    Without ``verbose`` layers that read alike are folded into one row and sources lose their folders; with it, there
    is a column of what is special about each site. ``only`` keeps what ``Report.only`` keeps; the header counts
    everything.
    """
    shown = report.only(only)
    parts: list[RenderableType] = [header(report)]
    if shown.sites:
        parts += ["", _table(shown.sites, verbose)]
    parts += _rejections(shown, verbose)
    if report.timings_ms:
        steps = " · ".join(f"{name} {duration(ms)}" for name, ms in report.timings_ms.items())
        parts += ["", Text(steps, style="dim")]
    return Group(*parts)


def header(report: Report) -> Text:
    """Say in one line what was found: ``tiny-llama · 4 attention sites: 3 rewritten, 1 rejected``."""
    summary = dict(report.summary)
    total = summary.pop("sites")
    others = sum(rejection.code == "AR202" for rejection in report.rejections)
    counts = ", ".join(f"{count} {status}" for status, count in summary.items() if count)
    text = Text()
    text.append(report.model or "model", style="bold")
    text.append(f" · {total} attention site{'' if total == 1 else 's'}")
    text.append(f": {counts}" if counts else "")
    return text.append(f" · {others} softmax{'' if others == 1 else 'es'} not attention" if others else "")


def _table(sites: list[Site], verbose: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("source", overflow="fold")
    for name in ("heads", f"L{TIMES}S", "mask"):
        table.add_column(name)
    facts = [facts_text(site) for site in sites] if verbose else []
    if any(facts):
        table.add_column("facts", overflow="fold")
    table.add_column("result", overflow="fold")
    for number, row in enumerate(rows(sites, fold=not verbose)):
        source = row.source if verbose else short_source(row.source)
        result = Text(row.result, style=STYLES[row.status])
        special = [Text(facts[number])] if any(facts) else []
        table.add_row(Text(row.layer), Text(source), row.heads, row.lengths, Text(row.mask), *special, result)
    return table


def _rejections(report: Report, verbose: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for rejection, layers in rejections(report):
        head = Text()
        head.append(rejection.code, style="bold red")
        head.append(f"  {rejection.title}", style="bold")
        source = rejection.source if verbose else short_source(rejection.source)
        for place in (layers, source):
            if place:
                head.append(f"  {place}", style="dim")
        lines = [
            Text(rejection.detail),
            *([Text(f"nearest accepted form: {rejection.nearest}")] if rejection.nearest else []),
            *(Text(f"hint: {hint}", style="cyan") for hint in rejection.hints if hint),
        ]
        parts += ["", head, Padding(Group(*lines), (0, 0, 0, 7))]
    return parts
