"""Put a rewrite in the place of a site: trace its function, copy the nodes in, redirect the users of the output.

Nothing is erased: keys, values, scores or weights that are used elsewhere stay, and what is dead goes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.kernels.dense.names import OPERATORS, kernel_names
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.attention.sinks import per_head
from attnrewrite.passes.attention.site import SiteTensors, nodes_read
from attnrewrite.passes.graph.axes import ALIASES, symbols
from attnrewrite.passes.graph.nodes import is_node, op
from attnrewrite.passes.matching.match import FUSED
from attnrewrite.passes.proof.certificate import fingerprint
from attnrewrite.passes.rules.base import Request, Rule

_MOVES = {"transpose", "permute", "unsqueeze", "squeeze", "alias", "slice", "t"}
_STRIDED = {"view", "_unsafe_view", "as_strided", "view_as", "view_as_complex"}


@dataclass(eq=False, repr=False)
class Lowering:
    """Lowers sites; equal sites (the layers of one model) are traced once."""

    memo: dict[str, fx.GraphModule] = field(default_factory=dict)

    def traced(self, site: Attention, rule: Rule, request: Request) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Return the graph that takes the place of ``site``, and the nodes that its placeholders stand for."""
        extra = rule.extra(site, request)
        nodes = list(dict.fromkeys([*nodes_read(site), *extra.values()]))
        key = _key(site, request, extra, nodes)
        if key not in self.memo:
            self.memo[key] = _traced(site, rule, request, extra, nodes)
        return self.memo[key], nodes

    def replace(self, site: Attention, rule: Rule, request: Request) -> tuple[str, list[str]]:
        """Rewrite ``site`` in its graph; return what it runs on, and the names of generated kernels.

        It is "triton", "fused" or "reference".
        """
        traced, nodes = self.traced(site, rule, request)
        graph = site.output.graph
        with graph.inserting_before(site.output):
            out = graph.graph_copy(traced.graph, _inputs(traced, nodes))
        assert isinstance(out, fx.Node)
        _stamp(site, out, set(nodes), rule.variant)
        site.output.replace_all_uses_with(out)
        _erase(site)
        return _implementation(traced, request)


def _traced(
    site: Attention, rule: Rule, request: Request, extra: dict[str, fx.Node], nodes: list[fx.Node]
) -> fx.GraphModule:
    function = rule.function(request)
    keep_strides = _needs_strides(site.output)
    wanted = site.output.meta["val"]

    def rewritten(*values: torch.Tensor) -> torch.Tensor:
        by_node = dict(zip(nodes, values, strict=True))
        t = SiteTensors(site, by_node, {name: by_node[node] for name, node in extra.items()})
        out = t.result(function(t))
        return out.contiguous() if keep_strides and out.stride() != wanted.stride() else out

    return _trace(rewritten, [node.meta["val"] for node in nodes])


def _key(site: Attention, request: Request, extra: dict[str, fx.Node], nodes: list[fx.Node]) -> str:
    """Describe what the traced function depends on, up to names."""
    order = {node: n for n, node in enumerate(nodes)}
    seen = site.visibility
    read = [site.query.node, *(x.node for role in ("key", "value") for x, _ in site.blocks(role))]
    read += [n for n, _, _ in site.scores.factors]
    read += [gate.node for gate in site.gates]
    sinks = per_head(site)
    read += [] if sinks is None else [sinks.node]
    read += [t.node for t in [*site.scores.terms, *seen.terms, *seen.bias]]
    leaves = [(order.get(x.node), x.polarity, x.threshold) for x in [*seen.padding, *seen.dense, *seen.documents]]
    values = [(v.dtype, v.shape, v.stride()) if isinstance(v := n.meta["val"], torch.Tensor) else v for n in nodes]
    slots = [order.get(node) for node in read] + [(name, order[node]) for name, node in extra.items()]
    rows = (seen.empty_rows, seen.rows_never_empty, seen.bias_is_small)
    facts = (seen.facts, *rows, site.dropout, torch.is_grad_enabled())
    result = (site.output.meta["val"].stride(), site.output.meta["val"].dtype, _needs_strides(site.output))
    config = sorted(request.config.items())
    places = {symbol: n for n, symbol in enumerate(site.leaves())}
    heads = None if sinks is None else [places.get(symbol) for symbol in symbols(sinks.layout)]
    return "\n".join(
        map(
            str,
            (
                fingerprint(site),
                slots,
                leaves,
                values,
                facts,
                result,
                request.variant,
                request.learning,
                config,
                len(seen.padding),
                len(seen.documents),
                heads,
            ),
        )
    )


def _implementation(traced: fx.GraphModule, request: Request) -> tuple[str, list[str]]:
    calls = [node for node in traced.graph.nodes if op(node) in OPERATORS]
    if not calls:
        fused = request.variant == "sdpa" and any(op(node) in FUSED for node in traced.graph.nodes)
        return "fused" if fused else "reference", []
    names: list[str] = []
    for node in calls:
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in node.args]
        names += kernel_names(op(node), values, learns=torch.is_grad_enabled())
    return "triton", list(dict.fromkeys(names))


def _trace(function: object, values: list[object]) -> fx.GraphModule:
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode:
        return make_fx(function, pre_dispatch=True, tracing_mode="real")(*values)  # type: ignore[arg-type]  # a callable


def _inputs(traced: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    return dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))


def _stamp(site: Attention, last: fx.Node, known: set[fx.Node], variant: str) -> None:
    """Give the new nodes the place of the output they replace, and the rule's name."""
    node = last
    while node not in known and node.meta.get("attnrewrite") is None and node.op != "placeholder":
        for key in ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id", "partitioner_tag"):
            if key in site.output.meta:
                node.meta[key] = site.output.meta[key]
        node.meta["attnrewrite"] = variant
        node = node.prev


def _needs_strides(output: fx.Node) -> bool:
    """Whether something downstream depends on the memory order of the output."""
    todo, seen = [output], set[fx.Node]()
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.op == "output" or op(user) in _STRIDED:
                return True
            if op(user) in _MOVES | (ALIASES - {"contiguous", "clone"}) and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _erase(site: Attention) -> None:
    """Erase the site's dead in-place operations, which dead-code elimination must keep, and what fed only them."""
    inside = sorted({node for _, node in site.region} | {site.output, site.anchor}, reverse=True)
    for node in inside:
        if not node.users and node.op == "call_function" and is_node(node):
            site.output.graph.erase_node(node)
