"""Certificates: the matched subgraph and its normal form agree in float64, on random and adversarial inputs.

Every axis gets a small size of its own, all different, so that a swapped or mistaken axis cannot hide behind equal
sizes, and the cost does not depend on the model's sizes. Equal subgraphs (the layers of one model) are proved once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Term
from attnrewrite.passes.graph.axes import RESHAPES, Layout, flat, small_shape
from attnrewrite.passes.graph.nodes import op
from attnrewrite.passes.proof.formula import formula
from attnrewrite.passes.proof.replay import Inputs, Replay, Sizes

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_TOLERANCE = 1e-9


@dataclass(eq=False, repr=False)
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

    rows, names = [], dict[fx.Node, str]()
    for (role, node), layout in sorted(site.region.items(), key=lambda item: (item[0][0], item[0][1])):
        read = [names.setdefault(x, str(len(names))) for x in node.all_input_nodes]
        rows.append(f"{names.setdefault(node, str(len(names)))} {role} {node.target} {read} {axes(layout)}")
        rows.append("" if op(node) in _SIZED else _text((node.args, node.kwargs)))
    s = site.scores
    rows.append(f"{s.alpha} {s.softcap} {s.floor} {s.is_causal} {[(axes(x), d) for _, x, d in s.factors]}")
    rows.append(f"{[axes(x) for _, x in s.shifts]} {[(axes(g.layout), g.divide) for g in site.gates]} {site.guarded}")
    rows.append(f"{_always_sees(site)} {[_shows(site, term) for term in s.terms]}")
    rows.append("" if site.matched is None else f"{site.matched.key} {[x.size for x in flat(site.inner)]}")
    rows.append("" if s.sink is None else f"sink {axes(s.sink.layout)} {s.sink.last}")
    rows += [f"{t.kind} {axes(t.layout)} {t.weight} {t.value} {t.when} {t.node.meta['val'].dtype}" for t in s.terms]
    rows += [axes(o.layout) for o in (site.query, *(x for role in ("key", "value") for x, _ in site.blocks(role)))]
    rows.append(f"{axes(site.output_layout)} {site.query_first} {site.probs_first} {op(site.output)}")
    return "\n".join(rows)


_SIZED = RESHAPES | {"expand", "slice"}
"""Operators whose numbers are sizes, which the layouts tell."""


def _text(x: Any) -> str:
    """Write literals down, without the names of nodes and of symbolic sizes."""
    if isinstance(x, dict):
        return _text(list(x.items()))
    if isinstance(x, list | tuple):
        return f"[{','.join(map(_text, x))}]"
    return "·" if isinstance(x, fx.Node | torch.SymInt) else repr(x)


def _prove(site: Attention) -> str:
    sizes = dict(zip(site.leaves(), _PRIMES, strict=False)) if site.matched is None else _true_width(site)
    for join in site.joins():
        sizes[site.cols[0]] = sum(small_shape(join.cols, sizes))
    if site.scores.sink is not None:
        sizes[site.scores.sink.wide[0]] = small_shape((site.scores.sink.cols,), sizes)[0] + 1
    for name, make in _CASES.items():
        if name == "hidden" and _always_sees(site):
            continue
        generator = torch.Generator().manual_seed(len(name))
        inputs = make(site, sizes, generator)
        try:
            found = Replay(site, sizes, inputs).output()
        except Exception as error:  # an op that cannot run at test sizes is no proof
            return f"the subgraph does not run on {name} inputs: {type(error).__name__}: {error}"
        wanted = formula(site, sizes, inputs)
        if found.shape != wanted.shape:
            return f"shapes differ on {name} inputs: {tuple(found.shape)} and {tuple(wanted.shape)}"
        if not torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            return f"values differ on {name} inputs by {(found - wanted).abs().max():.3g}"
    return ""


def _always_sees(site: Attention) -> bool:
    """Whether it is known that every row of scores has a visible key."""
    return site.matched is None and site.visibility.rows_never_empty and site.visibility.bias_is_small


def _shows(site: Attention, term: Term) -> bool:
    """Whether a bias beside keys that are zeroed after the softmax is known to hide none: the match rests on it."""
    seen = site.visibility
    masked = any(mask.kind == "add" for mask in seen.terms)
    return site.guarded and seen.bias_is_small and term.kind == "add" and not masked


def _true_width(site: Attention) -> Sizes:
    """Keep the head dim's true size: a pattern's literals follow from it, as its scale does."""
    true = {symbol: int(symbol.size) for symbol in flat(site.inner)}
    others = (prime for prime in _PRIMES if prime not in true.values())
    return {symbol: true[symbol] if symbol in true else next(others) for symbol in site.leaves()}


def _loud(site: Attention, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Return inputs with large scores; where exponentials are written out, such that they are finite in float64."""
    scale = 12.0
    if site.matched is not None or (site.softmax is not None and site.softmax.steps):
        width = small_shape((site.inner,), sizes)[0]
        scale = min(scale, (100 / (abs(site.scores.alpha) * width**0.5)) ** 0.5)
    return _random(site, sizes, generator, scale, 0.4)


