"""Run the matched nodes of a site, one by one, at test sizes and in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from attnrewrite.passes.attention.form import Attention, Role
from attnrewrite.passes.graph.axes import ALIASES, RESHAPES, Symbol, small_shape
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import argument, is_node, op, same_value, shape

Sizes = dict[Symbol, int]


@dataclass(eq=False, repr=False)
class Inputs:
    """Test values of the operands (by role), of everything else that the site reads (by node)."""

    operands: dict[str, torch.Tensor]
    nodes: dict[fx.Node, torch.Tensor]


@dataclass(eq=False, repr=False)
class Replay:
    """Runs the matched subgraph, node by node, at test sizes and in float64."""

    site: Attention
    sizes: Sizes
    inputs: Inputs
    memo: dict[tuple[str, fx.Node], Any] = field(default_factory=dict)

    def output(self) -> torch.Tensor:
        """Return the site's output."""
        site = self.site
        if site.matched is not None:
            given: tuple[Role, ...] = ("query", "key", "value")
            values = [self.value(role, node) for role, node in zip(given, site.matched.inputs, strict=True)]
            return site.matched.run([*values, *(self._input(term.node) for term in site.scores.terms)])
        if site.output is site.anchor:
            return self._fused()
        roles: tuple[Role, Role] = ("probs", "value") if site.probs_first else ("value", "probs")
        products = (site.output,) if site.values is None else site.values.products
        first, *rest = (self._contract(product, roles) for product in products)
        return first + rest[0] if rest else first

    def _fused(self) -> torch.Tensor:
        node = self.site.anchor
        roles: tuple[Role, ...] = ("query", "key", "value")
        q, k, v = (self.value(role, x) for role, x in zip(roles, node.args, strict=False))
        extra: list[Any] = [self._input(x) if is_node(x) else x for x in node.args[3:]]
        kwargs: dict[str, Any] = {k: self._input(x) if is_node(x) else x for k, x in node.kwargs.items()}
        if extra and len(extra) > 1:
            extra[1] = 0.0
        kwargs.pop("dropout_p", None)
        if kwargs.get("scale") is None:  # the default depends on the true head dim
            kwargs["scale"] = float(shape(node.args[0])[-1]) ** -0.5  # type: ignore[arg-type]  # a node
        out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, *extra, **kwargs)
        return out

    def _input(self, node: fx.Node) -> Any:
        value = self.inputs.nodes[node]
        return (
            value if node.meta.get("val") is not None and isinstance(node.meta["val"], torch.Tensor) else float(value)
        )

    def _contract(self, node: fx.Node, roles: tuple[Role, Role]) -> torch.Tensor:
        name = op(node)
        args = list(node.args)
        if name == "einsum":
            left, right = args[1]  # type: ignore[misc]  # two operands, checked by the matcher
            out: torch.Tensor = torch.einsum(str(args[0]), self.value(roles[0], left), self.value(roles[1], right))
            return out
        if name == "baddbmm":
            pair = self.value(roles[0], args[1]), self.value(roles[1], args[2])
            beta, alpha = (constant(node.kwargs.get(k, 1)) or 0.0 for k in ("beta", "alpha"))
            product = alpha * torch.bmm(*pair)
            return product if beta == 0 else product + beta * self.inputs.nodes[args[0]]  # type: ignore[index]  # a node
        left, right = self.value(roles[0], args[0]), self.value(roles[1], args[1])
        return torch.matmul(left, right)

    def value(self, role: Role, node: Any) -> Any:
        """Return the value of a node in its role."""
        role = "scores" if self._is_scores(role, node) else role
        key = (role, node)
        if key not in self.memo:
            self.memo[key] = self._compute(role, node)
        return self.memo[key]

    def _compute(self, role: Role, node: fx.Node) -> Any:
        site = self.site
        given = self._operand(role, node)
        if given is not None:
            return self.inputs.operands[given]
        if role == "probs" and node is site.anchor and site.softmax is not None and not site.softmax.steps:
            return self._softmax(node)
        products = (site.scores.contraction,) if site.keys is None else site.keys.products
        if role == "scores" and node in products:
            return self._contract(node, ("query", "key") if site.query_first else ("key", "query"))
        if node in self.inputs.nodes:
            return self._input(node)
        return self._apply(role, node)

    def _softmax(self, node: fx.Node) -> torch.Tensor:
        dim = int(node.args[1])  # type: ignore[arg-type]  # int by schema
        scores = self.value("scores", node.args[0])
        if op(node) == "_safe_softmax":
            return torch.softmax(scores, dim).nan_to_num(0.0)
        return torch.softmax(scores, dim)

    def _apply(self, role: Role, node: fx.Node) -> Any:
        name = op(node)
        layout = self.site.region.get((role, node))
        if layout is not None and getattr(node.target, "__name__", "") == "getitem" and _is_split(node.args[0]):
            return self._half(role, node, small_shape(layout, self.sizes))
        first = self.value(role, node.args[0]) if is_node(node.args[0]) and self._inside(role, node.args[0]) else None
        if name in ALIASES | {"to", "_to_copy", "type_as", "dropout", "float"}:
            return first
        if name == "slice" and layout is not None and first is not None:
            return self._slice(node, first, small_shape(layout, self.sizes))
        if name in RESHAPES | {"squeeze"} and layout is not None:
            return first.reshape(small_shape(layout, self.sizes))  # type: ignore[union-attr]  # a tensor
        if name == "unsqueeze" and layout is not None:  # an axis of size 1, such as a single query, has a test size
            return self._call(role, node).expand(small_shape(layout, self.sizes))
        if name == "expand" and layout is not None:
            return first.expand(small_shape(layout, self.sizes))  # type: ignore[union-attr]  # a tensor
        if name == "repeat_interleave" and layout is not None:
            dim = int(node.args[2] if len(node.args) > 2 else node.kwargs["dim"])  # type: ignore[arg-type]  # int by schema
            times = small_shape(layout, self.sizes)[dim] // first.shape[dim]  # type: ignore[union-attr]  # a tensor
            return first.repeat_interleave(times, dim)  # type: ignore[union-attr]  # a tensor
        if name == "repeat" and layout is not None:
            wide = zip(small_shape(layout, self.sizes), first.shape, strict=True)  # type: ignore[union-attr]  # a tensor
            return first.repeat([size // inner for size, inner in wide])  # type: ignore[union-attr]  # a tensor
        return self._call(role, node)

    def _half(self, role: Role, node: fx.Node, want: list[int]) -> torch.Tensor:
        """Cut the first or the last part off, as a split does."""
        split: Any = node.args[0]
        whole, dim = self.value(role, split.args[0]), int(argument(split, 2, "dim", 0)) % len(want)
        half: torch.Tensor = whole.narrow(dim, 0 if node.args[1] == 0 else whole.shape[dim] - want[dim], want[dim])
        return half

    def _slice(self, node: fx.Node, first: torch.Tensor, want: list[int]) -> torch.Tensor:
        """Cut the sink's column off; any other slice of the region is whole."""
        dim = int(argument(node, 1, "dim", 0)) % len(want)
        before_end = not argument(node, 2, "start", 0)
        return first.narrow(dim, 0 if before_end else first.shape[dim] - want[dim], want[dim])

    def _is_scores(self, role: Role, node: fx.Node) -> bool:
        return role == "probs" and self.site.softmax is not None and node is self.site.softmax.scores

    def _inside(self, role: Role, node: fx.Node) -> bool:
        known = (role, node) in self.site.region or node in self.inputs.nodes
        return known or self._operand(role, node) is not None or self._is_scores(role, node)

    def _operand(self, role: Role, node: fx.Node) -> str | None:
        """Return the name of the test value that ``node`` has as an operand."""
        if role == "query":
            return role if node is self.site.query.node else None
        blocks = self.site.blocks(role) if role in ("key", "value") else []
        return next((f"{role}{n}" for n, (block, _) in enumerate(blocks) if block.node is node), None)

    def _call(self, role: Role, node: fx.Node) -> Any:
        def argument(x: Any) -> Any:
            if not is_node(x):
                return x
            if self._inside(role, x):
                return self.value(role, x)
            number = constant(x)
            if number is not None:
                return torch.tensor(number, dtype=torch.float64)
            twin = next((node for node in self.inputs.nodes if same_value(node, x)), None)
            if twin is not None:
                return self._input(twin)
            if x.op != "call_function":
                raise ValueError(f"{x} is not part of the site")
            return self._call(role, x)  # computed from what the site reads

        args = tree_map(argument, node.args)
        kwargs = {name: x for name, x in node.kwargs.items() if name != "dtype"}  # all is float64 here
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return getattr(torch, op(node))(*args, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a callable for call_function


def _is_split(node: Any) -> bool:
    return op(node) in ("split", "split_with_sizes", "chunk")
