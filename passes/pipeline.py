"""The way of one graph: match, prove, select, rewrite, lower; everything found goes into one Report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from attnrewrite.kernels.dense.choice import Kernels, kernels
from attnrewrite.kernels.diagnostics import DIAGNOSTICS, AttnRewriteError, error
from attnrewrite.passes.attention.form import Attention, Reject
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import source_line
from attnrewrite.passes.matching.match import Found, match
from attnrewrite.passes.proof.certificate import Prover
from attnrewrite.passes.report import Rejection, Report, Site
from attnrewrite.passes.rewriting import markers as marker_pass
from attnrewrite.passes.rewriting.lower import Lowering
from attnrewrite.passes.rewriting.select import Plan, request_for
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.base import Request

if TYPE_CHECKING:
    from attnrewrite.passes.facts.collect import FactReader

LEFT_AS_IT_IS = ("AR401", "AR404")
"""Codes with which a recognised site keeps the model's own operations, at no loss of meaning."""


@dataclass(eq=False, repr=False)
class Pipeline:
    """Runs the passes over captured graphs. ``verify`` proves every site before anything is done with it.

    ``kernels`` chooses what variants run on. ``draw`` puts drawings into the report; ``parameters`` makes what a
    conversion of a site would add, for them.
    """

    plan: Plan = field(default_factory=Plan)
    verify: bool = True
    draw: bool = False
    parameters: Callable[[Attention], Mapping[str, torch.Tensor]] | None = None
    prover: Prover = field(default_factory=Prover)
    kernels: Kernels = "auto"
    lowering: Lowering = field(default_factory=Lowering)

    def inspect(self, capture: Capture) -> tuple[Report, Found]:
        """Match and prove; change nothing."""
        report = Report(entry=capture.entry)
        with timed(report, "match"):
            found = match(capture)
        report.sites = self._rows(capture, found, report) + [refused_row(row) for _, row in found.refused]
        if self.draw:
            self._before(found, report)
        report.rejections = found.not_attention
        return report, found

    def check(self, capture: Capture, found: Found, report: Report) -> None:
        """Say for every proved site what is wanted, by its marker or the plan, and whether the variant covers it."""
        markers = marker_pass.find(capture)
        for site, row in zip(found.attentions, report.sites, strict=False):
            request = request_for(site, markers, self.plan)
            if row.status != "matched" or request is None:
                continue
            row.variant, row.config = request.variant, dict(request.config)
            try:
                RULES[request.variant].check(site, request)
            except Reject as reject:
                row.rejections.append(reject.rejection(site.layer, site.source))
                row.status = "matched" if reject.code in LEFT_AS_IT_IS else "rejected"
            else:
                self._sketch(site, row, request, report)

    def rewrite(self, capture: Capture) -> tuple[Report, list[fx.Node]]:
        """Rewrite the captured graph in place; also return the buffers whose values the rewrites rely on.

        Raises AttnRewriteError where a variant cannot be applied.
        """
        report, found = self.inspect(capture)
        markers = marker_pass.find(capture)
        self._check_conflict(markers)
        with timed(report, "rewrite"):
            for site, row in zip(found.attentions, report.sites, strict=False):
                request = request_for(site, markers, self.plan)
                if request is None:
                    row.status = "skipped" if row.status == "matched" else row.status
                elif row.status == "matched":
                    with kernels(self.kernels):
                        self._apply(site, row, request, report)
                else:
                    row.variant = request.variant
        self._check_applied(report, markers, found)
        for marker in markers:
            marker_pass.consume(marker)
        with timed(report, "rewrite"):
            for module in capture.graphs():
                module.graph.eliminate_dead_code()
                module.graph.lint()
                module.recompile()
        assumed = [
            buffer
            for site, row in zip(found.attentions, report.sites, strict=False)
            if row.status == "rewritten"
            for buffer in site.visibility.assumed
        ]
        return report, assumed

    def _rows(self, capture: Capture, found: Found, report: Report) -> list[Site]:
        """Describe and prove every site. What reads facts is imported here: most graphs hold no attention."""
        if not found.attentions:
            return []
        from attnrewrite.passes.facts.collect import FactReader

        reader = FactReader(capture)
        return [self._row(site, report, reader) for site in found.attentions]

    def _row(self, site: Attention, report: Report, reader: FactReader) -> Site:
        with timed(report, "describe"):
            row = describe(site, reader)
        if self.verify:
            with timed(report, "prove"):
                wrong = self.prover.prove(site)
            row.certificate = "failed" if wrong else "proved"
            if wrong:
                row.status = "rejected"
                row.rejections.append(Rejection("AR205", wrong, row.layer, row.source))
        return row

    def _apply(self, site: Attention, row: Site, request: Request, report: Report) -> None:
        rule = RULES[request.variant]
        row.variant, row.config = request.variant, dict(request.config)
        try:
            rule.check(site, request)
        except Reject as reject:
            row.rejections.append(reject.rejection(row.layer, source_line(reject.node) if reject.node else row.source))
            row.status = "matched" if reject.code in LEFT_AS_IT_IS else "rejected"
            row.implementation = "as written"
            return
        if self.draw:
            row.after = self._after(site, request, report)
        row.implementation, row.kernels = self.lowering.replace(site, rule, request)
        row.status = "rewritten"
        if self.kernels == "triton" and row.implementation != "triton":
            raise error("AR403", f"{request.variant} has no generated kernel", layer=row.layer)

    def _sketch(self, site: Attention, row: Site, request: Request, report: Report) -> None:
        """Draw what the variant would make of the site; nothing is rewritten."""
        if not self.draw:
            return
        from attnrewrite.passes import drawing

        if self.parameters is not None and not request.parameters:
            request = replace(request, parameters=drawing.stand_ins(site, self.parameters(site)))
        with timed(report, "draw"):
            try:
                row.after = self._after(site, request, report)
            except Exception as failure:  # the backend would fail here, too
                detail = f"the rewrite to {request.variant} failed: {type(failure).__name__}: {failure}"
                row.rejections.append(Rejection("AR901", detail, row.layer, row.source))
                row.status = "rejected"

    def _before(self, found: Found, report: Report) -> None:
        """Draw every site as it is. Drawing is imported where it happens: most processes draw nothing."""
        from attnrewrite.passes import drawing
        from attnrewrite.passes.extract import of_anchor, of_site

        extracts = [*map(of_site, found.attentions), *(of_anchor(anchor) for anchor, _ in found.refused)]
        for row, extract in zip(report.sites, extracts, strict=True):
            row.before = drawing.add(report, drawing.drawing(extract))

    def _after(self, site: Attention, request: Request, report: Report) -> str:
        """Draw what takes the place of the site; it is traced once, also for the rewrite itself."""
        from attnrewrite.passes import drawing
        from attnrewrite.passes.extract import of_site

        rule = RULES[request.variant]
        traced, nodes = self.lowering.traced(site, rule, request)
        roles = of_site(site).roles | {node: name for name, node in rule.extra(site, request).items()}
        return drawing.add(report, drawing.drawing_of_traced(traced, nodes, roles))

    def _check_conflict(self, markers: list[marker_pass.Marker]) -> None:
        if markers and self.plan.variant != "sdpa":
            first = markers[0]
            raise error(
                "AR305",
                f"the model carries {first.request.variant} and the backend was asked for {self.plan.variant}",
                layer=first.layer,
                hint="compile a converted model without naming a variant",
            )

    def _check_applied(self, report: Report, markers: list[marker_pass.Marker], found: Found) -> None:
        """Raise where a variant that was asked for is not applied: it never falls back in silence."""
        failed = [s for s in report.sites if s.status in ("rejected", "matched") and s.variant not in ("", "sdpa")]
        if self.plan.variant != "sdpa":
            failed += [
                s for s in report.sites if s.status == "rejected" and s not in failed and self.plan.covers(s.layer)
            ]
        if failed:
            raise not_applied(failed)
        for marker in markers:
            if not marker.used:
                raise error("AR309", f"{marker.request.variant} was converted into this layer", layer=marker.layer)
        if self.plan.variant != "sdpa" and not any(s.status == "rewritten" for s in report.sites):
            self._nothing(report)

    def _nothing(self, report: Report) -> None:
        if report.sites:
            layers = ", ".join(dict.fromkeys(s.layer for s in report.sites))
            raise error("AR306", f"targets {', '.join(self.plan.targets)} leave none of: {layers}")
        detail = f"{self.plan.variant} was asked for, and this graph holds no attention"
        hint = f"{DIAGNOSTICS['AR201'].hint}; where graph breaks split the model, compile the part that attends"
        raise error("AR201", detail, hint=hint)


