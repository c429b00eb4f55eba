"""Fold constants into a syntax tree: known names become values, known branches disappear, known loops are unrolled."""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class Fold(ast.NodeTransformer):
    """Replace the names in ``known`` by their values, and evaluate what is thereby decided.

    Only what steers the control flow is evaluated: comparisons, ``and``, ``or``, ``not``, ``if``, loops over
    ``tl.static_range``, and names that are given such a value as ``name: tl.constexpr = value``. Arithmetic stays as it
    is written, so that every number can be traced to its flag.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = dict(known)

    def visit_Name(self, node: ast.Name) -> ast.expr:  # named by ast
        """Replace a name that is read."""
        if isinstance(node.ctx, ast.Load) and node.id in self.known:
            return ast.copy_location(ast.Constant(self.known[node.id]), node)
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:  # named by ast
        """Evaluate ``not``."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:  # named by ast
        """Evaluate ``and`` and ``or`` as far as their operands are known."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        known = [bool(operand.value) for operand in node.values if isinstance(operand, ast.Constant)]
        if decides in known:
            return ast.Constant(decides)
        left = [operand for operand in node.values if not isinstance(operand, ast.Constant)]
        if not left:
            return ast.Constant(not decides)
        return left[0] if len(left) == 1 else ast.BoolOp(node.op, left)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:  # named by ast
        """Evaluate a comparison of two known values."""
        self.generic_visit(node)
        sides = (node.left, *node.comparators)
        if len(sides) == 2 and all(isinstance(side, ast.Constant) for side in sides):
            left, right = (side.value for side in sides if isinstance(side, ast.Constant))
            return ast.Constant(_COMPARISONS[type(node.ops[0])](left, right))
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:  # named by ast
        """Keep the side that is taken."""
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | list[ast.stmt]:  # named by ast
        """Take up a constant."""
        assert node.value is not None
        node.value = self.visit(node.value)
        if not isinstance(node.value, ast.Constant) or not isinstance(node.target, ast.Name):
            return node
        self.known[node.target.id] = node.value.value
        return []

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:  # named by ast
        """Keep the branch that is taken."""
        test = self.visit(node.test)
        if not isinstance(test, ast.Constant):
            node.test = test
            node.body, node.orelse = self.block(node.body), self.block(node.orelse)
            return node
        return _headed(node, self.block(node.body if test.value else node.orelse))

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:  # named by ast
        """Unroll a loop over ``tl.static_range``."""
        node.iter = self.visit(node.iter)
        bounds = _static_bounds(node.iter)
        if bounds is None or not isinstance(node.target, ast.Name):
            node.body = self.block(node.body)
            return node
        rounds: list[ast.stmt] = []
        for value in range(*bounds):
            rounds += Fold({**self.known, node.target.id: value}).block(copy.deepcopy(node.body))
        return _headed(node, rounds)

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Fold a list of statements."""
        folded: list[ast.stmt] = []
        for statement in body:
            found = self.visit(statement)
            folded += found if isinstance(found, list) else [found]
        return folded


def _static_bounds(call: ast.expr) -> list[int] | None:
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "tl.static_range":
        return None
    bounds = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, int)]
    return bounds if len(bounds) == len(call.args) else None


def _headed(gone: ast.stmt, body: list[ast.stmt]) -> list[ast.stmt]:
    """Hand the comments above a statement that disappears on to what takes its place."""
    above = getattr(gone, "above", [])
    if body and above:
        body[0].above = [*above, *getattr(body[0], "above", [])]  # type: ignore[attr-defined]  # see comments.py
    return body