def _random(site: Attention, sizes: Sizes, generator: torch.Generator, scale: float, hidden: float) -> Inputs:
    def normal(layout: Layout) -> torch.Tensor:
        return torch.randn(small_shape(layout, sizes), generator=generator, dtype=torch.float64)

    operands = {
        "query": normal(site.query.layout) * scale,
        **{f"key{n}": normal(block.layout) * scale for n, (block, _) in enumerate(site.blocks("key"))},
        **{f"value{n}": normal(block.layout) for n, (block, _) in enumerate(site.blocks("value"))},
    }
    nodes = {node: _factor(node, layout, normal) for node, layout, _ in site.scores.factors}
    nodes |= {gate.node: _factor(gate.node, gate.layout, normal) for gate in site.gates}
    nodes |= {node: normal(layout) for node, layout in site.scores.shifts}
    for term in site.scores.terms:
        nodes[term.node] = normal(term.layout) if _shows(site, term) else _term_value(term, normal(term.layout), hidden)
        if _always_sees(site):
            _show_first_key(nodes[term.node], term, site)
    if site.scores.sink is not None:
        nodes[site.scores.sink.node] = normal(site.scores.sink.layout)
    return Inputs(operands, nodes)


def _factor(node: fx.Node, layout: Layout, normal: Callable[[Layout], torch.Tensor]) -> torch.Tensor:
    """Return a positive test scale of the node's rank."""
    return normal(layout).abs() + 0.5


def _term_value(term: Term, noise: torch.Tensor, hidden: float) -> torch.Tensor:
    dtype = term.node.meta["val"].dtype
    threshold = torch.quantile(noise, hidden) if noise.numel() > 1 else noise.min() - 1
    if dtype == torch.bool:
        return (noise > threshold) if not term.when or term.kind == "add" else (noise <= threshold)
    if term.zero_one:
        return (noise > threshold).double()
    if not dtype.is_floating_point:
        return (noise > threshold).to(dtype)
    return torch.where(noise > threshold, noise, torch.finfo(torch.float32).min)


def _show_first_key(value: torch.Tensor, term: Term, site: Attention) -> None:
    """Keep one key visible in every row, as the site's masks do."""
    for axis, dim in enumerate(term.layout):
        if flat(dim) == flat(site.cols):
            value.select(axis, 0).fill_(not term.when if term.kind == "fill" else 1)


def _hidden_rows(site: Attention, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """Return inputs in which every key is masked, wherever a term can mask."""
    return _random(site, sizes, generator, 1.0, 1.0)


_CASES: dict[str, Callable[[Attention, Sizes, torch.Generator], Inputs]] = {
    "random": lambda site, sizes, g: _random(site, sizes, g, 1.0, 0.4),
    "large": _loud,
    "tied": lambda site, sizes, g: _random(site, sizes, g, 0.0, 0.4),
    "hidden": _hidden_rows,
}