def not_applied(sites: list[Site]) -> AttnRewriteError:
    """Build the error that lists sites at which a variant could not be applied."""
    reasons = [(s, r) for s in sites for r in s.rejections]
    lines = [f"{s.layer}  {r.code}: {r.detail}" for s, r in reasons[:5]]
    more = [f"and {len(reasons) - 5} more"] if len(reasons) > 5 else []
    codes = {r.code for _, r in reasons}
    code = codes.pop() if len(codes) == 1 else "AR312"
    wanted = next((s.variant for s in sites if s.variant), "the variant")
    detail = f"{wanted} cannot be applied to {len(sites)} of the model's attention layers:\n    "
    return error(code, detail + "\n    ".join([*lines, *more]))


def refused_row(rejection: Rejection) -> Site:
    """Turn a refused anchor into a site row."""
    return Site(rejection.layer, rejection.source, "rejected", rejections=[rejection])


def describe(site: Attention, reader: FactReader) -> Site:
    """Write a matched site down as plain data."""
    sizes = {k: v if isinstance(v, int) else str(v) for k, v in site.sizes().items()}
    row = Site(
        layer=site.layer,
        source=site.source,
        status="matched",
        spelling=list(site.spelling),
        heads=sizes["H"],
        kv_heads=sizes["Hkv"],
        head_dim=sizes["D"],
        value_dim=sizes["Dv"],
        query_length=sizes["L"],
        key_length=sizes["S"],
        mask=site.visibility.facts,
        scale=site.scores.alpha,
        softcap=site.scores.softcap,
        dropout=site.dropout,
    )
    reader.fill(site, row)
    return row


@contextmanager
def timed(report: Report, step: str) -> Iterator[None]:
    """Add the block's time to the report."""
    start = time.perf_counter()
    try:
        yield
    finally:
        report.timings_ms[step] = report.timings_ms.get(step, 0.0) + (time.perf_counter() - start) * 1e3
