"""Comments of source, kept at the syntax tree: ``above`` and ``beside`` of a statement or an argument."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

LINE = 120


def parse(source: str) -> ast.Module:
    """Parse source; every statement and argument gets ``above: list[str]`` and ``beside: str``.

    A line above is a comment, or empty where the source has an empty line.
    """
    tree = ast.parse(source)
    comments = {
        token.start[0]: (token.line[: token.start[1]].strip() == "", token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.arg):
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
            node.above = list(reversed(list(_above(first, lines, comments))))  # type: ignore[union-attr]  # ours
            alone, text = comments.get(node.end_lineno or node.lineno, (True, ""))
            node.beside = "" if alone or hasattr(node, "body") else text  # type: ignore[union-attr]  # ours
    return tree


def _above(first: int, lines: list[str], comments: dict[int, tuple[bool, str]]) -> Iterator[str]:
    for number in range(first - 1, 0, -1):
        alone, text = comments.get(number, (False, ""))
        if alone:
            yield text
        else:
            if not lines[number - 1].strip():
                yield ""
            return


def render(body: list[ast.stmt], indent: int = 0) -> Iterator[str]:
    """Yield the lines of a block, comments included."""
    for number, statement in enumerate(body):
        pad = " " * 4 * indent
        above: list[str] = getattr(statement, "above", [])
        yield from (f"{pad}{line}".rstrip() for line in (above if number else [x for x in above if x]))
        if isinstance(statement, ast.FunctionDef):
            yield from _function(statement, pad, indent)
        elif isinstance(statement, ast.For | ast.While | ast.If):
            yield from _compound(statement, pad, indent)
        else:
            beside = getattr(statement, "beside", "")
            *lines, last = _simple(statement, pad)
            yield from lines
            yield last + (f"  {beside}" if beside else "")


def _simple(statement: ast.stmt, pad: str) -> list[str]:
    """Return the lines of a statement; the arguments of a call that is too long get a line each."""
    whole = pad + ast.unparse(statement)
    call = statement.value if isinstance(statement, ast.Assign | ast.AugAssign | ast.Expr) else None
    if len(whole) <= LINE or not isinstance(call, ast.Call):
        return whole.splitlines()
    arguments = [ast.unparse(x) for x in (*call.args, *call.keywords)]
    head = whole.removesuffix(f"({', '.join(arguments)})")
    return [f"{head}(", *(f"{pad}    {x}," for x in arguments), f"{pad})"]


def _function(node: ast.FunctionDef, pad: str, indent: int) -> Iterator[str]:
    for decorator in node.decorator_list:
        yield f"{pad}@{ast.unparse(decorator)}"
    yield f"{pad}def {node.name}("
    for argument in node.args.args:
        yield from (f"{pad}    {line}" for line in getattr(argument, "above", []) if line)
        beside = getattr(argument, "beside", "")
        yield f"{pad}    {ast.unparse(argument)}," + (f"  {beside}" if beside else "")
    yield f"{pad}):"
    yield from _documented(node.body, indent + 1)


def _documented(body: list[ast.stmt], indent: int) -> Iterator[str]:
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield f'{" " * 4 * indent}"""{first.value.value.strip()}"""'
        body = body[1:]
    yield from render(body, indent)


def _compound(node: ast.For | ast.While | ast.If, pad: str, indent: int) -> Iterator[str]:
    if isinstance(node, ast.For):
        yield f"{pad}for {ast.unparse(node.target)} in {ast.unparse(node.iter)}:"
    else:
        yield f"{pad}{'if' if isinstance(node, ast.If) else 'while'} {ast.unparse(node.test)}:"
    yield from render(node.body, indent + 1)
    if node.orelse:
        yield f"{pad}else:"
        yield from render(node.orelse, indent + 1)
