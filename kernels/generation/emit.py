"""Emit a kernel: a template's function for given flags, as the text of one self-contained file."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.util
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from attnrewrite.kernels.generation.comments import LINE, parse, render
from attnrewrite.kernels.generation.dead import names_read, remove_dead
from attnrewrite.kernels.generation.fold import Fold
from attnrewrite.kernels.generation.inline import Inline

Flag = bool | int | str
TEMPLATES = "attnrewrite.kernels.templates"
TUNED = ("BLOCK_", "DESCRIPTORS")
"""Constexpr parameters whose names begin so are chosen by tuning and stay parameters; all other ones are flags."""


@dataclass(frozen=True)
class Emitted:
    """A kernel as source. ``digest`` names what it does: comments and layout are not part of it."""

    name: str
    text: str
    digest: str
    parameters: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The name of its file, without suffix."""
        return f"{self.name}_{self.digest[:16]}"


def emit(template: str, name: str, flags: Mapping[str, Flag]) -> Emitted:
    """Specialise function ``name`` of the module ``template`` of ``kernels/templates`` for ``flags``.

    Raises ValueError where the flags are not those of the function.
    """
    return _emit(template, name, tuple(sorted(flags.items())))


@functools.lru_cache(maxsize=1024)
def _emit(template: str, name: str, flags: tuple[tuple[str, Flag], ...]) -> Emitted:
    given = dict(flags)
    functions, constants = _definitions(template)
    kernel = copy.deepcopy(functions[name])
    _check(kernel, given)
    kernel.body = Fold(given).block(kernel.body)
    Inline(functions).function(kernel)
    remove_dead(kernel)
    left = sorted(functions.keys() & names_read(kernel))
    if left:
        raise ValueError(f"{name}: {left} are called inside expressions; give the result a name")
    kernel.args.args = [x for x in kernel.args.args if x.arg not in given and x.arg in names_read(kernel)]
    used = names_read(kernel)
    body: list[ast.stmt] = [*(constant for key, constant in constants.items() if key in used), kernel]
    kernel.above = ["", ""]  # type: ignore[attr-defined]  # see comments.py
    digest = hashlib.sha256(ast.dump(ast.Module(_undocumented(body), [])).encode()).hexdigest()
    text = "\n".join([*_legend(template, name, given, digest), *render(body), ""])
    return Emitted(name, text, digest, tuple(argument.arg for argument in kernel.args.args))


def flags_of(template: str, name: str) -> tuple[str, ...]:
    """Return the flags of a template's function."""
    functions, _ = _definitions(template)
    return _flags(functions[name])


@functools.cache
def _definitions(template: str) -> tuple[dict[str, ast.FunctionDef], dict[str, ast.stmt]]:
    """Return the functions and constants of a template and of those that it imports from."""
    spec = importlib.util.find_spec(f"{TEMPLATES}.{template}")
    assert spec is not None
    assert spec.origin is not None
    functions: dict[str, ast.FunctionDef] = {}
    constants: dict[str, ast.stmt] = {}
    for statement in parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(TEMPLATES + "."):
            others, values = _definitions(str(statement.module).removeprefix(TEMPLATES + "."))
            functions |= others
            constants |= values
        elif isinstance(statement, ast.FunctionDef):
            functions[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            constants[statement.targets[0].id] = statement
    return functions, constants


def _flags(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(
        x.arg
        for x in function.args.args
        if x.annotation is not None and ast.unparse(x.annotation) == "tl.constexpr" and not x.arg.startswith(TUNED)
    )


def _check(function: ast.FunctionDef, given: Mapping[str, Flag]) -> None:
    wanted = set(_flags(function))
    if wanted != set(given):
        missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
        raise ValueError(f"{function.name}: flags {missing} are missing, {unknown} are unknown")


def _undocumented(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements without docstrings."""
    bare = copy.deepcopy(body)
    for statement in bare:
        if isinstance(statement, ast.FunctionDef) and ast.get_docstring(statement) is not None:
            del statement.body[0]
    return bare


def _legend(template: str, name: str, flags: Mapping[str, Flag], digest: str) -> Iterator[str]:
    yield f'"""{name}, specialised by attnrewrite from its template {template}.py.'
    yield ""
    settings = ", ".join(f"{key} = {value!r}" for key, value in flags.items())
    yield from textwrap.wrap(settings, LINE, break_long_words=False)
    yield ""
    yield f"Digest {digest}."
    yield '"""'
    yield ""
    yield "import triton"
    yield "import triton.language as tl"
    yield ""
