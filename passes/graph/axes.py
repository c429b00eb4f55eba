"""Named axes: every dim of a value is a product of index symbols, and layout operations only move them.

A layout is a tuple with one entry per dim; an entry is a tuple of symbols, outermost first. A dim that came from
folding batch and heads is ``(b, h)``; a broadcast dim is ``()``. When a view splits a symbol, the symbol keeps its
identity and gains parts, so layouts found earlier stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.passes.graph.nodes import argument, op, shape, tensor

Size = Any
"""An int or a SymInt."""


@dataclass(eq=False, repr=False)
class Symbol:
    """One index. ``parts`` are the symbols it was split into, outermost first; empty while it is whole."""

    name: str
    size: Size
    parts: tuple[Symbol, ...] = field(default=())

    def split(self, outer: Size, inner: Size) -> None:
        """Split into two symbols of the given sizes."""
        self.parts = (Symbol(self.name + "0", outer), Symbol(self.name + "1", inner))

    def __repr__(self) -> str:
        return f"{self.name}:{self.size}"


Dim = tuple[Symbol, ...]
Layout = tuple[Dim, ...]


class AxisError(Exception):
    """A layout operation cannot be expressed on index symbols."""


def flat(dim: Iterable[Symbol]) -> Dim:
    """Replace split symbols by their parts."""
    out: list[Symbol] = []
    for symbol in dim:
        out.extend(flat(symbol.parts) if symbol.parts else (symbol,))
    return tuple(out)


def flat_layout(layout: Layout) -> Layout:
    """Apply ``flat`` to every dim."""
    return tuple(flat(dim) for dim in layout)


def symbols(layout: Layout) -> Dim:
    """Return all symbols of a layout in order."""
    return tuple(symbol for dim in layout for symbol in flat(dim))


def size_of(dim: Iterable[Symbol]) -> Size:
    """Return the product of the symbols' sizes."""
    total: Size = 1
    for symbol in flat(dim):
        total = total * symbol.size
    return total


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for certain; adds no guard, and where a rewrite is traced no node."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    with disable_proxy_modes_tracing():
        return bool(statically_known_true(a == b))


def hint(size: Size) -> int:
    """Return the size seen while tracing."""
    return size if isinstance(size, int) else int(size.node.hint)


def fresh(node: fx.Node, names: Sequence[str]) -> Layout:
    """Give every dim of ``node`` one new symbol."""
    return tuple((Symbol(name, size),) for name, size in zip(names, shape(node), strict=True))


def reshape(layout: Layout, before: Sequence[Size], after: Sequence[Size]) -> Layout:
    """Carry ``layout`` of a tensor of shape ``before`` to its reshaped form of shape ``after``.

    Raises AxisError where the new shape cuts across symbols.
    """
    out: list[Dim] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = i, j
        p: Size = before[i] if i < len(before) else 1
        q: Size = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while not same(p, q):
            if hint(p) < hint(q) and i < len(before):
                p, i = p * before[i], i + 1
            elif hint(p) > hint(q) and j < len(after):
                q, j = q * after[j], j + 1
            else:
                raise AxisError(f"cannot relate shapes {tuple(before)} and {tuple(after)}")
        out.extend(_distribute([s for dim in layout[left:i] for s in flat(dim)], after[right:j]))
    return tuple(out)


def _distribute(line: list[Symbol], sizes: Sequence[Size]) -> list[Dim]:
    """Hand out the symbols of ``line``, in order, to dims of the given sizes."""
    dims: list[Dim] = []
    for size in sizes:
        taken: list[Symbol] = []
        while line and not (same(size_of(taken), size) and (taken or not same(line[0].size, 1))):
            taken.append(_take(line, taken, size))
        dims.append(tuple(taken))
    if line and dims:
        dims[-1] += tuple(line)
    if line and not dims and not all(same(s.size, 1) for s in line):
        raise AxisError("symbols left over")
    return dims


def _take(line: list[Symbol], taken: list[Symbol], size: Size) -> Symbol:
    have = size_of(taken)
    symbol = line.pop(0)
    if hint(have * symbol.size) <= hint(size):
        return symbol
    outer = _divide(size, have)
    inner = symbol.size // outer
    if not same(outer * inner, symbol.size):
        raise AxisError(f"{symbol} cannot be split by {size}")
    symbol.split(outer, inner)
    line.insert(0, symbol.parts[1])
    return symbol.parts[0]


def _divide(size: Size, by: Size) -> Size:
    out = size // by
    if not same(out * by, size):
        raise AxisError(f"{size} is not a multiple of {by}")
    return out


def broadcast(layout: Layout, operand: fx.Node) -> Layout:
    """Return the layout of one operand of an elementwise op whose result has ``layout``."""
    dims = shape(operand)
    tail = layout[len(layout) - len(dims) :]
    return tuple(() if same(n, 1) and not same(size_of(d), 1) else d for n, d in zip(dims, tail, strict=True))


# Layout ops: name -> (layout of the result, node) -> layout of the input; and the other way.

RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as"}
ALIASES = {"contiguous", "clone", "alias", "detach_", "lift_fresh_copy", "lift_fresh"}


def _order(node: fx.Node) -> list[int]:
    rank = len(shape(_input(node)))
    if op(node) == "permute":
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]  # a list of ints
    order = list(range(rank))
    if op(node) in ("t", "numpy_T", "mT"):
        a, b = (rank - 2, rank - 1) if rank > 1 else (0, 0)
    else:
        a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]  # ints by schema
    order[a], order[b] = order[b], order[a]
    return order


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise AxisError(f"{node} has no tensor input")
    return source


