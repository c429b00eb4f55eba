"""Small questions about one FX node: its op, its value, its place in the model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import fx

_ROOT = r"^L\[.*?\](\.|$)|^L__self__(\.|$|_)"
_MODULES = r"_modules\[['\"](.+?)['\"]\]|\[(\d+)\]"
_FRAME = r'File "(.+?)", line (\d+)'


def op(node: object) -> str:
    """Return the ATen op's base name without the trailing underscore of in-place forms, or "" for anything else."""
    if isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload):
        return _base_name(node.target.name())  # type: ignore[no-untyped-call]  # it returns a str
    return ""


@functools.cache
def _base_name(name: str) -> str:
    base = name.removeprefix("aten::").partition(".")[0]
    return base.removesuffix("_") if base.endswith("_") and not base.endswith("__") else base


def is_node(value: object) -> TypeGuard[fx.Node]:
    """Whether ``value`` is a node."""
    return isinstance(value, fx.Node)


WEIGHT = "attnrewrite_weight"
"""Meta key of the placeholders that are the model's parameters and buffers."""


NAME = "attnrewrite_name"
"""Meta key of the placeholders whose qualified name in the model is known."""

NUMBER = "attnrewrite_number"
"""Meta key of the placeholders that stand for one number, which the model's code holds."""


def is_weight(node: fx.Node) -> bool:
    """Whether ``node`` is a parameter or buffer of the model, or a view of one."""
    while op(node) in ("t", "transpose", "permute", "mT", "numpy_T", "view", "expand", "to", "_to_copy", "detach"):
        node = node.args[0]  # type: ignore[assignment]  # a tensor by schema
    return node.op == "get_attr" or WEIGHT in node.meta


def tensor(node: fx.Node) -> torch.Tensor | None:
    """Return the fake tensor that the node computes, or None."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the node's shape: ints and SymInts."""
    value = tensor(node)
    if value is None:
        raise TypeError(f"{node} is no tensor")
    return tuple(value.shape)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def held(node: fx.Node) -> Any:
    """Return what a ``get_attr`` node reads from its graph module, or None."""
    value: Any = node.graph.owning_module if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def same_value(a: object, b: object, depth: int = 8, read: Callable[[object], object] = lambda value: value) -> bool:
    """Whether two nodes, or literals, compute the same by construction: equal operators on equal inputs.

    ``read`` maps a value to one that stands for it.
    """
    a, b = read(a), read(b)
    if a is b:
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_value(x, y, depth, read) for x, y in zip(a, b, strict=True))
    if not (is_node(a) and is_node(b)) or depth == 0:
        return not (is_node(a) or is_node(b)) and type(a) is type(b) and a == b
    if NUMBER in a.meta or NUMBER in b.meta:
        return bool(a.meta.get(NUMBER) == b.meta.get(NUMBER))
    first, second = held(a), held(b)
    if type(first) is torch.Tensor and type(second) is torch.Tensor:
        return first.dtype == second.dtype and torch.equal(first, second)
    pure = isinstance(a.target, torch._ops.OpOverload) and (not a.target._schema.is_mutable or op(a) == "detach")
    if a.target is not b.target or not pure or torch.Tag.nondeterministic_seeded in a.target.tags:  # type: ignore[union-attr]  # an operator
        return False
    pairs = zip([*a.args, *a.kwargs.values()], [*b.args, *b.kwargs.values()], strict=False)
    sizes = len(a.args) == len(b.args) and a.kwargs.keys() == b.kwargs.keys()
    return sizes and all(same_value(x, y, depth - 1, read) for x, y in pairs)


def layer_path(node: fx.Node) -> str:
    """Return the path of the innermost module that the node was traced in, without the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(next(reversed(stack.values()))[0])


def clean_path(path: str) -> str:
    """Turn ``L['self'].model.layers[0].attn`` and ``L['self']._modules['model']`` forms into plain paths."""
    path = re.sub(_ROOT, "", path)
    path = re.sub(_MODULES, lambda m: "." + (m.group(1) or m.group(2)), path)
    return re.sub(r"\.+", ".", path).strip(".").removeprefix("_orig_mod.").removeprefix("_orig_mod")


def common_layer(nodes: list[fx.Node]) -> str:
    """Return the path of the innermost module that holds all of ``nodes``."""
    paths = [layer_path(node).split(".") for node in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def source_line(node: fx.Node) -> str:
    """Return ``file.py:line`` of the model's code that made the node; the file with its last folder."""
    frames = re.findall(_FRAME, node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if "/torch/nn/" not in frame[0]] or frames
    if not frames:
        return ""
    file, line = frames[-1]
    return "/".join(file.replace("\\", "/").split("/")[-2:]) + f":{line}"
