"""Remove what nobody reads: assignments without effect."""

from __future__ import annotations

import ast


def names_read(node: ast.AST) -> set[str]:
    """Return every name that is read."""
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}


def remove_dead(function: ast.FunctionDef) -> None:
    """Remove assignments to names that are never read, until there are none. What is assigned has no side effects."""
    while True:
        read = names_read(function)
        before = ast.dump(function)
        function.body = _alive(function.body, read)
        if ast.dump(function) == before:
            return


def _alive(body: list[ast.stmt], read: set[str]) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for statement in body:
        for part in ("body", "orelse"):
            if isinstance(getattr(statement, part, None), list):
                setattr(statement, part, _alive(getattr(statement, part), read))
        if not isinstance(statement, ast.Assign) or _targets(statement.targets[0]) & read:
            kept.append(statement)
    return kept


def _targets(target: ast.expr) -> set[str]:
    """Return the names that an assignment binds; with anything else among them, a name that is always read."""
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return {part.id if isinstance(part, ast.Name) else "tl" for part in parts}
