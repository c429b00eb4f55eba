"""``attnrewrite distill``: train what a conversion added, and save the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.texts import load_conversion, strips, text_option
from attnrewrite.cli.verb import Verb, check_out, model_argument, out_argument, overwrite_option, seq_len_option

if TYPE_CHECKING:
    from attnrewrite.distillation import Distillation

_EXAMPLES = (
    "distill ./my-model-sea ./my-model-trained --text book.txt",
    "distill ./my-model-sea ./out --steps 1000 --lr 1e-4 --seq-len 512 --overwrite",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@out_argument
@text_option
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Updates, one strip each.")
@click.option("--lr", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Learning rate of AdamW.")
@overwrite_option
@seq_len_option(256, "Tokens per strip.")
@click.pass_obj
def command(
    output: Output, model: str, out: Path, text: Path | None, steps: int, lr: float, overwrite: bool, seq_len: int
) -> None:
    """Train what a conversion added to MODEL, and write it to OUT.

    MODEL is a folder that `attnrewrite convert` has written, with its tokenizer. Each layer learns by
    itself from the attention that the model computed before; all other weights stay as they are.
    """
    from attnrewrite.distillation import distill
    from attnrewrite.saving import save_conversion

    check_out(output, out, overwrite)
    loaded, source = load_conversion(output, model, seq_len)
    batches = strips(loaded, text, seq_len)
    with output.progress() as progress:
        task = progress.add_task("distilling", total=steps)

        def told(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"distilling, loss {loss:.4f}")

        record = distill(loaded.model, batches, steps=steps, lr=lr, progress=told)
    save_conversion(loaded.model, source, out, overwrite=overwrite)
    data = {"model": loaded.name, "out": str(out), **asdict(record)}
    output.result(data, lambda: _view(data, record))


def _view(data: dict[str, Any], record: Distillation) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layer")
    for title in ("loss before", "after"):
        table.add_column(title, justify="right")
    for layer, before in record.before.items():
        table.add_row(Text(layer), f"{before:.4f}", f"{record.after[layer]:.4f}")
    head = Text(f"{data['model']} · {record.steps} steps in {record.seconds:.0f} s", style="bold")
    return Group(head, table, Text(f"wrote {data['out']}", style="dim"))
