"""Tables of what is to be tuned, and of what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.render.records import SHORT

if TYPE_CHECKING:
    from attnrewrite.kernels.tuning.tasks import Task
    from attnrewrite.tuning import Result

_WORDS = {
    "tuned": "tuned",
    "stored": "was stored",
    "elsewhere": "another process tunes it",
    "failed": "not tuned",
    "left": "left as it is",
}


def tasks_view(known: Sequence[tuple[Task, str | None]]) -> RenderableType:
    """Show a line for each kernel, and where its record was found."""
    table = _table("kernel", "sizes", "key", "stored")
    for task, tier in known:
        table.add_row(*_task(task), Text(tier or "no"))
    return table


def results_view(results: Sequence[Result]) -> RenderableType:
    """Show a line for each kernel, and the seconds of all."""
    table = _table("kernel", "sizes", "key", "", "tile, warps, stages")
    for title in ("ms", "compiled", "timed", "seconds"):
        table.add_column(title, justify="right")
    for result in results:
        found = result.outcome
        row = [*_task(result.task), Text(_WORDS[result.what])]
        if found is None:
            table.add_row(*row)
            continue
        chosen = None if found.winner is None else found.timings.get(found.winner)
        config = "" if found.winner is None else str(found.winner)
        ms = "" if chosen is None or chosen.median is None else f"{chosen.median:.4g}"
        numbers = (ms, str(found.compiled), str(found.timed), f"{found.seconds:.1f}")
        table.add_row(*row, config, *numbers)
    lines = [f"{r.task.key.kernel}: {r.outcome.stopped}" for r in results if r.outcome and r.outcome.stopped]
    total = Text(f"{sum(result.seconds for result in results):.1f} s", style="dim")
    return Group(table, *(Text(line, style="yellow") for line in lines), total)


def _task(task: Task) -> list[Text]:
    shape = task.shape
    sizes = f"[{shape.B}, {shape.H}, {shape.L}, {shape.D}] on {shape.S} keys"
    return [Text(task.key.kernel), Text(sizes), Text(task.key.digest[:SHORT], style="bold")]


def _table(*titles: str) -> Table:
    return Table(*titles, box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
