"""The Report: one tree of plain data, filled by every pass; text, JSON, HTML and DOT are views of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from attnrewrite.kernels.diagnostics import DIAGNOSTICS

SCHEMA_VERSION = 2

Status = Literal["rewritten", "matched", "rejected", "skipped"]
"""rewritten: replaced in the graph; matched: recognised and proved, left as it is; rejected: see `rejections`;
skipped: left out by `targets` / `exclude`."""


@dataclass
class Rejection:
    """Why something was not rewritten: a code, the reason in one sentence, and where."""

    code: str
    detail: str
    layer: str = ""
    source: str = ""
    title: str = ""
    hints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.title = self.title or DIAGNOSTICS[self.code].title
        self.hints = self.hints or [DIAGNOSTICS[self.code].hint]


@dataclass
class Mask:
    """Which keys a query sees.

    ``kind`` is one of none, causal, window, padding, custom, and causal or window with +documents or +padding;
    ``offset`` o means that
    key j is visible to query i only if j <= i + o; ``window`` W only if j > i + o - W; ``padding`` says that a mask
    over keys [B, S] is part of it; ``fill`` is the value that invisible scores get (``-inf`` or a large negative
    number), None where nothing is filled.
    """

    kind: str = "none"
    offset: int | None = None
    window: int | None = None
    padding: bool = False
    fill: float | None = None


@dataclass
class Bias:
    """An additive term on the scores that is no mask.

    ``kind``: alibi (linear in the key's distance, one slope per head), relative (gathered from a learned table by
    positions), static (positions or parameters only, in another way), data (depends on the inputs). ``trainable``:
    whether it depends on parameters. None: not known.
    """

    kind: str | None
    shape: list[int | str]
    trainable: bool | None = None


@dataclass
class Projection:
    """What makes a query, key or value.

    ``modules`` are the paths of its linear maps, ``weights`` the names of their weights. ``fused``: a linear map also
    gives another one of query, key and value. ``opaque``: it comes from an operator that is no linear map, such as a
    quantised or custom one. ``shared``: query and key are made by the same weight.
    """

    modules: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    fused: bool = False
    opaque: bool = False
    shared: bool | None = False


@dataclass
class Site:
    """One attention found in the model, addressed by layer path and source line.

    ``heads`` H, ``kv_heads`` Hkv, ``head_dim`` D, ``value_dim`` Dv, ``query_length`` L and ``key_length`` S are ints,
    or strings such as ``s0`` where the size is symbolic. ``spelling`` tags how the model writes this attention.
    ``certificate`` is "proved", "failed" or "not run".

    Facts that are None are not known. ``dtype`` is the query's, ``softmax_dtype`` what the softmax runs in.
    ``empty_row``: what a row without visible keys gives, zero, nan or uniform (the mean of all values). ``sink``: a
    further column takes weight and gives no value. ``gated``: a factor scales the output per query. ``qk_norm``: how
    queries and keys are normalised behind their projections: none, layer, rms, l2, other, or mixed where they differ.
    ``rope``: none, half (feature n turns with n + D/2), interleaved (2n with 2n + 1) or other; ``rope_dims`` of the D
    features turn. ``projections`` maps query, key and value to what makes them. ``cross``: keys come from another
    sequence than queries. ``cache``: none, cat (keys are joined to earlier ones) or index_copy (written over a part
    of them). ``other_users``: which of scores, probs, key and value are also used outside of the attention.
    """

    layer: str
    source: str
    status: Status
    graph: int = 0
    spelling: list[str] = field(default_factory=list)
    heads: int | str | None = None
    kv_heads: int | str | None = None
    head_dim: int | str | None = None
    value_dim: int | str | None = None
    query_length: int | str | None = None
    key_length: int | str | None = None
    mask: Mask = field(default_factory=Mask)
    bias: list[Bias] = field(default_factory=list)
    scale: float | str | None = None
    softcap: float | None = None
    dropout: float = 0.0
    dtype: str | None = None
    softmax_dtype: str | None = None
    empty_row: str | None = None
    sink: bool | None = None
    gated: bool | None = None
    qk_norm: str | None = None
    rope: str | None = None
    rope_dims: int | str | None = None
    projections: dict[str, Projection | None] = field(default_factory=dict)
    cross: bool | None = None
    cache: str | None = None
    other_users: list[str] | None = None
    variant: str = ""
    implementation: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    certificate: str = "not run"
    rejections: list[Rejection] = field(default_factory=list)
    before: str = ""
    after: str = ""


@dataclass
class Report:
    """What was found in a model and what became of it. ``to_dict`` is stable and versioned.

    ``sites`` are attentions; ``rejections`` are the softmaxes that are not attention, and whole-graph findings;
    ``timings_ms`` maps a step's name to milliseconds, summed over graphs.
    """

    model: str = ""
    entry: str = ""
    sites: list[Site] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, int]:
        """Count the sites, and the sites of each status: ``{"sites": 30, "rewritten": 29, "matched": 1, ...}``."""
        counts = dict.fromkeys(("rewritten", "matched", "rejected", "skipped"), 0)
        for site in self.sites:
            counts[site.status] += 1
        return {"sites": len(self.sites), **counts}

    def extend(self, other: Report) -> None:
        """Add the findings of another graph of the same model."""
        graph = 1 + max((site.graph for site in self.sites), default=-1)
        for site in other.sites:
            site.graph = graph
        self.sites += other.sites
        self.rejections += other.rejections
        self.entry = self.entry or other.entry
        for step, ms in other.timings_ms.items():
            self.timings_ms[step] = self.timings_ms.get(step, 0.0) + ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"schema_version": SCHEMA_VERSION, "summary": self.summary, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Rebuild a report from ``to_dict``."""
        plain = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        plain["sites"] = [_site(site) for site in plain.get("sites", [])]
        plain["rejections"] = [Rejection(**r) for r in plain.get("rejections", [])]
        return cls(**plain)


def _site(data: dict[str, Any]) -> Site:
    rejections = [Rejection(**r) for r in data["rejections"]]
    bias = [Bias(**b) for b in data["bias"]]
    made = {role: p and Projection(**p) for role, p in data["projections"].items()}
    return Site(**{**data, "mask": Mask(**data["mask"]), "rejections": rejections, "bias": bias, "projections": made})
