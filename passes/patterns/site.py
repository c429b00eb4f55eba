"""From a place where a pattern lies to an attention in normal form, and the way to run its nodes at test sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_unflatten

from attnrewrite.passes.attention.form import Attention, Operand, Role, Scores, Term
from attnrewrite.passes.attention.operands import nearest, peel
from attnrewrite.passes.attention.regions import check_regions
from attnrewrite.passes.attention.roles import tell_roles
from attnrewrite.passes.graph.axes import AxisError, Dim, Layout, Symbol, broadcast, same
from attnrewrite.passes.graph.nodes import common_layer, is_node, op, shape, source_line, tensor
from attnrewrite.passes.masks.classify import MaskReader
from attnrewrite.passes.patterns.monomorphism import Host, aligned
from attnrewrite.passes.patterns.pattern import Pattern
from attnrewrite.passes.patterns.skeleton import FREE, Label, Skeleton, behind, fits, flattened, leaf, template, trace


@dataclass(frozen=True, eq=False)
class PatternMatch:
    """A pattern in a graph: ``nodes`` are the graph's nodes of the skeleton's steps, ``given`` those of its inputs."""

    pattern: Pattern
    skeleton: Skeleton
    labels: tuple[Label, ...]
    nodes: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    traces: dict[str, Skeleton] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The pattern's name, and which registration of it."""
        return f"pattern {self.pattern.name} {self.pattern.serial}"

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """The nodes of query, key and value."""
        return self.given[:3]

    @property
    def output(self) -> fx.Node:
        """The node that holds the result."""
        return self.nodes[-1]

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """Run the graph's nodes in float64; sizes among their literals become those of ``values``."""
        here = self._sized(values)
        held: dict[fx.Node, Any] = dict(zip(self.skeleton.inputs, values, strict=True))
        place = dict(zip(self.skeleton.steps, self.nodes, strict=True))
        for step, wanted, sized in zip(self.skeleton.steps, self.labels, here.labels, strict=True):
            node = place[step]
            pairs = aligned(step, node, place)
            flat = [_value(*pair, wanted.leaves[n], sized.leaves[n], held) for n, pair in enumerate(pairs)]
            args, kwargs = tree_unflatten(flat, flattened(node)[1])
            held[step] = _functional(node)(*args, **kwargs)
        out: Tensor = held[self.skeleton.steps[-1]]
        return out

    def _sized(self, values: Sequence[Tensor]) -> Skeleton:
        """Trace the pattern at the shapes of ``values``, in the dtypes of the match."""
        shapes = str([v.shape for v in values])
        if shapes not in self.traces:
            dtypes = [node.meta["val"].dtype for node in self.given]
            small = [torch.empty(v.shape, dtype=t, device="meta") for v, t in zip(values, dtypes, strict=True)]
            self.traces[shapes] = trace(self.pattern.function, small)
        if template(self.skeleton, self.traces[shapes]) is None:
            raise TypeError("the pattern's operators depend on sizes")
        return self.traces[shapes]


def _value(ours: Any, theirs: Any, wanted: Any, sized: Any, held: dict[fx.Node, Any]) -> Any:
    """Return what a node gets at test sizes: a value computed before, or a literal; numbers are float64."""
    if is_node(ours) and behind(ours) in held:
        return held[behind(ours)]
    if isinstance(theirs, torch.device):
        return torch.device("cpu")
    if isinstance(theirs, torch.dtype):
        return torch.float64 if theirs.is_floating_point else theirs
    number = sized if wanted is FREE else leaf(theirs)
    return torch.tensor(number, dtype=torch.float64) if is_node(theirs) and isinstance(number, float) else number


def _functional(node: fx.Node) -> Any:
    """Return the operator of a node, that of the same name which writes nothing for one that writes in place."""
    target: Any = node.target
    if not target._schema.is_mutable:
        return target
    return getattr(getattr(torch.ops.aten, op(node)), target._overloadname)


def place(pattern: Pattern, nodes: Sequence[fx.Node], host: Host, dtype: torch.dtype) -> PatternMatch | None:
    """Check a way in which the pattern, for values of ``dtype``, may lie in a graph.

    None where the nodes compute something else.
    """
    found = pattern.skeleton(dtype)
    if found is None:
        return None
    skeleton, labels = found
    given = _inputs(skeleton, nodes)
    if given is None or [len(shape(x)) for x in given[:3]] != [x.dim() for x in pattern.examples[:3]]:
        return None
    exact = _traced(pattern, given, host)
    if exact is None or len(exact.labels) != len(nodes):
        return None
    if not all(fits(wanted, host.label(node)) for wanted, node in zip(exact.labels, nodes, strict=True)):
        return None
    return PatternMatch(pattern, skeleton, labels, tuple(nodes), given)


def _inputs(skeleton: Skeleton, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...] | None:
    """Return the node of every input, or None where two steps read different ones."""
    found: dict[fx.Node, fx.Node] = {}
    where = dict(zip(skeleton.steps, nodes, strict=True))
    pairs = [pair for step, node in where.items() for pair in aligned(step, node, where)]
    for ours, theirs in ((behind(a), behind(b)) for a, b in pairs):
        is_input = ours in skeleton.inputs
        if is_input and not (is_node(theirs) and tensor(theirs) is not None):
            return None
        if is_input and found.setdefault(ours, theirs) is not theirs:
            return None
    return tuple(found[x] for x in skeleton.inputs) if len(found) == len(skeleton.inputs) else None


