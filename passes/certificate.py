"""Certificates: the matched subgraph and its normal form agree in float64, on random and adversarial inputs.

Every axis gets a small size of its own, all different, so that a swapped or mistaken axis cannot hide behind equal
sizes, and the cost does not depend on the model's sizes. Equal subgraphs (the layers of one model) are proved once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from attnrewrite.passes.attention import Attention, Role, Scores, Term
from attnrewrite.passes.axes import ALIASES, RESHAPES, Layout, Symbol, arrange, flat, small_shape
from attnrewrite.passes.graph import is_node, op, shape
from attnrewrite.passes.scores import constant

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_TOLERANCE = 1e-9


@dataclass
class Prover:
    """Proves sites; remembers the verdict of equal subgraphs."""

    memo: dict[str, str] = field(default_factory=dict)

    def prove(self, site: Attention) -> str:
        """Return "" if the certificate holds, else what went wrong."""
        key = fingerprint(site)
        if key not in self.memo:
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                self.memo[key] = _prove(site)
        return self.memo[key]


def fingerprint(site: Attention) -> str:
    """Describe the subgraph up to names: equal descriptions compute equal functions."""
    order = {symbol: n for n, symbol in enumerate(site.leaves())}

    def axes(layout: Layout) -> str:
        return str([[order.get(s, -1) for s in flat(dim)] for dim in layout])

    rows = []
    for (role, node), layout in sorted(site.region.items(), key=lambda item: (item[0][0], item[0][1])):
        literal = tree_map(lambda x: "·" if is_node(x) or isinstance(x, torch.SymInt) else x, (node.args, node.kwargs))
        rows.append(f"{role} {node.target} {_without_sizes(node, literal)} {axes(layout)}")
    s = site.scores
    rows.append(f"{s.alpha} {s.softcap} {s.is_causal} {[(axes(x), d) for _, x, d in s.factors]}")
    rows += [f"{t.kind} {axes(t.layout)} {t.weight} {t.value} {t.when} {t.node.meta['val'].dtype}" for t in s.terms]
    rows += [axes(o.layout) for o in (site.query, site.key, site.value)]
    rows.append(f"{axes(site.output_layout)} {site.query_first} {site.probs_first} {op(site.output)}")
    return "\n".join(rows)


def _without_sizes(node: fx.Node, literal: Any) -> Any:
    return "" if op(node) in RESHAPES | {"expand", "slice"} else literal


def _prove(site: Attention) -> str:
    sizes = dict(zip(site.leaves(), _PRIMES, strict=False))
    for name, make in _CASES.items():
        generator = torch.Generator().manual_seed(len(name))
        inputs = make(site, sizes, generator)
        try:
            found = _Region(site, sizes, inputs).output()
        except Exception as error:  # an op that cannot run at test sizes is no proof
            return f"the subgraph does not run on {name} inputs: {type(error).__name__}: {error}"
        wanted = normal_form(site, sizes, inputs)
        if found.shape != wanted.shape:
            return f"shapes differ on {name} inputs: {tuple(found.shape)} and {tuple(wanted.shape)}"
        if not torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            return f"values differ on {name} inputs by {(found - wanted).abs().max():.3g}"
    return ""


Sizes = dict[Symbol, int]


@dataclass
class _Inputs:
    """Test values of the operands (by role), of the terms and of the tensor scales (by node)."""

    operands: dict[str, torch.Tensor]
    nodes: dict[fx.Node, torch.Tensor]


def _random(site: Attention, sizes: Sizes, generator: torch.Generator, scale: float, hidden: float) -> _Inputs:
    def normal(layout: Layout) -> torch.Tensor:
        return torch.randn(small_shape(layout, sizes), generator=generator, dtype=torch.float64)

    operands = {
        "query": normal(site.query.layout) * scale,
        "key": normal(site.key.layout) * scale,
        "value": normal(site.value.layout),
    }
    nodes = {node: _factor(node, layout, normal) for node, layout, _ in site.scores.factors}
    nodes |= {term.node: _term_value(term, normal(term.layout), hidden) for term in site.scores.terms}
    return _Inputs(operands, nodes)


def _factor(node: fx.Node, layout: Layout, normal: Callable[[Layout], torch.Tensor]) -> torch.Tensor:
    """Return a positive test scale of the node's rank."""
    return normal(layout).abs() + 0.5


def _term_value(term: Term, noise: torch.Tensor, hidden: float) -> torch.Tensor:
    dtype = term.node.meta["val"].dtype
    threshold = torch.quantile(noise, hidden) if noise.numel() > 1 else noise.min() - 1
    if dtype == torch.bool:
        return (noise > threshold) if not term.when or term.kind == "add" else (noise <= threshold)
    if not dtype.is_floating_point:
        return (noise > threshold).to(dtype)
    return torch.where(noise > threshold, noise, torch.finfo(torch.float32).min)


def _hidden_rows(site: Attention, sizes: Sizes, generator: torch.Generator) -> _Inputs:
    """Return inputs in which every key is masked, wherever a term can mask."""
    return _random(site, sizes, generator, 1.0, 1.0)


