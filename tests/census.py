"""The coverage table: every family, how many attention layers it has, and how many are found at each entry.

``python -P tests/census.py docs/coverage.md`` measures all and writes the document; ``... NAME ...`` only some rows.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from tracer import Softmax, trace
from zoo import FAMILIES, Family, build, inputs_of

from attnrewrite.errors import AttnRewriteError
from attnrewrite.explanation import explain
from attnrewrite.passes.graph.capture import from_dynamo
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Rejection, Report


@dataclass(frozen=True)
class Row:
    """One family. Counts are found / true, or why there is none.

    ``layers`` are the attentions that run, ``others`` the other softmaxes, both as the independent tracer counts them.
    """

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

Which attention the recogniser finds in {families} model families of transformers, in tiny models with random weights.
Written by `make coverage`; a test measures rows again and compares.

The true number of attention layers is not counted by the recogniser. An independent tracer follows one ordinary forward
pass, operator by operator: a product of two computed values is a score, a softmax of scores is a weight, and weights
that enter another product make that softmax an attention. `export` is `attnrewrite explain`, `backend` is
`torch.compile` without gradients, `backend, training` in train mode with gradients; these three with eager attention.
`written as sdpa` is `attnrewrite explain` where the family also offers the fused operator. A layer counts as found if
it is matched in normal form; `proved` counts those whose certificate holds. `facts as configured` compares heads, KV
heads, window and soft-cap with the config. Other softmaxes (routers, gates, pooling) are reported as AR202.

{found} of {layers} attention layers are found through the backend in inference.

"""


def measure(family: Family) -> Row:
    """Measure one family."""
    model = build(family)
    inputs = inputs_of(family, model)
    marks = trace(model, **inputs)
    layers, others = _count(marks)
    exported = _explained(model, inputs)
    inference = dynamo_report(model, inputs)
    return Row(
        family.name,
        layers,
        others,
        _found(exported, layers),
        _found(inference, layers),
        _training(family),
        _sdpa(family),
        _ratio(sum(site.certificate == "proved" for site in inference.sites), len(inference.sites)),
        _ratio(sum(agrees(model.config, site, family.heads) for site in _matched(inference)), len(_matched(inference))),
        _remark(inference),
    )


def _count(marks: list[Softmax]) -> tuple[int, int]:
    attention = sum(mark.attention for mark in marks)
    return attention, len(marks) - attention


def _training(family: Family) -> str:
    model = build(family).train()
    inputs = inputs_of(family, model)
    layers, _ = _count(_seeded(lambda: trace(model, **inputs)))
    return _found(_seeded(lambda: dynamo_report(model, inputs, train=True)), layers)


def _sdpa(family: Family) -> str:
    try:
        model = build(family, "sdpa")
    except ValueError:
        return "none"
    inputs = inputs_of(family, model)
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
    with torch.set_grad_enabled(train):
        torch.compile(model, backend=collect)(**inputs)
    return report


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


def agrees(config: Any, site: Any, told: int | None = None) -> bool:
    """Whether a site has the heads (or those ``told``), KV heads, window and soft-cap that its config allows."""
    configs = list(_configs(config))
    heads = _numbers(configs, "num_attention_heads", "num_heads", "num_decoder_attention_heads", "n_head", "n_heads")
    heads |= _numbers(configs, "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads")
    heads = heads if told is None else {told}
    kv_heads = _numbers(configs, "num_key_value_heads", "num_kv_heads") | heads | {1}
    windows = _numbers(configs, "sliding_window", "window_size", "local_attention", "attention_window_size") | {None}
    caps = _numbers(configs, "attn_logit_softcapping", "attention_logits_soft_cap") | {None}
    odd = not heads or site.heads not in heads
    return not odd and site.kv_heads in kv_heads and site.mask.window in windows and site.softcap in caps


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for inner in vars(config).values():
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            yield from _configs(inner)


def _numbers(configs: list[Any], *names: str) -> set[Any]:
    found: set[Any] = set()
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            found |= set(value) if isinstance(value, list | tuple) else {value}
    return found - {None}


def table(rows: list[Row]) -> str:
    """Return the document's table."""
    names = [field.name for field in fields(Row)]
    lines = ["| " + " | ".join(HEADINGS[name] for name in names) + " |", "| --- " * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(x) for x in astuple(row)) + " |" for row in rows)]) + "\n"


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a written document by family."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if line.startswith("| ") and cells[1].isdigit():
            texts = [cell.replace("\0", "\\|") for cell in cells]
            rows[texts[0]] = Row(texts[0], int(texts[1]), int(texts[2]), *texts[3:])
    return rows


def document(rows: list[Row]) -> str:
    """Return the whole document."""
    found = sum(int(row.inference.split("/")[0]) for row in rows)
    counts = {"families": len(rows), "found": found, "layers": sum(row.layers for row in rows)}
    return INTRODUCTION.format(**counts) + table(rows)


def main(path: str, *names: str) -> None:
    """Measure all families, or the named ones anew, and write the document after each."""
    logging.disable(logging.WARNING)
    target = Path(path)
    rows = read(target) if target.exists() else {}
    chosen = [family for family in FAMILIES if not names or family.name in names]
    for family in track(chosen, description="measuring families"):
        rows[family.name] = measure(family)
        known = [rows[each.name] for each in FAMILIES if each.name in rows]
        target.write_text(document(known), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