def _traced(pattern: Pattern, given: Sequence[fx.Node], host: Host) -> Skeleton | None:
    """Trace the pattern at the sizes of a match: what its literals have to be there. None where it does not run."""
    values = [node.meta["val"] for node in given]
    key = (pattern.serial, *(str((x.dtype, x.shape, x.stride())) for x in values))
    if key not in host.traces:
        host.traces[key] = None
        with suppress(Exception):  # a function that does not run on these values did not make the nodes
            host.traces[key] = trace(pattern.function, values, values[0].device)
    return host.traces[key]


def as_site(found: PatternMatch, reader: MaskReader) -> Attention:
    """Return the normal form of a match. Raises Reject, and AxisError where the axes of its inputs do not fit."""
    pattern, output = found.pattern, found.output
    axes = _axes(pattern, found.given)
    query, key, value = (Operand(node, layout) for node, layout in zip(found.inputs, axes[:3], strict=True))
    score_layout, result = axes[3], axes[4]
    scores = Scores(found.nodes[0], alpha=pattern.alpha(axes[0][pattern.layout.index("d")][0].size))
    scores.is_causal = pattern.is_causal
    scores.terms = [_term(pattern, mask, score_layout) for mask in found.given[3:]]
    region: dict[tuple[Role, fx.Node], Layout] = {("scores", node): () for node in found.nodes}
    chains: dict[Role, list[Operand]] = {
        "query": peel("query", query, region, scores),
        "key": peel("key", key, region, scores),
        "value": peel("value", value, region, None),
    }
    by = dict(zip(pattern.value_layout, axes[2], strict=True)) | dict(zip(pattern.layout, axes[0], strict=True))
    roles = tell_roles(chains, by["d"], by["e"], by["s"], score_layout, output, result)
    heads = roles.kv_heads + roles.groups
    zero = pattern.empty == "zero"
    site = Attention(
        layer=common_layer(list(found.nodes)),
        source=source_line(output),
        anchor=found.nodes[0],
        output=output,
        output_layout=result,
        query=chains["query"][-1],
        key=chains["key"][-1],
        value=chains["value"][-1],
        scores=scores,
        visibility=reader.read(output.graph, scores, roles.rows, roles.cols, heads, zero=zero),
        guarded=zero,
        matched=found,
        region=region,
        spelling=[f"pattern {pattern.name}"],
        **vars(roles),
    )
    site.query = nearest(chains["query"], site.query_layout, fixed=region, role="query", scores=scores)
    site.key = nearest(chains["key"], site.key_layout, fixed=region, role="key", scores=scores)
    site.value = nearest(chains["value"], site.value_layout, fixed=region, role="value", scores=None)
    check_regions(site)
    return site


def _letters(pattern: Pattern) -> tuple[str, ...]:
    return (pattern.layout, pattern.key_layout, pattern.value_layout, pattern.score_layout, pattern.result_layout)


def _axes(pattern: Pattern, given: Sequence[fx.Node]) -> tuple[Layout, ...]:
    """Return the layouts of query, key, value, scores and result. Raises AxisError."""
    named = zip(_letters(pattern), given[:3], strict=False)
    query, key, value = (dict(zip(letters, shape(x), strict=True)) for letters, x in named)
    if not isinstance(query["d"], int):
        raise AxisError("the head dim is not known")
    if not same(query["d"], key["d"]) or not same(key["s"], value["s"]):
        raise AxisError("query, key and value do not fit together")
    dims: dict[str, Dim] = {x: (Symbol(x, n),) for x, n in {**query, "s": key["s"], "e": value["e"]}.items()}
    theirs = {**dims, **{x: _shared(dims[x], key[x], value[x]) for x in pattern.layout if x not in "ld"}}
    lines = zip(_letters(pattern), (dims, theirs, theirs, dims, dims), strict=True)
    return tuple(tuple(by[x] for x in letters) for letters, by in lines)


def _shared(dim: Dim, of_key: Any, of_value: Any) -> Dim:
    """Return a batch or head axis of key and value: the query's, or the outer part where groups share heads."""
    (symbol,) = dim
    if not same(of_key, of_value):
        raise AxisError("key and value do not fit together")
    if same(symbol.size, of_key):
        return dim
    if same(of_key, 1):
        return ()
    if not isinstance(symbol.size, int) or not isinstance(of_key, int) or symbol.size % of_key:
        raise AxisError("head counts that do not fit together")
    symbol.split(of_key, symbol.size // of_key)
    return (symbol.parts[0],)


def _term(pattern: Pattern, mask: fx.Node, layout: Layout) -> Term:
    where, value = broadcast(layout, mask), tensor(mask)
    if value is None or value.dtype != torch.bool:
        return Term("add", mask, where)
    fill = torch.finfo(torch.float32).min if pattern.empty == "uniform" else -math.inf
    return Term("fill", mask, where, value=fill, when=False)
