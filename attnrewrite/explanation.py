"""Explain: capture a model, match, prove, say why not; change nothing, compile nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from attnrewrite.kernels.diagnostics import AttnRewriteError, error
from attnrewrite.passes.capture import Capture, from_program
from attnrewrite.passes.names import name_weights
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Report
from attnrewrite.passes.select import Plan
from attnrewrite.variants import SdpaConfig, VariantConfig


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Report every attention of ``model``, called as ``model(*args, **kwargs)``, and every softmax that is none.

    Raises:
        CaptureError: AR104 where the model does not run on these inputs, AR105 where it cannot be captured.
    """
    start = time.perf_counter()
    capture = capture_model(model, args, kwargs)
    report = explain_capture(capture)
    report.model = type(model).__name__
    report.timings_ms["capture"] = (time.perf_counter() - start) * 1e3 - sum(report.timings_ms.values())
    return report


def explain_program(program: torch.export.ExportedProgram) -> Report:
    """Report every attention of an exported program (a ``.pt2`` file)."""
    return explain_capture(_named_capture(program))


def explain_capture(capture: Capture, config: VariantConfig | None = None) -> Report:
    """Report every attention of a captured graph, and whether the variant ``config`` covers it."""
    settings = (config or SdpaConfig()).to_dict()
    pipeline = Pipeline(Plan(settings.pop("variant"), settings), draw=True)
    report, found = pipeline.inspect(capture)
    pipeline.check(capture, found, report)
    report.versions = versions()
    return report


def capture_model(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Capture a model with torch.export. Raises CaptureError AR104, AR105."""
    return _named_capture(export_model(model, args, kwargs))


def _named_capture(program: torch.export.ExportedProgram) -> Capture:
    capture = from_program(program)
    name_weights(capture, program)
    return capture


def export_model(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """Export a model as it is, compiled or not; its buffers are left as they were."""
    if not isinstance(model, torch.nn.Module):
        raise error("AR102", f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    with uncompiled(model), without_cache(model, kwargs) as inputs:
        try:
            return torch.export.export(model, tuple(args), dict(inputs), strict=False)
        except AttnRewriteError:
            raise
        except Exception as failure:
            raise _diagnose(model, args, inputs, failure) from failure


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Call the model's own code for a while, not what ``model.compile`` made of it."""
    compiled = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@contextmanager
def without_cache(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield kwargs that ask a transformers model for no key-value cache, which torch.export cannot return."""
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache") and "use_cache" not in kwargs and hasattr(model, "main_input_name"):
        import inspect

        if "use_cache" in inspect.signature(model.forward).parameters or getattr(config, "use_cache", False):
            before = config.use_cache  # type: ignore[union-attr]  # hasattr said so
            config.use_cache = False  # type: ignore[union-attr]  # likewise
            try:
                yield dict(kwargs)
            finally:
                config.use_cache = before  # type: ignore[union-attr]  # likewise
            return
    yield dict(kwargs)


def _diagnose(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], failure: Exception
) -> AttnRewriteError:
    """Tell inputs that the model itself refuses from a model that cannot be captured."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as own:
        return error("AR104", f"{type(own).__name__}: {_first_lines(own)}")
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
    return error("AR105", f"torch.export: {type(failure).__name__}: {_first_lines(failure)}")


def _first_lines(failure: Exception, limit: int = 3) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return " ".join(lines[:limit])[:400]


def versions() -> dict[str, str]:
    """Return the versions that a report depends on."""
    import attnrewrite

    return {"attnrewrite": attnrewrite.__version__, "torch": str(torch.__version__)}
