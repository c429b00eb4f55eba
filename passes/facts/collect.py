"""The facts of a site beyond its normal form: what a reader of the model's config would know, found in its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import fx

from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.facts.biases import BiasReader
from attnrewrite.passes.facts.names import weight_name
from attnrewrite.passes.facts.norms import norm
from attnrewrite.passes.facts.provenance import Provenance, Trail, Unknown
from attnrewrite.passes.facts.rotary import rope
from attnrewrite.passes.facts.uses import cache, other_users
from attnrewrite.passes.graph.axes import ALIASES, RESHAPES
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.nodes import common_layer, is_node, layer_path, op, tensor
from attnrewrite.passes.report import Bias, Projection, Site

T = TypeVar("T")

_SAME_VALUE = {*ALIASES, *RESHAPES, *CASTS, "transpose", "permute", "expand", "unsqueeze", "squeeze", "dropout", "t"}


@dataclass(eq=False, repr=False)
class FactReader:
    """Reads the facts of the sites of one captured graph. It never raises: what is not known is None."""

    capture: Capture
    provenance: Provenance = field(init=False)
    biases: BiasReader = field(init=False)

    def __post_init__(self) -> None:
        self.provenance = Provenance(self.capture)
        self.biases = BiasReader(self.provenance)

    def fill(self, site: Attention, row: Site) -> None:
        """Write the facts of ``site`` into its row of the report."""
        query, key, value = (self._trail(operand.node) for operand in (site.query, site.key, site.value))
        row.dtype, row.softmax_dtype = _known(lambda: _dtype(site.query.node)), _known(lambda: softmax_dtype(site))
        row.empty_row = site.visibility.empty_rows
        row.sink, row.gated = site.scores.sink is not None, bool(site.gates)
        row.bias = [self._bias(site, n) for n in range(len(site.visibility.bias))]
        row.other_users = _known(lambda: other_users(site))
        if query is not None:
            found = _known(lambda: rope(query, self.provenance))
            row.rope, row.rope_dims = found or (None, None)
            row.rope_dims = row.rope_dims if isinstance(row.rope_dims, int | None) else str(row.rope_dims)
        if key is not None:
            row.cache = _known(lambda: cache(key, self.provenance))
        if query is not None and key is not None:
            row.qk_norm = _known(lambda: qk_norm(query, key))
            row.cross = _known(lambda: self._cross(site, query, key))
        trails = {"query": query, "key": key, "value": value}
        row.projections = {role: self._projection(role, trails) for role in trails}

    def _trail(self, node: fx.Node) -> Trail | None:
        return _known(lambda: self.provenance.trail(node))

    def _bias(self, site: Attention, number: int) -> Bias:
        term = site.visibility.bias[number]
        kind, trainable = _known(lambda: self.biases.read(site, term)) or (None, None)
        value = tensor(term.node)
        sizes: list[int | str] = [] if value is None else [n if isinstance(n, int) else str(n) for n in value.shape]
        return Bias(kind, sizes, trainable)

    def _projection(self, role: str, trails: dict[str, Trail | None]) -> Projection | None:
        return _known(lambda: self._read_projection(role, trails))

    def _read_projection(self, role: str, trails: dict[str, Trail | None]) -> Projection | None:
        trail = trails[role]
        if trail is None:
            return None
        others = [t for name, t in trails.items() if name != role and t is not None]
        ends = list(trail.linears) or trail.opaque
        weights = [linear.weight for linear in trail.linears.values()]
        weights += [found[0] for x in _inputs(trail.opaque) if (found := self.provenance.weight(x)) is not None]
        names = [weight_name(weight, self.capture) for weight in weights]
        fused = any(node in other.linears for node in trail.linears for other in others)
        return Projection(
            modules=list(dict.fromkeys(path for node in ends if (path := layer_path(node)))),
            weights=list(dict.fromkeys(name for name in names if name)),
            fused=fused,
            opaque=bool(trail.opaque),
            shared=role != "value" and self._shares(trails["query"], trails["key"]),
        )

    def _shares(self, query: Trail | None, key: Trail | None) -> bool | None:
        """Whether query and key are made by the same parts of the same weights."""
        if query is None or key is None:
            return None
        ours, theirs = ({linear.weight for linear in trail.linears.values()} for trail in (query, key))
        if ours != theirs or not ours - {None}:
            return False
        return _known(lambda: self.provenance.parts(query) == self.provenance.parts(key))

    def _cross(self, site: Attention, query: Trail, key: Trail) -> bool | None:
        """Whether keys come from another sequence: what their linear maps get is not what the queries' get.

        Where it differs, the ways are followed back to what enters the layer: a compressed or pooled copy of the
        queries' input is the same sequence.
        """
        ours, theirs = self._sources(query), self._sources(key)
        if not ours or not theirs:
            return None
        if {_identity(x) for x in ours} & {_identity(x) for x in theirs}:
            return False
        layer = common_layer([site.anchor, *query.linears, *key.linears])
        here, there = self._entries(ours, layer), self._entries(theirs, layer)
        if not here & there:
            return True
        return False if here == there else None

    def _sources(self, trail: Trail) -> list[fx.Node]:
        """Return what the linear maps get; learned queries stand for themselves."""
        found = [linear.source for linear in trail.linears.values()]
        return found or [leaf for leaf in trail.leaves if self.provenance.is_parameter(leaf)]

    def _entries(self, values: list[fx.Node], layer: str) -> set[object]:
        """Return the values that ``values`` are computed from and that were made outside of ``layer``."""
        todo, seen, found = list(values), set[fx.Node](), set[object]()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > 200:
                raise Unknown(node)
            path, linear = layer_path(node), self.provenance.linear(node)
            within = not layer or path == layer or path.startswith(layer + ".")
            carriers = [linear.source] if linear is not None else self.provenance.carriers(node)
            if not within or not carriers or self.provenance.opaque(node):
                found.add(_identity(node))
            else:
                todo += carriers
        return found


def is_cross(site: Attention) -> bool | None:
    """Whether keys come from another sequence than queries; None where it is not known."""
    owner = site.output.graph.owning_module
    assert owner is not None
    reader = FactReader(Capture(owner, "dynamo"))
    query, key = reader._trail(site.query.node), reader._trail(site.key.node)
    return None if query is None or key is None else _known(lambda: reader._cross(site, query, key))


def softmax_dtype(site: Attention) -> str | None:
    """Return the precision that the softmax runs in; a fused operator takes at least float32."""
    if site.softmax is not None:
        return _dtype(site.softmax.steps[0] if site.softmax.steps else site.softmax.node)
    return "float64" if _dtype(site.query.node) == "float64" else "float32"


def qk_norm(query: Trail, key: Trail) -> str:
    """Return the normalisation of queries and keys; mixed where they differ or only one of them has any."""
    ours, theirs = norm(query), norm(key)
    return ours if ours == theirs else "mixed"


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    return [x for node in nodes for x in node.all_input_nodes]


def _identity(node: fx.Node, depth: int = 3) -> object:
    """Return a key that is equal for nodes that give the same value: moves and casts do not count."""
    while op(node) in _SAME_VALUE and is_node(node.args[0]):
        node = node.args[0]
    if depth == 0 or node.op != "call_function" or len(node.all_input_nodes) > 3:
        return node
    args = tuple(_identity(x, depth - 1) if is_node(x) else str(x) for x in node.args)
    return (str(node.target), args, str(node.kwargs))


def _dtype(node: fx.Node) -> str | None:
    value = tensor(node)
    return None if value is None else str(value.dtype).removeprefix("torch.")


def _known(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Exception:  # a fact is never worth a failed compilation
        return None
