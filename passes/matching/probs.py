"""From the softmax forward: follow the attention weights to their product with the values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnrewrite.passes.attention.contract import CONTRACTIONS, from_operand, from_result
from attnrewrite.passes.attention.form import Gate, Join, Operand, Reject, Role, Scores, Sink, Term
from attnrewrite.passes.graph.axes import AxisError, Dim, Layout, broadcast, flat, forward, same, symbols
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import argument, is_node, op, same_value, shape, tensor
from attnrewrite.passes.matching.joins import added, cut, renamed
from attnrewrite.passes.matching.mixing import NEAREST, is_heads, mixed_behind, other_axis

OTHER_AXIS = "keys are shared out to queries: the softmax runs over another axis than the product with the values"
NEAREST_CUT = "weights[..., :n] @ value1 + weights[..., n:] @ value2, cut where the keys are joined"
_CHANGES = {"mul", "masked_fill", "where", "div", "add", "sub", "nan_to_num", "pow", "mean", "sum"}


@dataclass(eq=False, repr=False)
class Mixed:
    """The product of weights and values: the site's output, its layout, the values, and what was done to the weights.

    ``values`` are such in two blocks; ``gates`` are factors on the weights; ``guard`` is the fill whose keys are zeroed
    once more behind the softmax, and ``no_nan`` says that NaN becomes zero: both only matter to rows without visible
    keys.
    """

    output: fx.Node
    layout: Layout
    value: Operand
    probs_first: bool = True
    dropout: float = 0.0
    gates: list[Gate] = field(default_factory=list)
    guard: Term | None = None
    no_nan: bool = False
    values: Join | None = None


@dataclass(eq=False, repr=False)
class Follower:
    """Follows the weights of one softmax, whose key axis is ``cols`` and which may have a sink column in front."""

    scores: Scores
    region: dict[tuple[Role, fx.Node], Layout]
    cols: Dim
    parts: tuple[Dim, Dim] | None = None
    blocked: Reject | None = None

    def follow(self, node: fx.Node, layout: Layout) -> Mixed:
        """Return the product with the values. Raises Reject."""
        found = self._follow(node, layout)
        if found is not None:
            return found
        other = other_axis(node, layout, self.cols)
        if other is not None:
            raise Reject("AR203", OTHER_AXIS, other, "softmax over the axis that the product with the values sums over")
        if self.blocked is not None:
            raise self.blocked
        raise Reject("AR202", "the softmax's result is not contracted with values along the same axis", node)

    def _follow(self, node: fx.Node, layout: Layout) -> Mixed | None:
        self.region["probs", node] = layout
        joined = self._blocks(node, layout)
        if joined is not None:
            return joined
        for user in node.users:
            self._check_heads(user, node, layout)
            if op(user) in CONTRACTIONS:
                mixed = _mix(user, node, layout, self.cols)
            else:
                mixed = self._through(user, node, layout)
            if mixed is not None:
                return mixed
        self.region.pop(("probs", node))
        return None

    def _blocks(self, node: fx.Node, layout: Layout) -> Mixed | None:
        """Follow weights that are cut in two to the sum of their products with values."""
        parts = cut(node, layout, self.cols, self.parts) if self.scores.sink is None else []
        ways = []
        for part, where in parts:
            cols = next(dim for dim, old in zip(where, layout, strict=True) if dim is not old)
            try:
                ways.append((Follower(self.scores, self.region, cols).follow(part, where), cols))
            except Reject:
                ways = []
                break
        found = self._summed(*ways[0], *ways[1]) if ways else None
        if found is None and parts:
            detail = "the weights are cut in two, and their products with values are not just added"
            self.blocked = self.blocked or Reject("AR203", detail, parts[1][0], NEAREST_CUT)
        return found

    def _summed(self, first: Mixed, ahead: Dim, second: Mixed, behind: Dim) -> Mixed | None:
        new = [dim for dim in second.layout if not set(flat(dim)) & set(symbols(first.layout))]
        old = [dim for dim in first.layout if not set(flat(dim)) & set(symbols(second.layout))]
        output = added(first.output, second.output)
        if output is None or len(new) != 1 or len(old) != 1 or first.values or second.values:
            return None
        layout = renamed(second.layout, new[0], old[0])
        value = Operand(second.value.node, renamed(second.value.layout, new[0], old[0]))
        plain = not any(way.gates or way.guard or way.no_nan for way in (first, second))
        alike = first.output.meta["val"].dtype == second.output.meta["val"].dtype
        if not plain or not alike or layout != first.layout or first.probs_first != second.probs_first:
            return None
        values = Join((first.output, second.output), (first.value, value), (ahead, behind))
        dropout = max(first.dropout, second.dropout)
        return Mixed(output, layout, value, first.probs_first, dropout, values=values)

    def _through(self, user: fx.Node, node: fx.Node, layout: Layout) -> Mixed | None:
        """Go on behind one step: a move of axes, dropout, the end of a sink, a gate, or a guard of empty rows."""
        gate, guard, moved = None, None, None
        try:
            if op(user) in ("mul", "div"):
                gate = self._gate(user, node, layout)
                moved = layout if gate is not None else None
            elif _first(user, node) and op(user) == "dropout":
                moved = layout
            elif _first(user, node) and op(user) == "slice" and self.scores.sink is not None:
                moved = _without_sink(user, layout, self.scores.sink)
            elif op(user) in ("masked_fill", "where"):
                guard = self._guard(user, node)
                moved = None if guard is None else layout
            elif _drops_nan(user, node):
                moved = layout
            elif _first(user, node):
                moved = forward(layout, user)
        except AxisError:
            return None
        if moved is None:
            self._block(user)
            return None
        mixed = self._follow(user, moved)
        if mixed is not None:
            mixed.dropout = max(mixed.dropout, _dropout(user))
            mixed.gates += [gate] if gate is not None else []
            mixed.guard = mixed.guard or guard
            mixed.no_nan |= _drops_nan(user, node)
        return mixed

    def _block(self, user: fx.Node) -> None:
        if op(user) in _CHANGES and self.blocked is None:
            self.blocked = Reject("AR203", f"{user.target} changes the attention weights after the softmax", user)

    def _check_heads(self, user: fx.Node, node: fx.Node, layout: Layout) -> None:
        axis, product = mixed_behind(user, node, layout), self.scores.contraction
        if axis is None or self.blocked is not None:
            return
        if is_heads(axis, from_result(product, self.region["scores", product], "d")):
            detail = "heads are mixed between the softmax and the product with the values"
            self.blocked = Reject("AR203", detail, user, NEAREST)

    def _gate(self, user: fx.Node, node: fx.Node, layout: Layout) -> Gate | None:
        """Read a factor that does not depend on the key."""
        first = _first(user, node)
        other = user.args[1] if first else user.args[0]
        if not is_node(other) or tensor(other) is None or other is node or user.kwargs.get("rounding_mode"):
            return None
        if (op(user) == "div" and not first) or len(shape(other)) > len(layout) or shape(user) != shape(node):
            return None
        where = broadcast(layout, other)
        return None if set(symbols(where)) & set(flat(self.cols)) else Gate(other, where, op(user) == "div")

    def _guard(self, user: fx.Node, node: fx.Node) -> Term | None:
        """Return the fill term whose keys ``user`` zeroes once more."""
        if op(user) == "masked_fill":
            kept, mask, gone, when = user.args[0], user.args[1], user.args[2], True
        else:
            mask, kept, gone = user.args[:3]
            when = kept is not node
            kept, gone = (gone, kept) if when else (kept, gone)
        if kept is not node or constant(gone) != 0.0:
            return None
        return next(
            (t for t in self.scores.terms if t.kind == "fill" and t.when == when and same_value(t.node, mask)), None
        )


def _drops_nan(user: fx.Node, node: fx.Node) -> bool:
    return op(user) == "nan_to_num" and _first(user, node) and constant(argument(user, 1, "nan", None) or 0.0) == 0.0


def _first(user: fx.Node, node: fx.Node) -> bool:
    return bool(user.args) and user.args[0] is node


def _mix(user: fx.Node, node: fx.Node, layout: Layout, cols: Dim) -> Mixed | None:
    product = from_operand(user, node, layout, cols, "e")
    if product is None:
        return None
    left = Operand(product.left, product.left_layout)
    right = Operand(product.right, product.right_layout)
    first = left.node is node
    return Mixed(user, product.result, right if first else left, first)


def _without_sink(user: fx.Node, layout: Layout, sink: Sink) -> Layout | None:
    """Return the layout behind the slice that cuts the sink's column off."""
    dim = int(argument(user, 1, "dim", 0)) % len(layout)
    if flat(layout[dim]) != flat(sink.wide):
        return forward(layout, user)
    start = argument(user, 2, "start", 0) or 0
    fits = same(shape(user)[dim], sink.cols[0].size) and start == (0 if sink.last else 1)
    return (*layout[:dim], sink.cols, *layout[dim + 1 :]) if fits and argument(user, 4, "step", 1) == 1 else None


def _dropout(node: fx.Node) -> float:
    if op(node) != "dropout" or argument(node, 2, "train") is False:
        return 0.0
    p = constant(argument(node, 1, "p"))
    return 1.0 if p is None else p
