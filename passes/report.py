"""The Report: one tree of plain data, filled by every pass; text, JSON, HTML and DOT are views of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from attnrewrite.kernels.diagnostics import DIAGNOSTICS

SCHEMA_VERSION = 2

Status = Literal["rewritten", "matched", "rejected", "skipped"]
"""rewritten: replaced in the graph; matched: recognised and proved, left as it is; rejected: see `rejections`;
skipped: left out by `targets` / `exclude`."""


@dataclass
class Rejection:
    """Why something was not rewritten: a code, the reason in one sentence, where, and the nearest accepted form."""

    code: str
    detail: str
    layer: str = ""
    source: str = ""
    title: str = ""
    hints: list[str] = field(default_factory=list)
    nearest: str = ""

    def __post_init__(self) -> None:
        self.title = self.title or DIAGNOSTICS[self.code].title
        self.hints = self.hints or [DIAGNOSTICS[self.code].hint]
        self.nearest = self.nearest or DIAGNOSTICS[self.code].nearest


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
class Box:
    """A node of a drawing: a value, by a ``name`` of its own, and the operator that makes it, or "input".

    ``role`` is one of query, key, value, scores, probs, mask, bias, scale, gate, sink, shift, weight, output, the name
    of what a variant reads besides (``q_gate``), or "". ``shape`` holds ints, or strings such as ``s0`` where the size
    is symbolic; it is empty for what is no tensor.
    """

    name: str
    op: str
    role: str = ""
    dtype: str = ""
    shape: list[int | str] = field(default_factory=list)


@dataclass
class Drawing:
    """A graph of one site: ``edges`` are pairs of names, from a value to what reads it."""

    nodes: list[Box] = field(default_factory=list)
    edges: list[list[str]] = field(default_factory=list)


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
    ``certificate`` is "proved", "failed" or "not run". ``before`` and
    ``after`` are keys of the report's ``drawings``; ``after`` is "" where the site stays as written.

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
    kernels: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    certificate: str = "not run"
    rejections: list[Rejection] = field(default_factory=list)
    before: str = ""
    after: str = ""


@dataclass
class Report:
    """What was found in a model and what became of it. ``to_dict`` is stable and versioned.

    ``sites`` are attentions; ``rejections`` are the softmaxes that are not attention, and whole-graph findings;
    ``timings_ms`` maps a step's name to milliseconds, summed over graphs. ``drawings`` holds every distinct drawing of
    the sites once.
    """

    model: str = ""
    entry: str = ""
    sites: list[Site] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    drawings: dict[str, Drawing] = field(default_factory=dict)

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
        self.drawings |= other.drawings
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
        plain["drawings"] = {key: _drawing(drawing) for key, drawing in plain.get("drawings", {}).items()}
        return cls(**plain)

    def only(self, status: str | None) -> Report:
        """Return the part that is ``matched``, ``rejected``, any other status, or ``not-attention``; None keeps all."""
        if status is None:
            return self
        sites = [site for site in self.sites if site.status == status]
        wanted = [r for r in self.rejections if (r.code == "AR202") == (status == "not-attention")]
        drawn = {key for site in sites for key in (site.before, site.after)}
        return replace(
            self,
            sites=sites,
            rejections=wanted if status in ("rejected", "not-attention") else [],
            drawings={key: drawing for key, drawing in self.drawings.items() if key in drawn},
        )


def _drawing(data: dict[str, Any]) -> Drawing:
    return Drawing([Box(**box) for box in data["nodes"]], [list(edge) for edge in data["edges"]])


def _site(data: dict[str, Any]) -> Site:
    rejections = [Rejection(**r) for r in data["rejections"]]
    bias = [Bias(**b) for b in data["bias"]]
    made = {role: p and Projection(**p) for role, p in data["projections"].items()}
    return Site(**{**data, "mask": Mask(**data["mask"]), "rejections": rejections, "bias": bias, "projections": made})
