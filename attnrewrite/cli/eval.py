"""``attnrewrite eval``: perplexity on a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.texts import load_with_tokenizer, text_option
from attnrewrite.cli.verb import Verb, model_argument, seq_len_option

if TYPE_CHECKING:
    from attnrewrite.evaluation import Evaluation

_EXAMPLES = (
    "eval ./my-model",
    "eval ./my-model-ssa --baseline ./my-model --text book.txt",
    "eval ./my-model --seq-len 512 --max-tokens 8192 --format json",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@text_option
@seq_len_option(256, "Tokens per strip; strips do not overlap.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=2048, show_default=True, help="Read this many.")
@click.option("--baseline", metavar="MODEL", help="Measure this model on the same text, too.")
@click.pass_obj
def command(output: Output, model: str, text: Path | None, seq_len: int, max_tokens: int, baseline: str | None) -> None:
    """Measure the perplexity of MODEL on a text: lower is better.

    MODEL must be a causal language model in a folder that holds its tokenizer.
    """
    from attnrewrite.evaluation import read_text

    content = read_text(text)
    measured = {"model": _measure(output, model, content, seq_len, max_tokens)}
    if baseline is not None:
        measured["baseline"] = _measure(output, baseline, content, seq_len, max_tokens)
    names = {"model": model, "baseline": baseline}
    data: dict[str, Any] = {role: {"name": names[role], **asdict(found)} for role, found in measured.items()}
    data["text"] = str(text) if text else "lamplighter.txt"
    output.result(data, lambda: _view(data))


def _measure(output: Output, reference: str, content: str, seq_len: int, max_tokens: int) -> Evaluation:
    from attnrewrite.evaluation import encode, perplexity

    loaded = load_with_tokenizer(output, reference, seq_len)
    ids = encode(loaded.tokenizer, content)[:, :max_tokens]
    with output.progress() as progress:
        task = progress.add_task(loaded.name, total=ids.shape[1])
        return perplexity(
            loaded.model, ids, seq_len=seq_len, progress=lambda done: progress.update(task, completed=done)
        )


def _view(data: dict[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("model")
    for title in ("perplexity", "loss", "tokens", "seconds"):
        table.add_column(title, justify="right")
    for role in ("model", "baseline"):
        if role in data:
            found = data[role]
            numbers = (f"{found['perplexity']:.3f}", f"{found['loss']:.4f}", str(found["tokens"]))
            table.add_row(Text(found["name"]), *numbers, f"{found['seconds']:.1f}")
    return table
