"""Masks by evaluation: what depends only on positions is computed on the whole grid and compared with predicates.

A mask term is taken apart into conjuncts. Conjuncts without data are evaluated together and named (none, causal with
offset, sliding window); conjuncts over keys only are padding; the rest stays a tensor. Nothing is ever dropped without
proof over the grid, and what is not understood never blocks a rewrite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.passes.attention.form import NEGLIGIBLE, Leaf, Scores, Term, Visibility
from attnrewrite.passes.graph.axes import (
    ALIASES,
    AxisError,
    Dim,
    Layout,
    backward,
    broadcast,
    flat,
    same,
    size_of,
    symbols,
)
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.evaluate import DependsOnData, Evaluator, literals
from attnrewrite.passes.graph.nodes import WEIGHT, is_node, op, tensor
from attnrewrite.passes.masks.documents import same_number, split_documents
from attnrewrite.passes.masks.grids import draw, grid, name_grid
from attnrewrite.passes.masks.selection import affine_selection
from attnrewrite.passes.masks.smallness import is_small
from attnrewrite.passes.report import Mask

_AND = {"bitwise_and", "logical_and", "__and__", "__iand__"}
_OR = {"bitwise_or", "logical_or", "__or__", "__ior__"}
_NOT = {"bitwise_not", "logical_not"}


@dataclass(eq=False, repr=False)
class _Parts:
    """Conjuncts of a mask."""

    static: list[Leaf] = field(default_factory=list)
    padding: list[Leaf] = field(default_factory=list)
    dense: list[Leaf] = field(default_factory=list)

    def usable(self, graph: fx.Graph, whole: Leaf) -> None:
        """Use the ``whole`` term in place of conjuncts that lie outside ``graph``."""
        if any(leaf.node.graph is not graph for leaf in self.padding + self.dense):
            self.padding, self.dense = [], [whole]


@dataclass(eq=False, repr=False)
class MaskReader:
    """Reads the mask terms of one graph; values are shared between sites."""

    capture: Capture
    evaluator: Evaluator = field(init=False)
    memo: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluator = Evaluator(self.capture)

    def read(
        self, graph: fx.Graph, scores: Scores, rows: Dim, cols: Dim, heads: Dim, *, zero: bool = False
    ) -> Visibility:
        """Split the terms of ``scores`` into masks and biases, and name the masks.

        ``zero`` says that rows without visible keys give 0, whatever they are filled with.

        The leaves that the result holds are nodes of ``graph``, ready to be read by a rewrite.
        """
        seen, static, fills = Visibility(Mask()), list[Leaf](), list[float]()
        for term in [part for whole in scores.terms for part in self._addends(whole)]:
            read = self._term(graph, term, rows, heads)
            if read is None:
                seen.bias.append(term)
                seen.bias_is_small &= is_small(term.node, term.weight, self._static_value)
                seen.bias_may_hide |= not is_small(term.node, term.weight, self._static_value, self._is_parameter)
                continue
            parts, fill = read
            seen.terms.append(term)
            fills += [] if math.isnan(fill) else [fill]
            static += parts.static
            seen.padding += parts.padding
            seen.dense += parts.dense
        packed = split_documents(seen.dense, rows, cols, lambda node: self._is_range(node, rows, cols))
        if packed is not None:
            seen.documents, seen.dense = packed.documents, packed.rest
        named = self._name(static, rows, cols)
        if named is not None:
            seen.facts, seen.rows_never_empty = Mask(**vars(named[0])), named[1]
            seen.assumed = sorted({b for x in static for b in self.evaluator.buffers.get(x.node, ())})
        if scores.is_causal and not scores.terms:
            seen.facts, fills = Mask("causal", offset=0), [-math.inf]
        if seen.documents and seen.facts.kind == "none":
            seen.facts = Mask("causal", offset=0)
        if packed is not None and packed.window is not None:
            narrowest = min(packed.window, seen.facts.window or packed.window)
            seen.facts = Mask("window", offset=seen.facts.offset, window=narrowest)
        if seen.facts.offset == 0 and not seen.documents:
            seen.documents = [
                x for x in seen.dense if same_number(x, heads, rows, cols, lambda n: self._is_range(n, rows, cols))
            ]
            seen.dense = [x for x in seen.dense if x not in seen.documents]
        if named is None or seen.dense:  # then the names are not told, and visibility must hold what they stand for
            seen.dense += [_whole(term) for term in seen.terms if self._has_static(term, rows, heads)]
        if scores.floor is not None:
            fills = [max(f, scores.floor) for f in fills]
        self._describe(seen, fills)
        seen.empty_rows = "zero" if zero else "nan" if all(f == -math.inf for f in fills) else "uniform"
        return seen

    def _describe(self, seen: Visibility, fills: list[float]) -> None:
        facts = seen.facts
        facts.padding, facts.fill = bool(seen.padding), fills[0] if fills else None
        if seen.dense:
            facts.kind, facts.offset, facts.window = "custom", None, None
        else:
            facts.kind += "+documents" if seen.documents else ""
            if seen.padding:
                facts.kind = "padding" if facts.kind == "none" else facts.kind + "+padding"
        seen.rows_never_empty &= not seen.padding and not seen.dense

    def is_zero_one(self, node: fx.Node) -> bool:
        """Whether a mask is known to hold nothing but the numbers 0 and 1."""
        value = self._static_value(node)
        return value is not None and bool(((value == 0) | (value == 1)).all())

    def _has_static(self, term: Term, rows: Dim, heads: Dim) -> bool:
        read = self._term(term.node.graph, term, rows, heads)
        return read is not None and bool(read[0].static)

    def _term(self, graph: fx.Graph, term: Term, rows: Dim, heads: Dim) -> tuple[_Parts, float] | None:
        """Return the term's conjuncts and its fill value (NaN: it does nothing), or None where it is a bias."""
        parts = _Parts()
        if term.kind == "fill":
            if term.value > NEGLIGIBLE:
                return None
            self._conjuncts(_whole(term), rows, heads, parts)
            parts.usable(graph, _whole(term))
            return parts, term.value
        if term.weight <= 0:
            return None
        value = self._static_value(term.node)
        if value is not None:
            largest = self._largest_nonzero(term.node, value)
            if largest is not None and largest * term.weight > NEGLIGIBLE:
                return None
            parts.static = [] if largest is None else [_whole(term)]
            return parts, math.nan if largest is None else largest * term.weight
        found = self._selection(term.node, term.layout)
        if found is None or found[1] * term.weight > NEGLIGIBLE:
            return None
        self._conjuncts(found[0], rows, heads, parts)
        parts.usable(graph, _whole(term))
        return parts, found[1] * term.weight

    def _largest_nonzero(self, node: fx.Node, value: torch.Tensor) -> float | None:
        if ("bias", node) not in self.memo:
            gone = value[value != 0]
            self.memo["bias", node] = float(gone.max()) if gone.numel() else None
        found: float | None = self.memo["bias", node]
        return found

    def _addends(self, term: Term) -> list[Term]:
        """Split an additive term that is a sum, or a bias where visible and a fill elsewhere, into its parts."""
        if term.kind != "add" or self.evaluator.is_static(term.node):
            return [term]
        node, layout = term.node, term.layout
        while op(node) in ALIASES and (moved := backward(layout, node)) is not None:
            node, layout = moved
        split: list[Term] = []
        if op(node) == "add" and constant(node.kwargs.get("alpha", 1)) == 1:
            parts = [part for part in node.args[:2] if is_node(part)]
            split = [Term("add", part, broadcast(layout, part), term.weight) for part in parts]
        elif op(node) in ("where", "masked_fill") and self._selection(node, layout) is None:
            masked = op(node) == "masked_fill"
            condition, bias, fill = node.args[masked], node.args[not masked], constant(node.args[2])
            if is_node(condition) and is_node(bias) and fill is not None and fill * term.weight <= NEGLIGIBLE:
                hidden = Term("fill", condition, broadcast(layout, condition), value=fill * term.weight, when=masked)
                split = [Term("add", bias, broadcast(layout, bias), term.weight), hidden]
        if len(split) != 2:
            return [term]
        return [leaf for part in split for leaf in self._addends(part)]

    def _is_parameter(self, node: fx.Node) -> bool:
        node = self.capture.bindings.get(node, node)
        return node.op == "placeholder" and WEIGHT in node.meta and node not in self.capture.buffers

    def _static_value(self, node: fx.Node) -> torch.Tensor | None:
        try:
            value = self.evaluator.value(node)
        except DependsOnData:
            return None
        return value if isinstance(value, torch.Tensor) else None

    def _selection(self, node: fx.Node, layout: Layout) -> tuple[Leaf, float] | None:
        """Read an additive mask as (condition, fill): 0 where the condition holds, fill elsewhere."""
        try:
            while (moved := backward(layout, node)) is not None:
                node, layout = moved
        except AxisError:
            return None
        if node in self.capture.bindings:
            return self._selection(self.capture.bindings[node], layout)
        if op(node) in ("to", "_to_copy") and is_node(node.args[0]):
            return self._selection(node.args[0], layout)
        if op(node) == "where" and is_node(node.args[0]):
            yes, no = (self._filled(x) for x in node.args[1:3])
            condition = broadcast(layout, node.args[0])
            if yes == 0 and no is not None and no < 0:
                return Leaf(node.args[0], condition, True), no
            if no == 0 and yes is not None and yes < 0:
                return Leaf(node.args[0], condition, False), yes
        if op(node) == "masked_fill" and self._filled(node.args[0]) == 0 and is_node(node.args[1]):
            fill = constant(node.args[2])
            if fill is not None and fill < 0:
                return Leaf(node.args[1], broadcast(layout, node.args[1]), False), fill
        return affine_selection(node, layout)

    def _filled(self, value: Any) -> float | None:
        """Return the one number that a literal or a constant tensor holds everywhere."""
        number = constant(value)
        if number is not None or not is_node(value):
            return number
        found = self._static_value(value)
        if found is None or found.numel() == 0:
            return None
        first = found.flatten()[0]
        return float(first) if bool((found == first).all()) else None

    def _conjuncts(self, leaf: Leaf, rows: Dim, heads: Dim, parts: _Parts) -> None:
        node, layout, polarity = leaf.node, leaf.layout, leaf.polarity
        if self.evaluator.is_static(node):
            parts.static.append(leaf)
            return
        inner = self._through(node, layout) if leaf.threshold is None else None
        told = self._nonzero(node, layout) if leaf.threshold is None else None
        if told is not None:  # hidden is what the additive mask takes off
            self._conjuncts(Leaf(told.node, told.layout, told.polarity != polarity), rows, heads, parts)
        elif inner is not None:
            self._conjuncts(Leaf(*inner, polarity), rows, heads, parts)
        elif leaf.threshold is None and op(node) in _NOT and is_node(node.args[0]):
            self._conjuncts(Leaf(node.args[0], layout, not polarity), rows, heads, parts)
        elif leaf.threshold is None and op(node) in (_AND if polarity else _OR):
            for part in node.args[:2]:
                if is_node(part):
                    self._conjuncts(Leaf(part, broadcast(layout, part), polarity), rows, heads, parts)
        elif any(s in symbols(layout) and not same(s.size, 1) for s in flat(rows) + flat(heads)):
            parts.dense.append(leaf)
        else:
            parts.padding.append(leaf)

    def _through(self, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
        """Step through what only moves axes or casts booleans, and out of a body into its graph."""
        if node in self.capture.bindings:
            return self.capture.bindings[node], layout
        try:
            moved = backward(layout, node)
        except AxisError:
            return None
        if moved is not None:
            return moved
        source = node.args[0] if node.args else None
        if op(node) in ("to", "_to_copy") and is_node(source) and _is_bool(node) and _is_bool(source):
            return source, layout
        return None

    def _nonzero(self, node: fx.Node, layout: Layout) -> Leaf | None:
        """Read an additive mask cast to booleans: what holds where it is 0, and so False."""
        source = node.args[0] if node.args else None
        if op(node) not in ("to", "_to_copy") or not _is_bool(node) or not is_node(source) or _is_bool(source):
            return None
        found = self._selection(source, layout)
        return found[0] if found is not None and found[0].threshold is None else None

    def _name(self, static: list[Leaf], rows: Dim, cols: Dim) -> tuple[Mask, bool] | None:
        """Name the conjunction of ``static``; also say whether every row of it has a visible key."""
        if not static:
            return Mask(), True
        key = (
            tuple((x.node, x.polarity, x.threshold, _pattern(x.layout, rows, cols)) for x in static),
            str(size_of(rows)),
        )
        if key not in self.memo:
            self.memo[key] = self._predicate(static, rows, cols)
        found: tuple[Mask, bool] | None = self.memo[key]
        return found

    def _predicate(self, static: list[Leaf], rows: Dim, cols: Dim) -> tuple[Mask, bool] | None:
        """Name the mask at the largest sizes, where every threshold shows, and check the name at all others."""
        grids = []
        for evaluator in self._evaluators(static, rows, cols):
            try:
                grids.append(grid(evaluator, static, rows, cols))
            except (DependsOnData, AxisError, RuntimeError):
                return None
        largest = max((g for g in grids if g is not None), key=lambda g: g.numel(), default=None)
        mask = None if largest is None else name_grid(largest)
        if mask is None or any(g is None or not bool((g == draw(mask, g)).all()) for g in grids):
            return None
        return mask, all(bool(g.any(-1).all()) for g in grids if g is not None)

    def _is_range(self, node: fx.Node, rows: Dim, cols: Dim) -> bool:
        """Whether an index counts 0, 1, 2, ... for every size."""
        try:
            for evaluator in self._evaluators([Leaf(node, (), True)], rows, cols):
                value = evaluator.value(node)
                if not torch.equal(value.flatten(), torch.arange(value.numel(), device=value.device)):
                    return False
        except (DependsOnData, AttributeError):
            return False
        return True

    def _evaluators(self, static: list[Leaf], rows: Dim, cols: Dim) -> list[Evaluator]:
        """One evaluator where sizes are numbers; several sizes, beyond every threshold, where they are symbols."""
        sizes = [n for n in (size_of(rows), size_of(cols)) if isinstance(n, torch.SymInt)]
        if not sizes:
            return [self.evaluator]
        free = {s for n in sizes for s in n.node.expr.free_symbols}
        shapes = [n for x in static for n in x.node.meta["val"].shape if isinstance(n, torch.SymInt)]
        every = {s for n in shapes for s in n.node.expr.free_symbols}
        bound = max((n for x in static for n in literals(x.node, self.capture)), default=0)
        if bound > 4096:
            return [_NEVER]
        tries = ({s: n + i for i, s in enumerate(free)} for n in (11, bound + 37))
        return [
            self.evaluator,
            *(Evaluator(self.capture, {**dict.fromkeys(every - free, 2), **t}) for t in tries),
        ]


class _Never(Evaluator):
    def value(self, node: fx.Node) -> Any:
        raise DependsOnData(node)


_NEVER = _Never(capture=None)  # type: ignore[arg-type]  # it never reads the capture


def _whole(term: Term) -> Leaf:
    """Return the term itself as one condition."""
    if term.kind == "fill":
        return Leaf(term.node, term.layout, not term.when)
    return Leaf(term.node, term.layout, True, threshold=NEGLIGIBLE / 2)


def _pattern(layout: Layout, rows: Dim, cols: Dim) -> tuple[str, ...]:
    """Say which dims are rows and which are columns, without naming one site's symbols."""
    axes = {flat(rows): "i", flat(cols): "j"}
    return tuple(axes.get(flat(dim), "-") if dim else "" for dim in layout)


def _is_bool(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and value.dtype == torch.bool