_CASES: dict[str, Callable[[Attention, Sizes, torch.Generator], _Inputs]] = {
    "random": lambda site, sizes, g: _random(site, sizes, g, 1.0, 0.4),
    "large": lambda site, sizes, g: _random(site, sizes, g, 12.0, 0.4),
    "tied": lambda site, sizes, g: _random(site, sizes, g, 0.0, 0.4),
    "hidden": _hidden_rows,
}


@dataclass
class _Region:
    """Runs the matched subgraph, node by node, at test sizes and in float64."""

    site: Attention
    sizes: Sizes
    inputs: _Inputs
    memo: dict[tuple[str, fx.Node], Any] = field(default_factory=dict)

    def output(self) -> torch.Tensor:
        site = self.site
        if site.output is site.anchor:
            return self._fused()
        roles: tuple[Role, Role] = ("probs", "value") if site.probs_first else ("value", "probs")
        return self._contract(site.output, roles)

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
        key = (role, node)
        if key not in self.memo:
            self.memo[key] = self._compute(role, node)
        return self.memo[key]

    def _compute(self, role: Role, node: fx.Node) -> Any:
        site = self.site
        operand = {"query": site.query, "key": site.key, "value": site.value}.get(role)
        if operand is not None and node is operand.node:
            return self.inputs.operands[role]
        if role == "probs" and node is site.anchor:
            return self._softmax(node)
        if role == "scores" and node is site.scores.contraction:
            return self._contract(node, ("query", "key") if site.query_first else ("key", "query"))
        if role == "scores" and node in self.inputs.nodes:
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
        first = self.value(role, node.args[0]) if is_node(node.args[0]) and self._inside(role, node.args[0]) else None
        if name in ALIASES | {"to", "_to_copy", "type_as", "dropout", "float"} or name == "slice":
            return first
        if name in RESHAPES | {"squeeze"} and layout is not None:
            return first.reshape(small_shape(layout, self.sizes))  # type: ignore[union-attr]  # a tensor
        if name == "expand" and layout is not None:
            return first.expand(small_shape(layout, self.sizes))  # type: ignore[union-attr]  # a tensor
        if name == "repeat_interleave" and layout is not None:
            dim = int(node.args[2] if len(node.args) > 2 else node.kwargs["dim"])  # type: ignore[arg-type]  # int by schema
            times = small_shape(layout, self.sizes)[dim] // first.shape[dim]  # type: ignore[union-attr]  # a tensor
            return first.repeat_interleave(times, dim)  # type: ignore[union-attr]  # a tensor
        return self._call(role, node)

    def _inside(self, role: Role, node: fx.Node) -> bool:
        return (role, node) in self.site.region or node in self.inputs.nodes or self._is_operand(role, node)

    def _is_operand(self, role: Role, node: fx.Node) -> bool:
        operand = {"query": self.site.query, "key": self.site.key, "value": self.site.value}.get(role)
        return operand is not None and operand.node is node

    def _call(self, role: Role, node: fx.Node) -> Any:
        def argument(x: Any) -> Any:
            if not is_node(x):
                return x
            if self._inside(role, x):
                return self.value(role, x)
            number = constant(x)
            if number is None:
                raise ValueError(f"{x} is not part of the site")
            return torch.tensor(number, dtype=torch.float64)

        args = tree_map(argument, node.args)
        name = op(node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return getattr(torch, name)(*args, **node.kwargs)
        return node.target(*args, **node.kwargs)  # type: ignore[operator]  # a callable for call_function


def normal_form(site: Attention, sizes: Sizes, inputs: _Inputs) -> torch.Tensor:
    """Evaluate the site's normal form: the formula that every rewrite starts from."""
    size = sizes.__getitem__
    operands = inputs.operands
    q = arrange(operands["query"], site.query.layout, site.query_layout, size)
    k = arrange(operands["key"], site.key.layout, site.key_layout, size)
    v = arrange(operands["value"], site.value.layout, site.value_layout, size)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = site.scores.alpha * (q @ k.mT)  # [B, H, L, S]
    scores = _scale_and_terms(site, site.scores, scores, inputs, size)
    fused = site.output is site.anchor or op(site.anchor) == "_safe_softmax"
    empty = (scores == -math.inf).all(-1, keepdim=True) & fused
    probs = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    return arrange(probs @ v, site.result_layout, site.output_layout, size)


def _scale_and_terms(
    site: Attention, form: Scores, scores: torch.Tensor, inputs: _Inputs, size: Callable[[Symbol], int]
) -> torch.Tensor:
    for node, layout, divide in form.factors:
        factor = inputs.nodes[node]
        factor = arrange(factor, layout, site.mask_layout(layout), size) if shape_known(node) else factor.squeeze()
        scores = scores / factor if divide else scores * factor
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if form.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -math.inf)
    for term in form.terms:
        value = arrange(inputs.nodes[term.node], term.layout, site.mask_layout(term.layout), size)
        if term.kind == "fill":
            scores = scores.masked_fill(value.bool() if term.when else ~value.bool(), term.value)
        elif value.dtype == torch.bool:
            scores = scores + term.weight * value.double()
        else:
            scores = scores + term.weight * value
    return scores


def shape_known(node: fx.Node) -> bool:
    """Whether a tensor scale is a tensor (and not a number computed in the graph)."""
    return isinstance(node.meta.get("val"), torch.Tensor) and len(shape(node)) > 0
