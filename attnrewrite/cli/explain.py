"""``attnrewrite explain``: what attention a model holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, model_argument, seq_len_option

if TYPE_CHECKING:
    from attnrewrite.loading import LoadedModel
    from attnrewrite.passes.report import Report

_EXAMPLES = (
    "explain ./my-model",
    "explain ./my-model --attn eager --html report.html",
    "explain my_package.models:build --variant ssa --strict",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@click.option("--variant", help="Also check that this variant can be put into every site.")
@seq_len_option(32, "Tokens per example sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Example sequences.")
@click.option("--dtype", help="Load in this dtype: float32, bfloat16, float16, float64.")
@click.option("--attn", type=click.Choice(["eager", "sdpa"]), help="How a transformers model is to write attention.")
@click.option("--only", type=click.Choice(["matched", "rejected"]), help="Show the sites of one status.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report as a page.")
@click.option("--strict", is_flag=True, help="Exit with 3 when a site is rejected.")
@click.pass_obj
def command(
    output: Output,
    model: str,
    variant: str | None,
    seq_len: int,
    batch: int,
    dtype: str | None,
    attn: Any,
    only: str | None,
    html: Path | None,
    strict: bool,
) -> int:
    """Find the attention in MODEL and say what can be rewritten.

    Nothing is changed or compiled. Exits with 3 when no attention was found.
    """
    from attnrewrite.loading import LoadOptions, is_program, load_model

    if is_program(model):
        report = _explain_program(output, model, variant)
    else:
        with output.step(f"loading {model}"):
            loaded = load_model(model, LoadOptions(batch, seq_len, dtype, attn))
        report = _explain_model(output, loaded, variant)
    if html is not None:
        from attnrewrite.render.html import write_html

        write_html(report, html)
        output.note(f"wrote {html}")
    data = report.to_dict()
    if only is not None:
        data["sites"] = [site for site in data["sites"] if site["status"] == only]
    from attnrewrite.render.text import text_view

    output.result(data, lambda: text_view(report, verbose=output.verbose, only=only))
    summary = report.summary
    return 3 if not summary["sites"] or (strict and summary["rejected"]) else 0


def _explain_program(output: Output, path: str, variant: str | None) -> Report:
    from attnrewrite.explanation import explain_program
    from attnrewrite.loading import load_program

    if variant is not None:
        raise click.BadOptionUsage("--variant", "--variant needs a model; a .pt2 file can only be explained as it is.")
    with output.step(f"explaining {path}"):
        report = explain_program(load_program(path))
    report.model = Path(path).name
    return report


def _explain_model(output: Output, loaded: LoadedModel, variant: str | None) -> Report:
    from attnrewrite.explanation import capture_model, explain, explain_capture
    from attnrewrite.variants import parse_config

    inputs, keywords = loaded.example_inputs, loaded.example_kwargs
    with output.step(f"explaining {loaded.name}"):
        if variant is None:
            report = explain(loaded.model, *inputs, **keywords)
        else:
            config = parse_config(variant, {})
            report = explain_capture(capture_model(loaded.model, inputs, keywords), config)
    report.model = loaded.name
    return report
