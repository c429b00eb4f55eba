"""Explain: capture a model, match, prove, say why not; change nothing, compile nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from attnrewrite.compiled import uncompiled
from attnrewrite.dynamo import capture_graphs, unchanged_buffers
from attnrewrite.kernels.diagnostics import AttnRewriteError, error
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.graph.capture import Capture, from_program
from attnrewrite.passes.matching.match import Found
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Report
from attnrewrite.passes.rewriting.select import Plan
from attnrewrite.variants import SdpaConfig, VariantConfig


def explain(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Report every attention of ``model``, called as ``model(*args, **kwargs)``, and every softmax that is none.

    Raises:
        CaptureError: AR104 where the model does not run on these inputs, AR105 where it cannot be captured.
    """
    return inspect_model(model, args, kwargs)[0]


def inspect_model(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: VariantConfig | None = None
) -> tuple[Report, Found]:
    """Do what ``explain`` does, for a variant; also return the sites in the graphs, in the order of the report's.

    A model that torch.export cannot take as a whole is captured graph by graph, as torch.compile does.
    """
    start = time.perf_counter()
    whole: AttnRewriteError | None = None
    try:
        captures = [capture_model(model, args, kwargs)]
    except AttnRewriteError as failure:
        if failure.code != "AR105":
            raise
        captures, whole = _graph_by_graph(model, args, kwargs, failure), failure
    report, found = _merged([inspect_capture(capture, config) for capture in captures])
    if whole is not None and not report.sites and not report.rejections:
        raise whole  # graphs without any softmax do not say that the model has none
    report.model = type(model).__name__
    report.timings_ms["capture"] = (time.perf_counter() - start) * 1e3 - sum(report.timings_ms.values())
    return report, found


def _graph_by_graph(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], failure: AttnRewriteError
) -> list[Capture]:
    try:
        with uncompiled(model), without_cache(model, kwargs) as inputs:
            return capture_graphs(model, args, inputs)
    except Exception:
        raise failure from None


def _merged(parts: list[tuple[Report, Found]]) -> tuple[Report, Found]:
    """Join the findings of several graphs: all matched sites first, as in one."""
    whole, found = Report(), Found()
    matched, refused = [], []
    for report, part in parts:
        count = len(part.attentions)
        whole.extend(report)
        matched += report.sites[:count]
        refused += report.sites[count:]
        found.attentions += part.attentions
        found.refused += part.refused
        found.not_attention += part.not_attention
    whole.sites, whole.versions = matched + refused, versions()
    return whole, found


def explain_program(program: torch.export.ExportedProgram) -> Report:
    """Report every attention of an exported program (a ``.pt2`` file)."""
    return explain_capture(from_program(program))


def explain_capture(capture: Capture, config: VariantConfig | None = None) -> Report:
    """Report every attention of a captured graph, and whether the variant ``config`` covers it."""
    return inspect_capture(capture, config)[0]


def inspect_capture(capture: Capture, config: VariantConfig | None = None) -> tuple[Report, Found]:
    """Do what ``explain_capture`` does; also return the sites in the graph, in the order of the report's."""
    config = config or SdpaConfig()
    settings = config.to_dict()
    pipeline = Pipeline(Plan(settings.pop("variant"), settings), draw=True, parameters=_parameters_of(config))
    report, found = pipeline.inspect(capture)
    pipeline.check(capture, found, report)
    report.versions = versions()
    return report, found


def _parameters_of(config: VariantConfig) -> Callable[[Attention], Mapping[str, torch.Tensor]] | None:
    def parameters(site: Attention) -> Mapping[str, torch.Tensor]:
        query = site.query.node.meta["val"]
        module = config.module(site, query.device, query.dtype)
        return dict(itertools.chain(module.named_parameters(), module.named_buffers()))

    return parameters if config.adds_parameters and not config.swaps_modules else None


def capture_model(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Capture:
    """Capture a model with torch.export. Raises CaptureError AR104, AR105."""
    return from_program(export_model(model, args, kwargs))


def export_model(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Export a model as it is, compiled or not; its buffers are left as they were."""
    if not isinstance(model, torch.nn.Module):
        raise error("AR102", f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    with without_cache(model, kwargs) as inputs:
        try:
            with uncompiled(model):
                return torch.export.export(
                    model, tuple(args), dict(inputs), dynamic_shapes=dynamic_shapes, strict=False
                )
        except AttnRewriteError:
            raise
        except Exception as failure:
            raise _diagnose(model, args, inputs, failure) from failure


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
    try:
        with torch.no_grad(), unchanged_buffers(model):
            model(*args, **kwargs)
    except Exception as own:
        return error("AR104", f"{type(own).__name__}: {_first_lines(own)}")
    return error("AR105", f"torch.export: {type(failure).__name__}: {_first_lines(failure)}")


def _first_lines(failure: Exception, limit: int = 3) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return " ".join(lines[:limit])[:400]


def versions() -> dict[str, str]:
    """Return the versions that a report depends on."""
    import attnrewrite

    return {"attnrewrite": attnrewrite.__version__, "torch": str(torch.__version__)}
