"""``attnrewrite explain``: what attention a model holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, model_argument, seq_len_option
from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.loading import LoadedModel
    from attnrewrite.passes.matching.match import Found
    from attnrewrite.passes.report import Report
    from attnrewrite.variants import VariantConfig

ONLY = ("matched", "rejected", "not-attention")
_EXAMPLES = (
    "explain ./my-model",
    "explain ./my-model --attn eager --html report.html",
    "explain my_package.models:build --only rejected --repro ./cases --strict",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@click.option("--variant", help="Also check that this variant can be put into every site.")
@seq_len_option(32, "Tokens per example sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Example sequences.")
@click.option("--dtype", help="Load in this dtype: float32, bfloat16, float16, float64.")
@click.option("--attn", type=click.Choice(["eager", "sdpa"]), help="How a transformers model is to write attention.")
@click.option("--only", type=click.Choice(ONLY), help="Show the softmaxes of one status.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write the report as a page.")
@click.option(
    "--repro", type=click.Path(path_type=Path), help="Also write a program per rejected site into a new folder."
)
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
    repro: Path | None,
    strict: bool,
) -> int:
    """Find the attention in MODEL and say what can be rewritten.

    Every softmax is matched, rejected or not attention, and what is not matched comes with a code, the reason, its
    place, the nearest accepted form and a hint. Nothing is changed or compiled. Exits with 3 when no attention was
    found.

    --repro writes small programs that show each distinct rejected site, or where none is rejected each distinct site,
    without the model.
    """
    from attnrewrite.loading import LoadOptions, is_program, load_model

    if repro is not None and repro.exists():
        raise error("AR601", f"{repro} exists", hint="choose another folder for --repro")
    if is_program(model):
        report, found = _explain_program(output, model, variant)
    else:
        from attnrewrite.variants import parse_config

        config = None if variant is None else parse_config(variant, {})  # loading takes long: wrong words come first
        with output.step(f"loading {model}"):
            loaded = load_model(model, LoadOptions(batch, seq_len, dtype, attn))
        report, found = _explain_model(output, loaded, config)
    if html is not None:
        from attnrewrite.render.html import write_html

        write_html(report, html)
        output.note(f"wrote {html}")
    if repro is not None:
        _write_programs(output, report, found, repro)
    data = {**report.only(only).to_dict(), "summary": report.summary}
    from attnrewrite.render.text import text_view

    output.result(data, lambda: text_view(report, verbose=output.verbose, only=only))
    summary = report.summary
    return 3 if not summary["sites"] or (strict and summary["rejected"]) else 0


def _write_programs(output: Output, report: Report, found: Found, folder: Path) -> None:
    if not report.sites:
        output.note(f"no attention, nothing to write to {folder}")
        return
    from attnrewrite.repro import write_programs

    count = len(write_programs(report, found, folder))
    output.note(f"wrote {count} program{'' if count == 1 else 's'} to {folder}")


def _explain_program(output: Output, path: str, variant: str | None) -> tuple[Report, Found]:
    from attnrewrite.explanation import inspect_capture
    from attnrewrite.loading import load_program
    from attnrewrite.passes.graph.capture import from_program

    if variant is not None:
        raise click.BadOptionUsage("--variant", "--variant needs a model; a .pt2 file can only be explained as it is.")
    with output.step(f"explaining {path}"):
        report, found = inspect_capture(from_program(load_program(path)))
    report.model = Path(path).name
    return report, found


def _explain_model(output: Output, loaded: LoadedModel, config: VariantConfig | None) -> tuple[Report, Found]:
    from attnrewrite.explanation import inspect_model

    with output.step(f"explaining {loaded.name}"):
        report, found = inspect_model(loaded.model, loaded.example_inputs, loaded.example_kwargs, config)
    report.model = loaded.name
    return report, found
