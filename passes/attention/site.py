"""A site's tensors in canonical form, for the functions that rewrites are traced from.

A rewrite is an ordinary Python function over these tensors. It is traced into ATen and put in the place of the site,
so dynamic sizes, dtypes and views are handled by tracing and not by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Leaf, Sink, Term
from attnrewrite.passes.attention.sinks import per_head
from attnrewrite.passes.graph.axes import Layout, Symbol, arrange, flat, prod_of, size_of, symbols


def nodes_read(site: Attention) -> list[fx.Node]:
    """Return the nodes whose values a rewrite of ``site`` may read, each once."""
    seen = site.visibility
    nodes = [site.query.node, *(operand.node for role in ("key", "value") for operand, _ in site.blocks(role))]
    nodes += [node for node, _, _ in site.scores.factors]
    nodes += [term.node for term in [*site.scores.terms, *seen.terms, *seen.bias]]
    nodes += [gate.node for gate in site.gates]
    sink = site.scores.sink
    nodes += [] if sink is None else [(per_head(site) or sink).node]
    nodes += [leaf.node for leaf in [*seen.padding, *seen.dense, *seen.documents]]
    return [node for node in dict.fromkeys(nodes) if node.graph is site.output.graph]


@dataclass(eq=False, repr=False)
class SiteTensors:
    """The tensors of a site while a rewrite is traced. ``extra`` holds what a rule asked for by name."""

    site: Attention
    values: dict[fx.Node, Any]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def size(self, symbol: Symbol) -> Any:
        """Return a symbol's size; a symbolic one is read off a traced tensor, so that it stays symbolic."""
        if isinstance(symbol.size, int):
            return symbol.size
        for join in self.site.joins():
            if symbol in flat(self.site.cols):
                return sum(self.dims(part) for part in join.cols)
        blocks = [operand for role in ("key", "value") for operand, _ in self.site.blocks(role)]
        for operand in (self.site.query, *blocks):
            for dim, line in enumerate(operand.layout):
                if symbol in flat(line):
                    others = prod_of(s.size for s in flat(line) if s is not symbol)
                    total = self.values[operand.node].shape[dim]
                    return total if isinstance(others, int) and others == 1 else total // others
        raise ValueError(f"size of {symbol} is not known")

    def dims(self, dim: tuple[Symbol, ...]) -> Any:
        """Return the product of the symbols' sizes."""
        return prod_of(self.size(s) for s in flat(dim))

    @property
    def length(self) -> Any:
        """L, the number of query positions."""
        return self.dims(self.site.rows)

    @property
    def width(self) -> Any:
        """S, the number of key positions."""
        return self.dims(self.site.cols)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key-value head."""
        return bool(flat(self.site.groups))

    def _to(self, node: fx.Node, have: Layout, want: Layout) -> torch.Tensor:
        return arrange(self.values[node], have, want, self.size)

    def arranged(self, value: torch.Tensor, have: Layout, want: Layout) -> torch.Tensor:
        """Bring a tensor from one layout to another."""
        return arrange(value, have, want, self.size)

    def query(self) -> torch.Tensor:
        """Return the query [B, H, L, D], with tensor-valued scales folded in."""
        site = self.site
        q = self._to(site.query.node, site.query.layout, site.query_layout)
        for node, layout, divide in site.scores.factors:
            factor = self.values[node]
            if isinstance(factor, torch.Tensor) and factor.dim():
                factor = arrange(factor, layout, site.mask_layout(layout), self.size)  # [B|1, H|1, L|1, 1]
            q = q / factor if divide else q * factor
        return q

    def key(self) -> torch.Tensor:
        """Return the key [B, Hkv, S, D]."""
        return self._whole("key", self.site.key_layout)

    def value(self) -> torch.Tensor:
        """Return the value [B, Hkv, S, Dv]."""
        return self._whole("value", self.site.value_layout)

    def attended(self) -> torch.Tensor:
        """Return what the attention weights sum up: the values. A subclass gives the identity to see the weights."""
        return self.value()

    def _whole(self, role: str, want: Layout) -> torch.Tensor:
        """Bring all blocks of keys or values into one layout, and join them."""
        parts = [
            self._to(operand.node, operand.layout, (*want[:2], flat(cols), want[3]))
            for operand, cols in self.site.blocks(role)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def sinks(self) -> torch.Tensor | None:
        """Return one more logit per head, [H], or None where there is none, or no such."""
        sinks = per_head(self.site)
        if sinks is None:
            return None
        line, heads = symbols(sinks.layout), flat(self.site.kv_heads + self.site.groups)
        value = self.values[sinks.node].reshape([self.size(symbol) for symbol in line])
        for dim in reversed(range(len(line))):
            value = value if line[dim] in heads else value.select(dim, 0)
        own = tuple((symbol,) for symbol in line if symbol in heads)
        return arrange(value, own, (heads,), self.size)

    def sink_column(self, sink: Sink) -> torch.Tensor:
        """Return the column of scores that takes weight and gives no value, [B|1, H|1, L|1, 1]."""
        return self._masklike(sink.node, sink.layout)

    def result(self, out: torch.Tensor) -> torch.Tensor:
        """Bring the attention's result [B, H, L, Dv], times its gates, to the layout and dtype of the site's output."""
        wanted = self.site.output.meta["val"].dtype
        for gate in self.site.gates:
            factor = self._masklike(gate.node, gate.layout)  # [B|1, H|1, L|1, 1]
            out = out / factor if gate.divide else out * factor
        out = arrange(out, self.site.result_layout, self.site.output_layout, self.size)
        return out if out.dtype == wanted else out.to(wanted)

    def _masklike(self, node: fx.Node, layout: Layout) -> torch.Tensor:
        return self._to(node, layout, self.site.mask_layout(layout))

    def _condition(self, leaf: Leaf) -> torch.Tensor:
        value = self._masklike(leaf.node, leaf.layout)
        if leaf.threshold is not None:
            return value > leaf.threshold
        return value.bool() if leaf.polarity else ~value.bool()

    def padding(self) -> torch.Tensor | None:
        """Return which keys are real, [B|1, 1, 1, S] bool, or None where all are."""
        return self._all(self.site.visibility.padding)

    def documents(self) -> torch.Tensor | None:
        """Return which pairs lie in one packed document, [B|1, 1, L, S] bool, or None where all do."""
        return self._all(self.site.visibility.documents)

    def _all(self, leaves: list[Leaf]) -> torch.Tensor | None:
        out: torch.Tensor | None = None
        for leaf in leaves:
            condition = self._condition(leaf)
            out = condition if out is None else out & condition
        return out

    def visible(self) -> torch.Tensor | None:
        """Return which keys each query sees, [B|1, H|1, L|1, S] bool, or None where all are."""
        seen = self.site.visibility
        out = self._all([*seen.padding, *seen.dense, *seen.documents])
        grid = self.grid()
        if grid is None or out is None:
            return grid if out is None else out
        return out & grid

    def filled(self) -> torch.Tensor | None:
        """Return which scores a fill replaces, [B|1, H|1, L|1, S|1] bool, or None where none is."""
        fills = [term for term in self.site.visibility.terms if term.kind == "fill"]
        kept = self._all([Leaf(term.node, term.layout, not term.when) for term in fills])
        return None if kept is None else ~kept

    def grid(self) -> torch.Tensor | None:
        """Return the named part of the mask, [1, 1, L, S] bool, or None where it hides nothing."""
        facts = self.site.visibility.facts
        if facts.offset is None:
            return None
        device = self.values[self.site.query.node].device
        i = torch.arange(self.length, device=device)[:, None] + facts.offset
        j = torch.arange(self.width, device=device)[None, :]
        grid = j <= i
        if facts.window is not None:
            grid = grid & (j > i - facts.window)
        return grid[None, None]

    def beside_positions(self) -> torch.Tensor | None:
        """Return what the named part of the mask leaves out, as one mask [B|1, H|1, L|1, S|1], or None.

        It is boolean, or a bias in which hidden keys are -inf.
        """
        seen, bias = self._all([*self.site.visibility.padding, *self.site.visibility.documents]), self.bias()
        if bias is None or seen is None:
            return seen if bias is None else bias
        return bias.masked_fill(~seen, float("-inf"))

    def bias(self) -> torch.Tensor | None:
        """Return the additive terms that are no mask, [B|1, H|1, L|1, S|1], or None."""
        return self._sum(self.site.visibility.bias)

    def _sum(self, terms: list[Term]) -> torch.Tensor | None:
        out: torch.Tensor | None = None
        for term in terms:
            value = self._masklike(term.node, term.layout)
            value = value if term.weight == 1 else value * term.weight
            out = value if out is None else out + value
        return out

    def written_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the masks and biases as one attn_mask [B|1, H|1, L|1, S]: boolean, or additive in ``dtype``.

        Finite fills become the lowest number of ``dtype``, which absorbs any score as the model's fill does.
        """
        terms, seen = self.site.scores.terms, self.site.visibility
        floored = self.site.scores.floor is not None and not seen.rows_never_empty
        as_bool = (terms[0].value == float("-inf") or seen.rows_never_empty) if terms else False
        if len(terms) == 1 and terms[0].kind == "fill" and as_bool and not floored:
            return self._condition(Leaf(terms[0].node, terms[0].layout, not terms[0].when))
        lowest = torch.finfo(dtype).min
        out: torch.Tensor | None = None
        for term in terms:
            value = self._masklike(term.node, term.layout)
            if term.kind == "add":
                value = value.to(dtype) if value.dtype == dtype else _narrow(value, dtype)
                value = value if term.weight == 1 else (value * term.weight).clamp(min=lowest)
                out = value if out is None else out + value
            else:
                hidden = value.bool() if term.when else ~value.bool()
                base = torch.zeros_like(hidden, dtype=dtype) if out is None else out
                out = base.masked_fill(hidden, term.value if term.value == float("-inf") else lowest)
        return out.clamp(min=lowest) if floored and out is not None else out


def _narrow(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast an additive mask without turning its lowest numbers into -inf."""
    if not value.dtype.is_floating_point:
        return value.to(dtype)
    lowest = max(torch.finfo(dtype).min, torch.finfo(value.dtype).min)
    return torch.where(value == float("-inf"), value, value.clamp(min=lowest)).to(dtype)


def same_length(site: Attention) -> bool:
    """Whether L equals S for every size the graph is valid for."""
    from attnrewrite.passes.graph.axes import same

    return same(size_of(site.rows), size_of(site.cols))
