"""Rotary position embedding, read from how a query is computed: which features are paired, and how many turn."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import fx

from attnrewrite.passes.attention.softmax import CASTS
from attnrewrite.passes.facts.provenance import Provenance, Trail
from attnrewrite.passes.graph.axes import RESHAPES, same
from attnrewrite.passes.graph.nodes import argument, is_node, op, shape, tensor

Rope = Literal["none", "half", "interleaved", "other"]
Piece = tuple[Literal["half", "interleaved"], int]
"""Features of a value: a run of them that begins at a number, or every second one from 0 or 1 on."""

_LINEAR_STEPS = {"neg", "mul", "add", "sub", "unsqueeze", "squeeze", "contiguous", "clone", *CASTS, *RESHAPES}
_MOVES = {"unsqueeze", "squeeze", "contiguous", "clone", "transpose", "permute", *CASTS, *RESHAPES}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_split"}
_TURNS = {"cos", "sin", "polar"}


def rope(trail: Trail, provenance: Provenance) -> tuple[Rope, Any]:
    """Return the kind of the rotary embedding on the way of ``trail``, and how many features it turns.

    half: feature n is paired with feature n + D/2. interleaved: features 2n and 2n + 1 are a pair. other: the query is
    multiplied by something that depends on positions, in a form that is not read.
    """
    turned = {}
    for node in trail.nodes:
        found = _joined(node, trail, provenance) or _complex(node)
        if found is not None:
            turned[found[1]] = (found[0], found[2])
    kinds = {kind for kind, _ in turned.values()}
    if len(kinds) == 1:
        return kinds.pop(), sum(width for _, width in turned.values())
    by_position = any(_turns(factor, provenance) for node in trail.nodes for factor in _factors(node, provenance))
    return ("other" if kinds or by_position else "none"), (None if kinds or by_position else 0)


def _joined(node: fx.Node, trail: Trail, provenance: Provenance) -> tuple[Rope, fx.Node, Any] | None:
    """Read a cat or stack of two parts whose features were swapped and multiplied by tables; a rest may follow."""
    parts = node.args[0] if op(node) in ("cat", "stack") else None
    if not isinstance(parts, list | tuple) or not 2 <= len(parts) <= 3:
        return None
    read = [_parts(part, provenance) for part in parts[:2]]
    pieces = [{piece for _, piece in found} for found, _ in read]
    every = sorted(pieces[0] | pieces[1])
    sources = {source for found, _ in read for source, _ in found}
    if len(sources) != 1 or len(every) != 2 or not all(pieces) or pieces[0] == {every[0]}:
        return None
    source, width = sources.pop(), shape(parts[0])[-1]
    (kind, first), (other, second) = every
    if kind != other or not same(second - first, 1 if kind == "interleaved" else width):
        return None
    if not (any(by for _, by in read) or _multiplied(node, trail, provenance)):
        return None
    neighbours = op(node) == "stack" and int(argument(node, 1, "dim", 0)) % len(shape(node)) == len(shape(node)) - 1
    turned: Rope = kind
    if kind == "half":
        turned = "other" if neighbours else "interleaved" if _deinterleaved(source) else "half"
    return turned, source, shape(source)[-1] if same(width, 1) and kind == "interleaved" else width * 2


def _parts(part: object, provenance: Provenance) -> tuple[set[tuple[fx.Node, Piece]], bool]:
    """Return the pieces that ``part`` is a linear combination of, and whether tables are multiplied in."""
    found, multiplied, seen = set[tuple[fx.Node, Piece]](), False, set[fx.Node]()
    todo = [part] if is_node(part) else []
    while todo and len(seen) < 40:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        piece = _piece(node)
        if piece is not None:
            found.add(piece)
        elif op(node) in _LINEAR_STEPS or (op(node) == "slice" and _is_whole(node)):
            multiplied |= bool(_factors(node, provenance))
            todo += provenance.carriers(node)
    return found, multiplied


def _piece(node: fx.Node) -> tuple[fx.Node, Piece] | None:
    """Read ``node`` as a run of features, or every second one."""
    picked = node.args[1] if node.target is operator.getitem else None
    part = node.args[0] if picked is not None else node
    source = _unsliced(part.args[0]) if is_node(part) and part.args else None
    if not is_node(part) or not is_node(source) or tensor(source) is None or tensor(node) is None:
        return None
    rank, name = len(shape(source)), op(part)
    if name == "slice":
        return _slice(part, source)
    if name == "select":
        return _taken(source, int(argument(part, 1, "dim", 0)) % rank, argument(part, 2, "index"))
    if name == "unbind" and picked is not None:
        return _taken(source, int(argument(part, 1, "dim", 0)) % rank, picked)
    if name in _SPLITS and picked is not None and int(argument(part, 2, "dim", 0)) % rank == rank - 1:
        sizes = argument(part, 1, "split_sizes")
        before = sizes[: int(picked)] if isinstance(sizes, list | tuple) else [shape(node)[-1]] * int(picked)  # type: ignore[arg-type]  # an int by getitem
        return _run(source, sum(before), node)
    return None


def _taken(source: fx.Node, dim: int, index: Any) -> tuple[fx.Node, Piece] | None:
    """Read one of two along an axis of size 2, which the features were viewed with."""
    rank = len(shape(source))
    if not same(shape(source)[dim], 2) or index not in (0, 1, -1, -2) or dim < rank - 2:
        return None
    if dim == rank - 1:
        return _behind(source), ("interleaved", int(index) % 2)
    return _behind(source), ("half", int(index) % 2 * shape(source)[-1])


def _slice(node: fx.Node, source: fx.Node) -> tuple[fx.Node, Piece] | None:
    dim, rank = int(argument(node, 1, "dim", 0)) % len(shape(source)), len(shape(source))
    width, step = shape(source)[-1], argument(node, 4, "step", 1)
    start = argument(node, 2, "start", 0) or 0
    if dim != rank - 1 or not isinstance(start, int):
        return None
    if step == 2 and start in (0, 1):
        return source, ("interleaved", start)
    return _run(source, start % width if start < 0 else start, node) if step == 1 else None


def _run(source: fx.Node, start: Any, node: fx.Node) -> tuple[fx.Node, Piece] | None:
    """Read ``node``, the features of ``source`` from ``start`` on: half of a viewed pair is every second feature."""
    if same(shape(source)[-1], 2) and same(shape(node)[-1], 1) and op(source) in RESHAPES:
        return _behind(source), ("interleaved", start)
    return source, ("half", start)


def _behind(node: fx.Node) -> fx.Node:
    """Return what was viewed as pairs."""
    for _ in range(4):
        if op(node) not in RESHAPES | CASTS or not is_node(node.args[0]):
            break
        node = node.args[0]
    return node


def _unsliced(node: object) -> object:
    while is_node(node) and op(node) == "slice" and _is_whole(node):
        node = node.args[0]
    return node


def _is_whole(node: fx.Node) -> bool:
    source = node.args[0]
    return is_node(source) and shape(source) == shape(node)


def _factors(node: fx.Node, provenance: Provenance) -> list[fx.Node]:
    """Return the tensors that ``node`` multiplies a projected value with, and that are none themselves."""
    if op(node) != "mul":
        return []
    return [x for x in node.args[:2] if is_node(x) and tensor(x) is not None and not provenance.mapped(x)]


def _multiplied(node: fx.Node, trail: Trail, provenance: Provenance) -> bool:
    """Whether the joined value is multiplied by a table, perhaps after it was folded."""
    passed = set(trail.nodes)
    for _ in range(4):
        users = [user for user in node.users if user in passed]
        if any(_factors(user, provenance) for user in users):
            return True
        moved = [user for user in users if op(user) in _MOVES]
        if not moved:
            return False
        node = moved[0]
    return False


def _deinterleaved(source: fx.Node) -> bool:
    """Whether the halves of ``source`` are the even and odd features: ``view(.., D/2, 2)`` with the axes swapped."""
    for _ in range(4):
        name, before = op(source), source.args[0] if source.args else None
        if not is_node(before) or tensor(before) is None:
            return False
        if name in ("transpose", "permute") and same(shape(before)[-1], 2) and len(shape(before)) > 4:
            return same(shape(source)[-2], 2)
        if name not in RESHAPES | CASTS | {"contiguous", "clone"}:
            return False
        source = before
    return False


def _complex(node: fx.Node) -> tuple[Rope, fx.Node, Any] | None:
    """Read a product of complex numbers: the parts of each number are neighbours."""
    if op(node) != "view_as_complex" or not is_node(node.args[0]):
        return None
    source = _behind(node.args[0])
    return "interleaved", source, shape(node)[-1] * 2


def _turns(factor: fx.Node, provenance: Provenance) -> bool:
    """Whether ``factor`` is a table over positions and features: cos or sin of something, or no parameter at all."""
    if isinstance(value := tensor(factor), torch.Tensor) and sum(not same(n, 1) for n in value.shape) < 2:
        return False
    todo, seen = [factor], set[fx.Node]()
    while todo and len(seen) < 60:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if op(node) in _TURNS:
            return True
        todo += provenance.inputs(node)
    return provenance.weight(factor) is None or not provenance.is_parameter(factor)
