"""The coverage table: every family, how many attention layers it has, and how many are found at each entry.

``python -P tests/census.py docs/coverage.md`` measures all and writes the document; ``... NAME ...`` only
the rows of some families or sources.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from tracer import Softmax, trace
from zoo.family import Family, installed
from zoo.sources import FAMILIES, SOURCES, Source, missing

from attnrewrite.errors import AttnRewriteError
from attnrewrite.explanation import explain
from attnrewrite.passes.graph.capture import from_dynamo
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Rejection, Report


@dataclass(frozen=True)
class Row:
    """One family of a source. Counts are found / true, or why there is none.

    ``layers`` are the attentions that run, ``others`` the other softmaxes, both as the independent tracer counts them.
    """

    source: str
    family: str
    layers: int
    others: int
    export: str
    inference: str
    training: str
    sdpa: str
    proved: str
    spec: str
    remark: str = ""


HEADINGS = {
    "family": "family",
    "layers": "attention layers",
    "others": "other softmaxes",
    "export": "export",
    "inference": "backend",
    "training": "backend, training",
    "sdpa": "written as sdpa",
    "proved": "proved",
    "spec": "facts as configured",
    "remark": "remark",
}

INTRODUCTION = """# Coverage

Which attention the recogniser finds in {families} families of tiny models with random weights: those of transformers,
torch's own modules, modules written by hand, and those of other libraries. Written by `make coverage`; a test measures
rows again and compares.

The true number of attention layers is not counted by the recogniser. An independent tracer follows one ordinary forward
pass, operator by operator: a product of two computed values is a score, a softmax of scores is a weight, and weights
that enter another product make that softmax an attention. `export` is `attnrewrite explain`, `backend` is
`torch.compile` without gradients, `backend, training` in train mode with gradients; these three with attention that is
written out, where a family offers that. `written as sdpa` is `attnrewrite explain` where the family also offers the
fused operator. A layer counts as found if it is matched in normal form; `proved` counts those whose certificate holds.
`facts as configured` compares heads, KV heads, window and soft-cap with the config, or with the heads that the modules
name. Other softmaxes (routers, gates, pooling) are reported as AR202.

{found} of {layers} attention layers are found through the backend in inference.

