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
from attnrewrite.cli.verb import Verb, model_argument, seq_len_option
from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.distillation import Distillation
    from attnrewrite.loading import LoadedModel

_EXAMPLES = (
    "distill ./my-model-sea ./my-model-trained --text book.txt",
    "distill ./my-model-sea ./out --steps 1000 --lr 1e-4 --seq-len 512 --overwrite",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text. [default: the text that ships]")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Updates, one strip each.")
@click.option("--lr", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
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

    output.untouched = f"{out} was not written"
    if out.exists() and not overwrite:
        raise error("AR601", f"{out} exists")
    loaded, source = _load(output, model, seq_len)
    strips = _strips(loaded, text, seq_len)
    with output.progress() as progress:
        task = progress.add_task("distilling", total=steps)

        def told(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"distilling, loss {loss:.4f}")

        record = distill(loaded.model, strips, steps=steps, lr=lr, progress=told)
    save_conversion(loaded.model, source, out, overwrite=overwrite)
    data = {"model": loaded.name, "out": str(out), **asdict(record)}
    output.result(data, lambda: _view(data, record))


def _load(output: Output, model: str, seq_len: int) -> tuple[LoadedModel, Path]:
    from attnrewrite.conversion import conversion_of
    from attnrewrite.loading import LoadOptions, load_model

    with output.step(f"loading {model}"):
        loaded = load_model(model, LoadOptions(seq_len=seq_len, with_tokenizer=True))
    if conversion_of(loaded.model) is None or loaded.source is None:
        raise error("AR310", f"{model} carries no conversion", hint="run `attnrewrite convert` first")
    if loaded.tokenizer is None:
        detail = f"{model} brings no tokenizer, so that no text can be turned into its tokens"
        raise error("AR103", detail, hint="put the tokenizer's files into the model's folder")
    return loaded, loaded.source


def _strips(loaded: LoadedModel, text: Path | None, seq_len: int) -> list[dict[str, Any]]:
    """Return the calls of the model on whole strips of the text; of a short text, on all of it."""
    import torch

    from attnrewrite.evaluation import encode, no_cache, read_text

    ids = encode(loaded.tokenizer, read_text(text))
    strips = [strip for strip in torch.split(ids, seq_len, dim=1) if strip.shape[1] == seq_len]
    return [{"input_ids": strip, **no_cache(loaded.model)} for strip in strips or [ids]]


def _view(data: dict[str, Any], record: Distillation) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("layer")
    for title in ("loss before", "after"):
        table.add_column(title, justify="right")
    for layer, before in record.before.items():
        table.add_row(Text(layer), f"{before:.4f}", f"{record.after[layer]:.4f}")
    head = Text(f"{data['model']} · {record.steps} steps in {record.seconds:.0f} s", style="bold")
    return Group(head, table, Text(f"wrote {data['out']}", style="dim"))
