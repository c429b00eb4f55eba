"""What a site looks like as one row of text; the terminal view and the page share it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnrewrite.passes.report import Mask, Rejection, Report, Site

TIMES = "\N{MULTIPLICATION SIGN}"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Row:
    """One site, or several that differ in nothing but one index of their layer path."""

    layer: str
    source: str
    heads: str
    lengths: str
    mask: str
    result: str
    status: str
    count: int = 1


def rows(sites: Sequence[Site], *, fold: bool = True) -> list[Row]:
    """Return a row per site; with ``fold``, sites that read alike share one: ``layers.{0..29}.attn``."""
    plain = [_row(site) for site in sites]
    if not fold:
        return plain
    alike: dict[tuple[str, str, str, str, str, str], list[Row]] = {}
    for row in plain:
        key = (row.source, row.heads, row.lengths, row.mask, row.result, row.status)
        alike.setdefault(key, []).append(row)
    folded = []
    for key, group in alike.items():
        for layer, count in fold_paths([row.layer for row in group]):
            folded.append(Row(layer, *key, count=count))
    return folded


def rejections(report: Report) -> list[tuple[Rejection, str]]:
    """Return every rejection once, with the layers it holds for, folded."""
    found: dict[tuple[str, str, str], tuple[Rejection, list[str]]] = {}
    for layer, rejection in [("", r) for r in report.rejections] + [
        (site.layer, r) for site in report.sites for r in site.rejections
    ]:
        key = (rejection.code, rejection.detail, rejection.source)
        found.setdefault(key, (rejection, []))[1].append(rejection.layer or layer)
    return [
        (rejection, ", ".join(path for path, _ in fold_paths([layer for layer in layers if layer])))
        for rejection, layers in found.values()
    ]


def fold_paths(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Fold paths that differ in one index: ``a.0.b, a.1.b`` becomes ``(a.{0..1}.b, 2)``; order is kept."""
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault(tuple(_NUMBER.split(path)), []).append([int(n) for n in _NUMBER.findall(path)])
    folded = []
    for texts, numbers in groups.items():
        folded += _fold_numbers(texts, numbers)
    return folded


def _fold_numbers(texts: tuple[str, ...], numbers: list[list[int]]) -> list[tuple[str, int]]:
    """Fold along the index that takes most values; the other indices stay apart."""
    slots = range(len(texts) - 1)
    widest = max(slots, key=lambda slot: len({values[slot] for values in numbers}), default=0)
    groups: dict[tuple[int, ...], list[int]] = {}
    for values in numbers:
        groups.setdefault(tuple(values[:widest] + values[widest + 1 :]), []).extend(values[widest : widest + 1])
    folded = []
    for rest, indices in groups.items():
        shown = [str(value) for value in rest]
        if indices:
            shown.insert(widest, _span(sorted(indices)))
        path = texts[0] + "".join(number + text for number, text in zip(shown, texts[1:], strict=True))
        folded.append((path, max(1, len(indices))))
    return folded


def _span(indices: list[int]) -> str:
    if len(indices) == 1:
        return str(indices[0])
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def _row(site: Site) -> Row:
    biases = [f"bias {bias.kind or 'unknown'}" for bias in site.bias]
    return Row(
        site.layer or "(top level)",
        site.source,
        _heads(site),
        "" if site.query_length is None else f"{site.query_length}{TIMES}{site.key_length}",
        "" if site.heads is None else ", ".join([mask_text(site.mask), *biases]),
        _result(site),
        site.status,
    )


def _heads(site: Site) -> str:
    if site.heads is None:
        return ""
    same = site.kv_heads is None or site.kv_heads == site.heads
    return str(site.heads) if same else f"{site.heads}/{site.kv_heads}"


def mask_text(mask: Mask) -> str:
    """Say the mask in a word or two: ``causal``, ``window 8``, ``causal+padding``."""
    text = mask.kind
    if mask.window is not None:
        text = text.replace("window", f"window {mask.window}")
    return f"{text} {mask.offset:+d}" if mask.offset else text


def facts_text(site: Site) -> str:
    """Say what is special about the site: ``rope 64, qk-norm rms, fused qkv``; nothing where it is plain."""
    turned = f"rope {site.rope_dims}" if site.rope == "half" else f"rope {site.rope} {site.rope_dims or ''}".strip()
    made = [p for p in site.projections.values() if p is not None]
    narrow = site.dtype != site.softmax_dtype
    facts = {
        turned: site.rope not in (None, "none"),
        f"qk-norm {site.qk_norm}": site.qk_norm not in (None, "none"),
        "cross": site.cross,
        "fused qkv": len(made) == 3 and all(p.fused for p in made),
        "opaque projection": any(p.opaque for p in made),
        "shared qk": any(p.shared for p in made),
        "sink": site.sink,
        "gated": site.gated,
        f"cache {site.cache}": site.cache not in (None, "none"),
        f"softmax in {site.softmax_dtype}": narrow,
        f"{', '.join(site.other_users or [])} used again": site.other_users,
    }
    return ", ".join(text for text, holds in facts.items() if holds)


def _result(site: Site) -> str:
    if site.status == "rejected":
        return " ".join(["rejected", *dict.fromkeys(r.code for r in site.rejections)])
    variant = f" → {site.variant}" if site.variant else ""
    by = f" → {site.implementation}" if site.implementation else ""
    proved = f", {site.certificate}" if site.status == "matched" and site.certificate != "not run" else ""
    return site.status + variant + by + proved


def short_source(source: str) -> str:
    """Drop the folders of a source place: ``.../modeling_llama.py:214`` reads ``modeling_llama.py:214``."""
    return Path(source).name


def duration(ms: float) -> str:
    """Say a duration in the unit that fits: ``12 ms``, ``1.2 s``."""
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"
