"""``attnrewrite calibrate``: set what a conversion learns from real inputs, and save the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.texts import load_conversion, strips, text_option
from attnrewrite.cli.verb import Verb, check_out, model_argument, out_argument, overwrite_option, seq_len_option

if TYPE_CHECKING:
    from attnrewrite.distances import Distance

_EXAMPLES = (
    "calibrate ./my-model-routing ./my-model-calibrated --text book.txt",
    "calibrate ./my-model-routing ./out --seq-len 512 --strips 64 --format json",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@out_argument
@text_option
@click.option("--strips", "count", type=click.IntRange(min=1), default=32, show_default=True, help="Read this many.")
@overwrite_option
@seq_len_option(256, "Tokens per strip.")
@click.pass_obj
def command(
    output: Output, model: str, out: Path, text: Path | None, count: int, overwrite: bool, seq_len: int
) -> None:
    """Set what a conversion of MODEL learns from real inputs, and write it to OUT.

    MODEL is a folder that `attnrewrite convert --variant routing` has written, with its tokenizer. The centroids of
    every layer are set from a text; all weights stay as they are.
    """
    from attnrewrite.calibration import calibrate
    from attnrewrite.distances import distance
    from attnrewrite.saving import save_conversion

    check_out(output, out, overwrite)
    loaded, source = load_conversion(output, model, seq_len)
    batches = strips(loaded, text, seq_len)[:count]
    with output.step(f"calibrating on {len(batches)} strips"):
        rows = calibrate(loaded.model, batches).rows
    with output.step("comparing with the original"):
        found = distance(loaded.model, loaded.model, batches[:1])
    save_conversion(loaded.model, source, out, overwrite=overwrite)
    data = {
        "model": loaded.name,
        "out": str(out),
        "strips": len(batches),
        "rows": rows,
        "distance": asdict(found),
    }
    output.result(data, lambda: _view(data, found))


def _view(data: dict[str, Any], found: Distance) -> RenderableType:
    from attnrewrite.render.distances import distance_lines

    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        by_layer.setdefault(row["layer"], []).append(row)
    names = [name for name, value in data["rows"][0].items() if isinstance(value, float)]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layer")
    for name in names:
        table.add_column(name, justify="right")
    for layer, rows in by_layer.items():
        table.add_row(Text(layer), *(f"{fmean(row[name] for row in rows):.3f}" for name in names))
    strips = f"{data['strips']} strip{'' if data['strips'] == 1 else 's'}"
    head = Text(f"{data['model']} · {len(by_layer)} layers calibrated on {strips}, means over heads", style="bold")
    lines = [Text(line) for line in distance_lines(found)]
    return Group(head, table, *lines, Text(f"wrote {data['out']}", style="dim"))
