"""Inline calls of small functions of a template: the emitted kernel reads from top to bottom."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping
from typing import Any

from attnrewrite.kernels.generation.dead import names_read
from attnrewrite.kernels.generation.fold import Fold


class Inline:
    """Replaces statements ``x = f(...)`` and ``x, y = f(...)`` by the body of f, for the functions in ``known``.

    A function may be inlined if its only ``return`` is its last statement. Its local names must not be names of the
    caller that mean something else: that is an error of the template.
    """

    def __init__(self, known: Mapping[str, ast.FunctionDef]) -> None:
        self.known = known

    def function(self, node: ast.FunctionDef) -> None:
        """Inline every call in a function, in place."""
        own = _bound(node.body) | {argument.arg for argument in node.args.args}
        node.body = self._block(node.body, own)

    def _block(self, body: list[ast.stmt], own: set[str]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            for part in ("body", "orelse"):
                if isinstance(getattr(statement, part, None), list):
                    setattr(statement, part, self._block(getattr(statement, part), own))
            call = statement.value if isinstance(statement, ast.Assign) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in self.known:
                assert isinstance(statement, ast.Assign)
                found += self._expanded(statement, call, own)
            else:
                found.append(statement)
        return found

    def _expanded(self, statement: ast.Assign, call: ast.Call, own: set[str]) -> list[ast.stmt]:
        assert isinstance(call.func, ast.Name)
        function = copy.deepcopy(self.known[call.func.id])
        names = [argument.arg for argument in function.args.args]
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
        targets = _names(statement.targets[0])
        body = Fold({name: x.value for name, x in given.items() if isinstance(x, ast.Constant)}).block(function.body)
        if isinstance(body[0], ast.Expr):  # its docstring
            body = body[1:]
        before, renamed = _arguments(given, body, targets)
        renamed |= _result(body, names, targets, given)
        fresh = (_bound(body) - set(renamed)) | _bound(before)
        clash = fresh & (own - set(targets))
        if clash:
            raise ValueError(f"{function.name}: the names {sorted(clash)} mean something else in its caller")
        last = body.pop()
        assert isinstance(last, ast.Return), f"{function.name} does not end with return"
        assert last.value is not None
        expanded = [*before, *(_Rename(renamed).visit(x) for x in body)]
        value = _Rename(renamed).visit(last.value)
        if ast.unparse(value) != ast.unparse(statement.targets[0]):
            expanded.append(ast.Assign(statement.targets, value, lineno=statement.lineno))
        if expanded and getattr(statement, "above", []):
            expanded[0].above = [*statement.above, *getattr(expanded[0], "above", [])]  # type: ignore[attr-defined]
        return self._block(expanded, own | fresh)


def _arguments(
    given: Mapping[str, ast.expr], body: list[ast.stmt], targets: list[str]
) -> tuple[list[ast.stmt], dict[str, ast.expr]]:
    """Return what binds arguments that hold a call or are changed, and what stands for the other ones."""
    before: list[ast.stmt] = []
    renamed: dict[str, ast.expr] = {}
    changed = _bound(body)
    for name, value in given.items():
        simple = not any(isinstance(x, ast.Call) for x in ast.walk(value))
        if simple and (name not in changed or ast.unparse(value) in targets):
            renamed[name] = value
        elif ast.unparse(value) != name:
            before.append(ast.Assign([ast.Name(name, ast.Store())], value, lineno=0))
    return before, renamed


def _result(
    body: list[ast.stmt], names: list[str], targets: list[str], given: Mapping[str, ast.expr]
) -> dict[str, ast.expr]:
    """Let a local name that is returned have the caller's name for it."""
    last = body[-1]
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Name) or len(targets) != 1:
        return {}
    name = last.value.id
    late = name not in _bound(body[:-2])  # what the arguments stand for has been read by then
    free = late or all(targets[0] not in names_read(x) for x in given.values())
    return {name: ast.Name(targets[0], ast.Load())} if free and name not in names else {}


class _Rename(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> Any:  # named by ast
        value = self.names.get(node.id)
        if value is None:
            return node
        return ast.Name(value.id, node.ctx) if isinstance(value, ast.Name) else copy.copy(value)


def _bound(body: list[ast.stmt]) -> set[str]:
    return {
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _names(target: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