def _permute_back(layout: Layout, node: fx.Node) -> Layout:
    order = _order(node)
    out: list[Dim] = [()] * len(order)
    for to, source in enumerate(order):
        out[source] = layout[to]
    return tuple(out)


def _unsqueeze_back(layout: Layout, node: fx.Node) -> Layout:
    dim = int(node.args[1]) % len(layout)  # type: ignore[arg-type]  # int by schema
    return layout[:dim] + layout[dim + 1 :]


def _reshape_back(layout: Layout, node: fx.Node) -> Layout:
    return reshape(layout, shape(node), shape(_input(node)))


def _expand_back(layout: Layout, node: fx.Node) -> Layout:
    return broadcast(layout, _input(node))


def _full_slice(node: fx.Node) -> bool:
    return all(same(a, b) for a, b in zip(shape(node), shape(_input(node)), strict=True))


def _slice_back(layout: Layout, node: fx.Node) -> Layout:
    if not _full_slice(node):
        raise AxisError("a slice takes part of an axis")
    return layout


def _repeat_interleave_back(layout: Layout, node: fx.Node) -> Layout:
    dim = argument(node, 2, "dim")
    times = argument(node, 1, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        raise AxisError("repeat_interleave with unknown repeats")
    dim %= len(layout)
    inner = shape(_input(node))
    wide = (*inner[:dim], inner[dim], times, *inner[dim + 1 :])
    split = reshape(layout, shape(node), wide)
    return split[: dim + 1] + split[dim + 2 :]


def _repeat_back(layout: Layout, node: fx.Node) -> Layout:
    """Tell the copies of every axis, which lie outermost, from the axis itself."""
    inner, times = shape(_input(node)), list(node.args[1])  # type: ignore[arg-type]  # ints by schema
    if len(times) != len(inner):
        raise AxisError("repeat with new axes")
    wide = [size for pair in zip(times, inner, strict=True) for size in pair]
    return reshape(layout, shape(node), wide)[1::2]


_BACK: dict[str, Callable[[Layout, fx.Node], Layout]] = {
    **dict.fromkeys(RESHAPES | {"squeeze"}, _reshape_back),
    **dict.fromkeys(ALIASES, lambda layout, node: layout),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT"), _permute_back),
    "unsqueeze": _unsqueeze_back,
    "expand": _expand_back,
    "slice": _slice_back,
    "repeat_interleave": _repeat_interleave_back,
    "repeat": _repeat_back,
}


MOVES = frozenset(_BACK)
"""Operators that only move symbols, or change nothing."""


def backward(layout: Layout, node: fx.Node) -> tuple[fx.Node, Layout] | None:
    """If ``node`` only moves symbols (or changes nothing), return its input and the input's layout."""
    name = op(node)
    if name in ("to", "_to_copy", "type_as") and _keeps_dtype(node):
        return _input(node), layout
    if name not in _BACK:
        return None
    return _input(node), _BACK[name](layout, node)


def _keeps_dtype(node: fx.Node) -> bool:
    a, b = tensor(node), tensor(_input(node))
    return a is not None and b is not None and a.dtype == b.dtype and a.device == b.device


def forward(layout: Layout, node: fx.Node) -> Layout | None:
    """If ``node`` only moves symbols of its first input, return the result's layout."""
    name = op(node)
    if name in RESHAPES or name == "squeeze":
        return reshape(layout, shape(_input(node)), shape(node))
    if name in ALIASES or name in ("to", "_to_copy", "type_as"):
        return layout
    if name in ("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT"):
        return tuple(layout[d] for d in _order(node))
    if name == "unsqueeze":
        dim = int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]  # int by schema
        return (*layout[:dim], (), *layout[dim:])
    if name == "slice" and _full_slice(node):
        return layout
    return None


def small_shape(layout: Layout, sizes: dict[Symbol, int]) -> list[int]:
    """Return a shape with every symbol replaced by a test size."""
    return [prod(sizes[s] for s in flat(dim)) for dim in layout]


def arrange(value: torch.Tensor, have: Layout, want: Layout, sizes: Callable[[Symbol], Any]) -> torch.Tensor:
    """Bring ``value`` from layout ``have`` to ``want``; symbols that it lacks are expanded.

    ``sizes`` maps a symbol to its size. Used on real tensors by certificates and, traced, by the rewrites.
    """
    have, want = flat_layout(have), flat_layout(want)
    if have == want:
        return value
    line, target = symbols(have), symbols(want)
    if any(len(dim) != 1 for dim in have):
        value = value.reshape([sizes(s) for s in line])
    order = [line.index(s) for s in target if s in line]
    if order != list(range(len(order))):
        value = value.permute(order)
    for position, symbol in enumerate(target):
        if symbol not in line:
            value = value.unsqueeze(position)
    if any(s not in line for s in target):
        value = value.expand([sizes(s) for s in target])
    if any(len(dim) != 1 for dim in want):
        value = value.reshape([prod_of(sizes(s) for s in dim) for dim in want])
    return value


def prod_of(values: Iterable[Any]) -> Any:
    """Multiply ints and SymInts."""
    total: Any = 1
    for value in values:
        total = total * value
    return total
