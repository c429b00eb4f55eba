"""Export: the rewritten model as a file for other runtimes and compilers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from attnrewrite.explanation import export_model, versions
from attnrewrite.kernels.decompositions import decompositions
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.passes.graph.capture import from_program
from attnrewrite.passes.graph.program import to_program
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Report
from attnrewrite.saving import check_free, new_file

Format = Literal["pt2", "mlir-torch", "mlir-linalg"]
_DIALECTS: dict[str, Literal["torch", "linalg-on-tensors"]] = {
    "mlir-torch": "torch",
    "mlir-linalg": "linalg-on-tensors",
}
FORMATS = ("pt2", *_DIALECTS)


def export(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    path: str | Path,
    format: Format = "pt2",
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    keep_operators: bool = False,
    overwrite: bool = False,
    report: Callable[[Report], None] | None = None,
) -> Path:
    """Write ``model``, its attention rewritten, to the file ``path``, whole or not at all, and return the path.

    A converted model is written with its variants, any other with the exact rewrite to fused attention; what cannot
    be rewritten stays as it is. The program is for inference, in the mode (``eval()``) that the model is in.

    Args:
        model: a module, or a program that ``torch.export`` has made, which brings its own inputs.
        example_inputs: inputs that the model runs on; only their shapes and dtypes matter.
        path: where to write.
        format: "pt2", a program of ``torch.export``; "mlir-torch" and "mlir-linalg", MLIR as text in the torch
            dialect or in linalg on tensors, by torch-mlir (``pip install 'attnrewrite[mlir]'``).
        example_kwargs: keyword arguments of the example.
        dynamic_shapes: which sizes may vary, as ``torch.export.export`` takes it; all others are those of the example.
        keep_operators: "pt2" only: leave our operators in the program, which then needs much less memory on long
            sequences, and ``import attnrewrite.functional`` before it is loaded. Without it the file needs torch alone.
        overwrite: whether ``path`` may exist.
        report: called with the Report.

    Raises:
        CaptureError: AR102 for wrong values, AR104, AR105 for inputs that do not run and models that cannot be
            captured, AR106 without torch-mlir.
        VariantError: AR307, AR309, AR312 where a converted layer's variant cannot be applied.
        SaveError: AR601 where ``path`` exists, AR605 where the format cannot hold the program.
    """
    path = Path(path)
    if format not in FORMATS:
        raise error("AR102", f"format is {format!r}; {closest(str(format), FORMATS)}")
    if keep_operators and format != "pt2":
        raise error("AR102", f"keep_operators with {format}: MLIR knows none of them", hint="leave it out")
    check_free(path, overwrite)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies structures in a way that it deprecates itself
        captured = _captured(model, example_inputs, example_kwargs, dynamic_shapes)
        capture = from_program(captured)
        found, _ = Pipeline(kernels="reference").rewrite(capture)  # what other compilers know
        program = to_program(capture, captured)
        if format == "pt2":
            _write_program(program, path, overwrite, keep_operators)
        else:
            _write_mlir(program, path, overwrite, format)
    found.model, found.versions = type(model).__name__, versions()
    if report is not None:
        report(found)
    return path


def _captured(
    model: torch.nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic: Any
) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        if len(args) or kwargs or dynamic is not None:
            raise error(
                "AR102", "an exported program brings its own inputs and sizes", hint="export(program, (), path)"
            )
        return model
    if not isinstance(args, (tuple, list)):
        raise error("AR102", f"example_inputs is a {type(args).__name__}", hint="pass a tuple: (tensor,)")
    return export_model(model, args, kwargs or {}, dynamic)


def _write_program(program: ExportedProgram, path: Path, overwrite: bool, keep_operators: bool) -> None:
    with new_file(path, overwrite) as file:
        try:
            torch.export.save(program.run_decompositions({} if keep_operators else decompositions()), file)
        except OSError:
            raise
        except Exception as failure:
            raise error("AR605", f"torch.export: {type(failure).__name__}: {failure}") from failure


def _write_mlir(program: ExportedProgram, path: Path, overwrite: bool, format: str) -> None:
    from attnrewrite.mlir import lower

    module = lower(program, _DIALECTS[format])
    with new_file(path, overwrite) as file, file.open("w") as text:
        module.operation.print(file=text)
