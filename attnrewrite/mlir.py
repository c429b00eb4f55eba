"""Lower an exported program to MLIR, by torch-mlir, which is imported here and only when asked for."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import fx
from torch.export import ExportedProgram

from attnrewrite.kernels.decompositions import decompositions
from attnrewrite.kernels.diagnostics import AttnRewriteError, error
from attnrewrite.kernels.sdpa.decomposition import scaled_dot_product_attention
from attnrewrite.passes.graph.nodes import op, shape, source_line

_OPERATOR = re.compile(r"name = \"torch\.([^\"]+)\"|failed to legalize operation 'torch\.(?!operator')([^']+)'")
_PLACE = re.compile(r'"([^"]+\.py)":(\d+)')


def lower(program: ExportedProgram, dialect: Literal["torch", "linalg-on-tensors"]) -> Any:
    """Return the program as an MLIR module with one function, ``main``; weights are constants in it.

    Raises CaptureError AR106 without torch-mlir, SaveError AR605 where it refuses the program.
    """
    try:
        from torch_mlir import fx as importer
        from torch_mlir import ir
        from torch_mlir.dialects import torch as torch_dialect
        from torch_mlir.extras.fx_decomp_util import get_decomposition_table
    except ImportError as missing:
        hint = "pip install 'attnrewrite[mlir]'"
        raise error("AR106", f"MLIR is written by torch-mlir: {missing}", hint=hint) from missing
    context = ir.Context()
    torch_dialect.register_dialect(context)
    said: list[str] = []

    def listen(diagnostic: Any) -> bool:
        said.append(f"{diagnostic.location}: {diagnostic.message}")
        return True

    context.attach_diagnostic_handler(listen)
    try:
        simple = program.run_decompositions(_table(get_decomposition_table()))
        if dialect != "torch":
            _check_views(simple)
        return importer.export_and_import(
            simple,
            output_type=dialect,
            fx_importer=importer.FxImporter(context=context),
            experimental_support_mutation=True,  # the older importer knows no buffers that are not saved
            decomposition_table={},
        )
    except AttnRewriteError:
        raise
    except Exception as failure:
        raise _refusal(said, failure) from failure


def _table(theirs: dict[Any, Any]) -> dict[Any, Any]:
    """Return torch-mlir's decompositions with ours; it lowers whole products itself, without merging their axes."""
    aten = torch.ops.aten
    kept = {name: f for name, f in theirs.items() if name not in (aten.linear.default, aten.matmul.default)}
    return {**kept, **decompositions(), aten.scaled_dot_product_attention.default: scaled_dot_product_attention}


def _check_views(program: ExportedProgram) -> None:
    """Refuse views that merge two open sizes: torch-mlir 20261001 takes one of the two for 1, without a word."""
    for node in program.graph.nodes:
        if op(node) in ("view", "_unsafe_view", "reshape") and _merges(node):
            raise error(
                "AR605",
                "a view merges two sizes that are both open, which torch-mlir lowers to a wrong program",
                source=source_line(node),
                hint="leave one size open and fix the other, such as the batch size",
            )


def _merges(view: fx.Node) -> bool:
    source = view.args[0]
    assert isinstance(source, fx.Node)
    before = [str(size) for size in shape(source)]
    made = [size for size in shape(view) if isinstance(size, torch.SymInt) and str(size) not in before]
    return any(len(size.node.expr.free_symbols) > 1 for size in made)


def _refusal(said: list[str], failure: Exception) -> AttnRewriteError:
    """Say which operator torch-mlir has no lowering for, and where the model calls it."""
    for text in said:
        operator, place = _OPERATOR.search(text), _PLACE.search(text)
        if operator is not None:
            source = f"{place[1]}:{place[2]}" if place is not None else ""
            return error("AR605", f"torch-mlir has no lowering for {operator[1] or operator[2]}", source=source)
    detail = said[0] if said else f"{type(failure).__name__}: {failure}"
    return error("AR605", f"torch-mlir: {detail.splitlines()[0][:400]}")
