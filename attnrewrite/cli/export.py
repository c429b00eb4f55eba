"""``attnrewrite export``: write a rewritten model for other runtimes and compilers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, check_out, model_argument, out_argument, overwrite_option, seq_len_option

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from attnrewrite.passes.report import Report

_FORMATS = ("pt2", "mlir-torch", "mlir-linalg")  # those of attnrewrite.exporting, which imports torch
_EXAMPLES = (
    "export ./my-model-ssa model.pt2 --dynamic",
    "export ./my-model-ssa model.mlir --to mlir-linalg --seq-len 128",
    "export my_package.models:build model.pt2 --keep-operators --overwrite",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@out_argument
@click.option("--to", "kind", type=click.Choice(_FORMATS), default="pt2", show_default=True, help="The file's format.")
@click.option("--dynamic", is_flag=True, help="Leave the batch size and the length open, where the model allows.")
@click.option("--keep-operators", is_flag=True, help="pt2 only: keep the operators of attnrewrite; saves memory.")
@overwrite_option
@seq_len_option(32, "Tokens per example sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Example sequences.")
@click.pass_obj
def command(
    output: Output,
    model: str,
    out: Path,
    kind: Any,
    dynamic: bool,
    keep_operators: bool,
    overwrite: bool,
    seq_len: int,
    batch: int,
) -> None:
    """Write MODEL with its attention rewritten, for other compilers.

    A converted model is written with its variants, any other with the exact rewrite. Without --dynamic the program
    takes inputs of the example's sizes only, and with it a size of 1 stays 1.
    """
    from attnrewrite.exporting import export
    from attnrewrite.loading import LoadOptions, is_program, load_model, load_program

    check_out(output, out, overwrite)
    with output.step(f"loading {model}"):
        source: nn.Module | ExportedProgram
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        if is_program(model):
            source, name, args, kwargs = load_program(model), Path(model).name, (), {}
        else:
            loaded = load_model(model, LoadOptions(batch, seq_len))
            source, name, args, kwargs = loaded.model, loaded.name, loaded.example_inputs, loaded.example_kwargs
    reports: list[Report] = []
    with output.step(f"exporting {name}"):
        export(
            source,
            args,
            out,
            kind,
            example_kwargs=kwargs,
            dynamic_shapes=_open_sizes(args or kwargs) if dynamic else None,
            keep_operators=keep_operators,
            overwrite=overwrite,
            report=reports.append,
        )
    data = {
        "model": name,
        "out": str(out),
        "format": kind,
        "bytes": out.stat().st_size,
        "dynamic": dynamic,
        "keep_operators": keep_operators,
        "sites": {site.layer: site.variant if site.status == "rewritten" else "" for site in reports[0].sites},
    }
    output.result(data, lambda: _view(data))


def _open_sizes(inputs: Any) -> Any:
    """Let torch find out which of the first two sizes of every tensor may vary."""
    import torch
    from torch.utils._pytree import tree_map

    def sizes(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, torch.Tensor):
            return None
        return {axis: torch.export.Dim.AUTO for axis, size in enumerate(value.shape[:2]) if size > 1}

    return tree_map(sizes, inputs)


def _view(data: dict[str, Any]) -> RenderableType:
    from attnrewrite.render.rows import fold_paths

    by_variant: dict[str, list[str]] = {}
    for layer, variant in data["sites"].items():
        by_variant.setdefault(variant or "as written", []).append(layer)
    total = len(data["sites"])
    lines = [Text(f"{data['model']} · {total} site{'' if total == 1 else 's'} exported", style="bold")]
    for variant, layers in by_variant.items():
        lines += [Text(f"  {path} → {variant}") for path, _ in fold_paths(layers)]
    lines.append(Text(f"wrote {data['out']}: {data['format']}, {data['bytes']:,} bytes", style="dim"))
    return Group(*lines)
