"""What the recogniser finds: one attention, in the normal form that every rewrite starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, fx

from attnrewrite.passes.attention.nearest import nearest_form
from attnrewrite.passes.attention.softmax import Softmax
from attnrewrite.passes.graph.axes import Dim, Layout, Symbol, flat, size_of, symbols
from attnrewrite.passes.report import Mask, Rejection

NEGLIGIBLE = -1e9
"""Scores at or below this count as invisible: exp(score - max) is exactly 0 unless a whole row is."""

Role = Literal["query", "key", "value", "scores", "probs"]
EmptyRow = Literal["zero", "nan", "uniform"]
"""What a row without visible keys gives: 0 (fused operators), NaN (-inf fill), the mean of all values (finite fill)."""


class Reject(Exception):  # noqa: N818  # a verdict on a match, not an error of the user's
    """A matcher gives up: a code, the reason, the node that stands in the way, and the nearest accepted form."""

    def __init__(self, code: str, detail: str, node: fx.Node | None = None, nearest: str = "") -> None:
        super().__init__(detail)
        self.code, self.detail, self.node, self.nearest = code, detail, node, nearest

    def rejection(self, layer: str, source: str) -> Rejection:
        """Return the report row."""
        return Rejection(
            self.code, self.detail, layer, source, nearest=self.nearest or nearest_form(self.code, self.node)
        )


@dataclass(eq=False, repr=False)
class Term:
    """One thing done to the scores after scaling and soft-cap.

    ``add``: ``scores + weight * node``. ``fill``: scores become ``value`` where ``node`` is True (``when``) or False;
    ``zero_one`` says that the fill was written with arithmetic, for a mask of the numbers 0 and 1.
    """

    kind: Literal["add", "fill"]
    node: fx.Node
    layout: Layout
    weight: float = 1.0
    value: float = 0.0
    when: bool = True
    zero_one: bool = False


@dataclass(eq=False, repr=False)
class Sink:
    """A further column of scores, ``node`` [.., 1], that takes weight and gives no value.

    ``wide`` is the softmax's axis with the column, ``cols`` the keys alone; ``last`` says on which side it stands.
    """

    node: fx.Node
    layout: Layout
    wide: Dim
    cols: Dim
    last: bool


@dataclass(eq=False, repr=False)
class Scores:
    """Affine normal form: ``softcap(alpha · ⟨q, k⟩ · Π factors)``, then ``terms`` in order, ``floor``, ``sink``.

    ``factors`` are tensors that scale the product and do not depend on the key index, with their layouts and whether
    they divide. ``is_causal`` is the fused operator's flag: key j is visible to query i only if j <= i. ``floor`` is a
    number that scores are lifted to. ``shifts`` are terms that do not depend on the key: they cancel in the softmax.
    """

    contraction: fx.Node
    alpha: float = 1.0
    factors: list[tuple[fx.Node, Layout, bool]] = field(default_factory=list)
    softcap: float | None = None
    terms: list[Term] = field(default_factory=list)
    is_causal: bool = False
    floor: float | None = None
    sink: Sink | None = None
    shifts: list[tuple[fx.Node, Layout]] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Operand:
    """A query, key or value: the value that the rewrite reads, and where its symbols lie."""

    node: fx.Node
    layout: Layout


@dataclass(eq=False, repr=False)
class Join:
    """Keys, or values, in two blocks, the second behind the first.

    ``products`` are the blocks' products with the queries, or with the weights; ``cols`` the parts of the key axis.
    """

    products: tuple[fx.Node, fx.Node]
    operands: tuple[Operand, Operand]
    cols: tuple[Dim, Dim]


@dataclass(eq=False, repr=False)
class Leaf:
    """A condition for a key to be visible: ``node > threshold``, or the boolean ``node == polarity``."""

    node: fx.Node
    layout: Layout
    polarity: bool
    threshold: float | None = None


@dataclass(eq=False, repr=False)
class Gate:
    """A factor on the attention weights that does not depend on the key: it scales the output."""

    node: fx.Node
    layout: Layout
    divide: bool


@dataclass(eq=False, repr=False)
class Visibility:
    """The masks of a site, understood.

    ``facts`` name what depends on positions only; ``padding`` are conditions over (b, j), True for real keys;
    ``dense`` are conditions that no predicate describes; ``documents`` are conditions that query and key lie in one
    packed document; ``bias`` are the additive terms that are no mask; ``terms``
    are the mask terms as the model spells them. ``assumed`` are the buffers that the facts were read from.
    ``rows_never_empty`` says that the masks leave every row a key, ``bias_is_small`` that no bias can hide one, and
    ``bias_may_hide`` that one might, other than by numbers that are learned.
    """

    facts: Mask
    padding: list[Leaf] = field(default_factory=list)
    dense: list[Leaf] = field(default_factory=list)
    documents: list[Leaf] = field(default_factory=list)
    bias: list[Term] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    empty_rows: EmptyRow = "zero"
    rows_never_empty: bool = False
    bias_is_small: bool = True
    bias_may_hide: bool = False
    assumed: list[fx.Node] = field(default_factory=list)


class Matched(Protocol):
    """The nodes of a site that lies there as a registered pattern."""

    @property
    def key(self) -> str:
        """What tells the pattern from all others."""
        ...

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """The nodes of query, key and value."""
        ...

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """Run the nodes in float64 on query, key, value and, where there is one, the mask."""
        ...


@dataclass(eq=False, repr=False)
class Attention:
    """One attention site: ``output = softmax_j(scores) · value`` with every axis named.

    Axes: ``batch`` (B), ``kv_heads`` and ``groups`` (H = Hkv · G), ``rows`` (query positions, L), ``cols`` (key
    positions, S), ``inner`` (D), ``outer`` (Dv). ``query_first`` and ``probs_first`` say which operand of the two
    contractions is the query and the probabilities. ``region`` maps (role, node) to the node's layout, for every node
    between the operands and the output. ``keys`` and ``values`` tell of such in two blocks, of which ``key`` and
    ``value`` are the second.
    """

    layer: str
    source: str
    anchor: fx.Node
    output: fx.Node
    output_layout: Layout
    query: Operand
    key: Operand
    value: Operand
    scores: Scores
    visibility: Visibility
    batch: Dim
    kv_heads: Dim
    groups: Dim
    rows: Dim
    cols: Dim
    inner: Dim
    outer: Dim
    query_first: bool = True
    probs_first: bool = True
    dropout: float = 0.0
    gates: list[Gate] = field(default_factory=list)
    guarded: bool = False
    softmax: Softmax | None = None
    matched: Matched | None = None
    keys: Join | None = None
    values: Join | None = None
    region: dict[tuple[Role, fx.Node], Layout] = field(default_factory=dict)
    spelling: list[str] = field(default_factory=list)

    @property
    def query_layout(self) -> Layout:
        """[B, H, L, D]."""
        return (flat(self.batch), flat(self.kv_heads + self.groups), flat(self.rows), flat(self.inner))

    @property
    def key_layout(self) -> Layout:
        """[B, Hkv, S, D]."""
        return (flat(self.batch), flat(self.kv_heads), flat(self.cols), flat(self.inner))

    @property
    def value_layout(self) -> Layout:
        """[B, Hkv, S, Dv]."""
        return (flat(self.batch), flat(self.kv_heads), flat(self.cols), flat(self.outer))

    @property
    def result_layout(self) -> Layout:
        """[B, H, L, Dv]."""
        return (flat(self.batch), flat(self.kv_heads + self.groups), flat(self.rows), flat(self.outer))

    def mask_layout(self, layout: Layout) -> Layout:
        """[B or 1, H or 1, L or 1, S or 1] with the groups that ``layout`` mentions."""
        present = set(symbols(layout))
        groups = (self.batch, self.kv_heads + self.groups, self.rows, self.cols)
        return tuple(flat(g) if present & set(flat(g)) else () for g in groups)

    def sizes(self) -> dict[str, Any]:
        """Return B, H, Hkv, L, S, D, Dv: ints or SymInts."""
        return {
            "B": size_of(self.batch),
            "H": size_of(self.kv_heads + self.groups),
            "Hkv": size_of(self.kv_heads),
            "L": size_of(self.rows),
            "S": size_of(self.cols),
            "D": size_of(self.inner),
            "Dv": size_of(self.outer),
        }

    def joins(self) -> list[Join]:
        """Return what lies in two blocks: keys, values, both or nothing."""
        return [join for join in (self.keys, self.values) if join is not None]

    def blocks(self, role: str) -> list[tuple[Operand, Dim]]:
        """Return the keys or values by blocks, each with its part of the key axis."""
        join, whole = (self.keys, self.key) if role == "key" else (self.values, self.value)
        return [(whole, self.cols)] if join is None else list(zip(join.operands, join.cols, strict=True))

    def leaves(self) -> list[Symbol]:
        """Return every whole symbol of the site once, in canonical order."""
        axes = (self.batch, self.kv_heads, self.groups, self.rows, self.cols, self.inner, self.outer)
        parts = [dim for join in self.joins() for dim in join.cols]
        return list(dict.fromkeys(s for dim in (*axes, *parts) for s in flat(dim)))


SizeOf = Callable[[Symbol], Any]
