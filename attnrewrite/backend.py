"""The torch.compile backend: re-trace, rewrite, hand on to an inner compiler."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from torch import fx
from torch._dynamo.exc import RestartAnalysis

from attnrewrite.errors import AttnRewriteError, AttnRewriteWarning
from attnrewrite.inner import compile_inner, inductor_modes
from attnrewrite.kernels.dense.choice import Kernels, no_device
from attnrewrite.kernels.dense.tuned import search_as
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.kernels.store import artifacts  # noqa: F401  # makes them known to torch's cache artifacts
from attnrewrite.kernels.store.modes import Search
from attnrewrite.passes.graph.assumptions import Assumption, Guarded, assumptions
from attnrewrite.passes.graph.capture import from_dynamo
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.proof.certificate import Prover
from attnrewrite.passes.report import Report
from attnrewrite.passes.rewriting.markers import has_markers
from attnrewrite.passes.rewriting.select import Plan
from attnrewrite.variants import VariantConfig, variant_info

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "kernels": ("auto", "triton", "reference"),
    "inner": ("inductor", "aot_eager", "eager"),
    "autotune": (None, "cached", "off", "quick", "full"),
}
log = logging.getLogger(__name__)

_PROVER = Prover()
_REPORTS: dict[str, Report] = {}


@dataclass(frozen=True)
class Backend:
    """A torch.compile backend that rewrites attention; ``torch.compile(model, backend=Backend(...))``.

    Equal backends share compiled code. The same fields are the ``options=`` of ``backend="attnrewrite"``.

    variant: a name, a config, or a config's JSON form. "sdpa" is exact and never changes meaning. Variants with
        parameters go through ``convert`` first.
    targets: glob or globs on layer paths.
    exclude: glob or globs on layer paths to leave out.
    strict: whether a failure inside the passes is an error; otherwise the original graph runs, with one warning.
    kernels: "auto" runs generated kernels on a GPU where there are any; "triton" makes their absence an error;
        "reference" is plain PyTorch.
    inner: the compiler for the rewritten graph.
    autotune: what kernels of this process that have no tuning record do from now on: with "cached" and "off" they run
        as they are, with "quick" and "full" they are tuned at the first call; None: as ATTNREWRITE_AUTOTUNE says.
    verify: whether every match is proved in float64 before it is used.
    report: a path for the report as JSON, or a function that is called with every graph's Report. Sites are drawn, as
        they are and as they become, where a report is wanted.

    Raises:
        CaptureError: AR101 for an unknown field, AR102 for a wrong value.
        VariantError: AR301, AR302, AR303 for a wrong variant or config, AR304 for one that needs ``convert``.
        LoweringError: AR403 where ``kernels="triton"`` and there is no GPU, or no generated kernel.
    """

    variant: str | VariantConfig | Mapping[str, Any] = "sdpa"
    targets: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    strict: bool = False
    kernels: Kernels = "auto"
    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    autotune: Search | None = None
    verify: bool = True
    report: str | Path | Callable[[Report], None] | None = None
    mode: str = "default"

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Refuse unknown fields with the closest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise error("AR101", f"there is no option {key!r}; {closest(key, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                words = [choice for choice in choices if choice is not None]
                raise error("AR102", f"{name} is {getattr(self, name)!r}; {closest(str(getattr(self, name)), words)}")
        if self.mode not in inductor_modes():
            raise error("AR102", f"mode is {self.mode!r}; {closest(str(self.mode), inductor_modes())}")
        for name in ("strict", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise error("AR102", f"{name} is {getattr(self, name)!r}; it takes True or False")
        object.__setattr__(self, "variant", resolve(self.variant))
        for name in ("targets", "exclude"):
            object.__setattr__(self, name, globs(getattr(self, name)))
        missing = no_device() if self.kernels == "triton" else None
        if missing:
            raise error("AR403", missing)
        if self.config.adds_parameters:
            does = "replaces projections in" if self.config.swaps_modules else "adds parameters to"
            raise error(
                "AR304",
                f"{self.config.variant} {does} every layer",
                hint=_convert_hint(self.config),
            )

    @property
    def config(self) -> VariantConfig:
        """The variant's config."""
        assert isinstance(self.variant, VariantConfig)
        return self.variant

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Rewrite one Dynamo graph and compile it."""
        if self.autotune is not None:
            search_as(self.autotune)
        found = self._rewritten(gm, example_inputs)
        if found is None:
            return compile_inner(self.inner, self.mode, gm, example_inputs)
        module, facts, report = found
        compiled = compile_inner(self.inner, self.mode, module, example_inputs)
        self._deliver(report)
        if not facts:
            return compiled
        return Guarded(compiled, facts, lambda: self._without_assumptions(gm, example_inputs))

    def _rewritten(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[fx.GraphModule, list[Assumption], Report] | None:
        """Run the passes; None where they failed and the original graph may run instead."""
        try:
            capture = from_dynamo(gm, example_inputs)
            report, assumed = self._pipeline().rewrite(capture)
        except AttnRewriteError as failure:
            if self._must_raise(gm):
                raise _with_its_cause(failure, gm) from None
            _warn(failure)
            return None
        except RestartAnalysis:  # Dynamo's own control flow
            raise
        except Exception as failure:
            internal = error("AR901", f"{type(failure).__name__}: {failure}")
            if self._must_raise(gm):
                raise internal from failure
            _warn(internal)
            return None
        return capture.module, assumptions(capture, assumed), report

    def _without_assumptions(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile again without reading buffers: one that a mask was proved from has changed."""
        capture = from_dynamo(gm, example_inputs)
        capture.buffers.clear()
        self._pipeline().rewrite(capture)
        return compile_inner(self.inner, self.mode, capture.module, example_inputs)

    def _pipeline(self) -> Pipeline:
        config = self.config.to_dict()
        name = config.pop("variant")
        plan = Plan(name, config, tuple(self.targets), tuple(self.exclude))
        return Pipeline(plan, self.verify, self.report is not None, prover=_PROVER, kernels=self.kernels)

    def _must_raise(self, gm: fx.GraphModule) -> bool:
        """Whether running the original graph would change what the user asked for."""
        return self.strict or self.config.variant != "sdpa" or has_markers(gm)

    def _deliver(self, report: Report) -> None:
        log.info(
            "%(sites)d attentions: %(rewritten)d rewritten, %(matched)d left as they are, %(rejected)d rejected",
            report.summary,
        )
        for site in report.sites:
            log.debug(
                "%s %s %s %s", site.layer, site.source, site.status, [(r.code, r.detail) for r in site.rejections]
            )
        if self.report is None:
            return
        if callable(self.report):
            self.report(report)
            return
        path = str(self.report)
        whole = _REPORTS.setdefault(path, Report())
        whole.extend(report)
        Path(path).write_text(json.dumps(whole.to_dict(), indent=1, sort_keys=True))


def attnrewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Entry point of ``backend="attnrewrite"``; ``options`` are the fields of ``Backend``."""
    fields = {**(options or {}), **kwargs}
    if mode is not None:
        fields["mode"] = mode
    return Backend(**fields)(gm, example_inputs)


def resolve(variant: str | VariantConfig | Mapping[str, Any]) -> VariantConfig:
    """Return the config that a name, a config or its JSON form stands for."""
    if isinstance(variant, VariantConfig):
        return variant
    if isinstance(variant, str):
        return variant_info(variant).config()
    if isinstance(variant, Mapping):
        return VariantConfig.from_dict(variant)
    raise error("AR102", f"variant is {variant!r}; it takes a name, a config, or a config's JSON form")


def globs(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one glob or several as a tuple. Raises CaptureError AR102."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
    if found is None or not all(isinstance(x, str) for x in found):
        raise error("AR102", f"{value!r} is no glob on layer paths, nor a list of them")
    return found


def _convert_hint(config: VariantConfig) -> str:
    hint = "call attnrewrite.convert(model, config, example_inputs=...) first, then compile without naming a variant"
    return hint + ("; or use SelectiveConfig(mode='raw')" if config.variant == "selective" else "")


def _with_its_cause(failure: AttnRewriteError, gm: fx.GraphModule) -> AttnRewriteError:
    """Say so where it is torch that has cut a converted layer in two, to send gradients early."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if failure.code != "AR309" or "DDPOptimizer" not in getattr(reason, "reason", ""):
        return failure
    detail = f"{failure.detail}; an edge of DistributedDataParallel's buckets lies between its input and its attention"
    hint = "set torch._dynamo.config.optimize_ddp = False before the first call: the graph then stays whole"
    return error("AR309", detail, layer=failure.layer, hint=hint)


def _warn(failure: AttnRewriteError) -> None:
    warnings.warn(f"{failure}\n  The original graph runs instead.", AttnRewriteWarning, stacklevel=3)
