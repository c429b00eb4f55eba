"""The skeleton of a traced function: its operators in order, and for each what has to be equal in a match.

Literals that follow from sizes are free: they are found by tracing the function at two sets of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves

from attnrewrite.passes.graph.axes import same
from attnrewrite.passes.graph.constants import constant
from attnrewrite.passes.graph.nodes import is_node, op, tensor

_SAME = {"contiguous", "clone", "alias"}
_RESHAPES = {"view", "reshape", "_unsafe_view"}
_DIMS = {"dim", "dim0", "dim1", "dims"}
COMMUTATIVE = {"mul", "add", "maximum", "minimum", "logical_and", "bitwise_and", "logical_or", "bitwise_or"}


class _Mark:
    """A leaf that is no literal."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


FREE = _Mark("free")
"""A literal that depends on sizes or on the device."""
TENSOR = _Mark("tensor")
"""A tensor operand."""


@dataclass(frozen=True)
class Label:
    """What a node does: its operator, and its literals in order."""

    name: str
    overload: str
    leaves: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A traced function: ``steps`` are the nodes between the inputs and the output, in order."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    labels: tuple[Label, ...]


def trace(
    function: Callable[..., Tensor], values: Sequence[Tensor], device: torch.device | str | None = None
) -> Skeleton:
    """Trace a function of tensors like ``values``, on ``device``, into pre-dispatch ATen.

    Raises what the function raises, and TypeError where it does not return one tensor.
    """
    mode, fakes = _fakes(values, torch.device(device or "cpu"))
    with mode:
        traced = make_fx(
            lambda *args: function(*args), pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
        )
        module = traced(*fakes)
    (result,) = module.graph.find_nodes(op="output")[0].args
    if not is_node(result) or tensor(result) is None:
        raise TypeError("the function does not return one tensor")
    inputs = tuple(module.graph.find_nodes(op="placeholder"))
    reached = _ancestors(behind(result), set(inputs))
    steps = tuple(node for node in module.graph.nodes if node in reached)
    return Skeleton(module, inputs, steps, tuple(label(step) for step in steps))


def _fakes(values: Sequence[Tensor], device: torch.device) -> tuple[FakeTensorMode, list[Tensor]]:
    """Return fake tensors and their mode: new ones, but where sizes are symbolic, ``values`` themselves."""
    for value in values:
        if isinstance(value, FakeTensor) and not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return value.fake_mode, list(values)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return mode, [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in values]


def _ancestors(root: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    found, todo = set[fx.Node](), [root]
    while todo:
        node = todo.pop()
        if node not in found and node not in stop:
            found.add(node)
            todo += [behind(x) for x in operands(node) if is_node(x) and leaf(x) is TENSOR]
    return found


def template(first: Skeleton, second: Skeleton) -> tuple[Label, ...] | None:
    """Return the labels with free literals where the two differ, or None where they are not the same function."""
    if len(first.steps) != len(second.steps):
        return None
    merged = []
    for a, b in zip(first.labels, second.labels, strict=True):
        if (a.name, a.overload, len(a.leaves)) != (b.name, b.overload, len(b.leaves)):
            return None
        leaves = tuple(x if _equal(x, y) else FREE for x, y in zip(a.leaves, b.leaves, strict=True))
        merged.append(Label(a.name, a.overload, leaves))
    return tuple(merged)


def behind(node: Any) -> Any:
    """Return the value that ``node`` is a copy of, where it only changes memory."""
    while op(node) in _SAME and is_node(node.args[0]):
        node = node.args[0]
    return node


def operands(node: fx.Node) -> list[Any]:
    """Return all arguments, flat, keywords in order of their names."""
    leaves: list[Any] = tree_leaves(_arguments(node))
    return leaves


def flattened(node: fx.Node) -> tuple[list[Any], Any]:
    """Return ``operands`` and how to put (args, kwargs) together again."""
    return tree_flatten(_arguments(node))


def _arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    return list(node.args), dict(sorted(node.kwargs.items()))


def label(node: fx.Node) -> Label:
    """Describe a node; dims count from the front."""
    name = op(node)
    target = node.target
    overload = str(getattr(target, "_overloadname", ""))
    if not name:
        return Label(f"{node.op} {target}", "", ())
    args, kwargs = _arguments(node)
    schema = getattr(target, "_schema", None)
    for n, parameter in enumerate(schema.arguments[: len(args)] if schema is not None else ()):
        if parameter.name in _DIMS:
            args[n] = _from_front(node, args[n])
    kwargs = {key: _from_front(node, x) if key in _DIMS else x for key, x in kwargs.items()}
    leaves = tuple(leaf(x) for x in tree_leaves((args, kwargs)))
    return Label("reshape" if name in _RESHAPES else name, overload, leaves)


def _from_front(node: fx.Node, dims: Any) -> Any:
    value = tensor(node.args[0]) if node.args and is_node(node.args[0]) else None
    if value is None:
        return dims
    rank = value.dim() + (op(node) == "unsqueeze")
    if isinstance(dims, list | tuple):
        return [d % rank if isinstance(d, int) and rank else d for d in dims]
    return dims % rank if isinstance(dims, int) and not isinstance(dims, bool) and rank else dims


def leaf(value: Any) -> Any:
    """Return a literal, a number that a node stands for, a symbolic size, or TENSOR; a device is FREE."""
    if isinstance(value, torch.device):
        return FREE
    if not is_node(value):
        return value
    number = constant(value)
    if number is not None:
        return number
    held = value.meta.get("val")
    return TENSOR if held is None or isinstance(held, Tensor) else held


def fits(wanted: Label, found: Label) -> bool:
    """Whether ``found``, a label of a model's node, is what ``wanted`` asks for."""
    if (wanted.name, wanted.overload, len(wanted.leaves)) != (found.name, found.overload, len(found.leaves)):
        return False
    return all(_fit(a, b) for a, b in zip(wanted.leaves, found.leaves, strict=True))


def _fit(wanted: Any, found: Any) -> bool:
    if wanted is FREE:
        return found is not TENSOR
    return _equal(wanted, found)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, _Mark) or isinstance(b, _Mark):
        return a is b
    if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return bool(same(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or math.isclose(a, b, rel_tol=1e-6)  # numbers that tensors held may be rounded
    return bool(a == b)