"""


def measure(family: Family) -> Row:
    """Measure one family."""
    model = family.build()
    inputs = family.inputs(model)
    marks = trace(model, **inputs)
    layers, others = _count(marks)
    exported = _explained(model, inputs)
    inference = dynamo_report(model, inputs)
    return Row(
        family.source,
        family.name,
        layers,
        others,
        _found(exported, layers),
        _found(inference, layers),
        _training(family),
        _sdpa(family),
        _ratio(sum(site.certificate == "proved" for site in inference.sites), len(inference.sites)),
        _ratio(sum(map(family.facts(model).agree, _matched(inference))), len(_matched(inference))),
        _remark(inference),
    )


def _count(marks: list[Softmax]) -> tuple[int, int]:
    attention = sum(mark.attention for mark in marks)
    return attention, len(marks) - attention


def _training(family: Family) -> str:
    if not family.trains:
        return "none"
    model = family.build().train()
    inputs = family.inputs(model)
    layers, _ = _count(_seeded(lambda: trace(model, **inputs)))
    return _found(_seeded(lambda: dynamo_report(model, inputs, train=True)), layers)


def _sdpa(family: Family) -> str:
    try:
        model = family.build("sdpa")
    except ValueError:
        return "none"
    inputs = family.inputs(model)
    layers, _ = _count(trace(model, **inputs))
    return _found(_explained(model, inputs), layers)


def _seeded(function: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return function()


def dynamo_report(model: nn.Module, inputs: dict[str, Any], train: bool = False) -> Report:
    """Inspect every graph that Dynamo makes of one call; one that runs for several layers counts for each of them."""
    report, pipeline = Report(), Pipeline()

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        try:
            part = pipeline.inspect(from_dynamo(gm, example_inputs))[0]
        except AttnRewriteError as failure:
            part = Report(rejections=[Rejection(failure.code, failure.detail)])

        def run(*inputs: Any) -> Any:
            report.extend(copy.deepcopy(part))
            return gm(*inputs)

        return run

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.set_grad_enabled(train):
        torch.compile(model, backend=collect)(**inputs)
    if not report.sites and not report.rejections:
        report.rejections += [Rejection("AR105", f"torch.compile: {x.splitlines()[0]}") for x in _breaks()]
    return report


def _breaks() -> list[str]:
    return list(torch._dynamo.utils.counters["graph_break"])


def _explained(model: nn.Module, inputs: dict[str, Any]) -> Report | AttnRewriteError:
    try:
        return explain(model, **inputs)
    except AttnRewriteError as failure:
        return failure


def _matched(report: Report) -> list[Any]:
    return [site for site in report.sites if site.status == "matched"]


def _found(report: Report | AttnRewriteError, layers: int) -> str:
    if isinstance(report, AttnRewriteError):
        return str(report.code)
    return _ratio(len(_matched(report)), layers)


def _ratio(part: int, whole: int) -> str:
    return f"{part}/{whole}"


def _remark(report: Report) -> str:
    reasons = {f"{r.code} {r.detail}" for site in report.sites if site.status == "rejected" for r in site.rejections}
    reasons |= {f"{r.code} {r.detail}" for r in report.rejections if r.code != "AR202"}
    return "; ".join(sorted(reasons)).replace("|", "\\|")


def table(rows: list[Row]) -> str:
    """Return one source's table."""
    names = [field.name for field in fields(Row)][1:]
    lines = ["| " + " | ".join(HEADINGS[name] for name in names) + " |", "| --- " * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(x) for x in astuple(row)[1:]) + " |" for row in rows)]) + "\n"


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a written document by the family's key."""
    rows, source = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        source = line[3:].split(",")[0] if line.startswith("## ") else source
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if line.startswith("| ") and cells[1].isdigit():
            texts = [cell.replace("\0", "\\|") for cell in cells]
            rows[f"{source}/{texts[0]}"] = Row(source, texts[0], int(texts[1]), int(texts[2]), *texts[3:])
    return rows


def versions(path: Path) -> dict[str, str]:
    """Return the version of every source: of the package that is here, else the one that the document names."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    named = dict(re.findall(r"^## (.+), \S+ (\S+)$", text, re.MULTILINE))
    return {source.name: installed(source.package) or named.get(source.name, "") for source in SOURCES}


def document(rows: list[Row], known: dict[str, str]) -> str:
    """Return the whole document; ``known`` are the versions of the sources."""
    found = sum(_part(row.inference) for row in rows)
    counts = {"families": len(rows), "found": found, "layers": sum(row.layers for row in rows)}
    parts = [_section(source, [row for row in rows if row.source == source.name], known) for source in SOURCES]
    return INTRODUCTION.format(**counts) + "\n".join(part for part in parts if part)


def _section(source: Source, rows: list[Row], known: dict[str, str]) -> str:
    if not rows:
        return ""
    found, layers = sum(_part(row.inference) for row in rows), sum(row.layers for row in rows)
    title = f"## {source.name}, {source.package} {known[source.name]}"
    note = textwrap.fill(f"{source.note} {len(rows)} families, {found} of {layers} layers.", 120)
    return f"{title}\n\n{note}\n\n{table(rows)}"


def _part(ratio: str) -> int:
    """Return how many are found; a code stands where there is no ratio."""
    return int(ratio.split("/")[0]) if "/" in ratio else 0


def main(path: str, *names: str) -> None:
    """Measure all families that can be, or the named ones anew, and write the document after each."""
    logging.disable(logging.WARNING)
    target = Path(path)
    rows = read(target) if target.exists() else {}
    chosen = [each for each in FAMILIES if not names or {each.name, each.key, each.source} & set(names)]
    for family in track([each for each in chosen if not missing(each)], description="measuring families"):
        rows[family.key] = measure(family)
        known = [rows[each.key] for each in FAMILIES if each.key in rows]
        target.write_text(document(known, versions(target)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
