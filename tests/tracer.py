"""Counts attention in an eager run, by following data from products through softmaxes to products.

It knows nothing of the recogniser: it sees the ATen calls of one forward pass, below autograd, and marks memory. A
product of two computed values is a score; a softmax of scores gives weights; weights that enter another product make
that softmax an attention. Fused operators count as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {"mm", "bmm", "baddbmm", "addmm"}
_SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax"}
_OPAQUE = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd", "flex_attention"}
_ELEMENTWISE = """add sub mul div neg where masked_fill maximum minimum clamp clamp_min tanh exp abs _to_copy clone copy
    native_dropout dropout nan_to_num fill masked_scatter tril triu"""
_MOVES = """view _unsafe_view reshape expand permute transpose t unsqueeze squeeze alias detach slice select split
    split_with_sizes unbind as_strided unfold roll repeat index_put cat stack constant_pad_nd index index_select gather
    slice_scatter select_scatter"""
_SOFTMAX_PARTS = "sum logsumexp"
_FOLLOWED = frozenset(re.findall(r"\w+", f"{_ELEMENTWISE} {_MOVES} {_SOFTMAX_PARTS}"))


MAX_HEADS = 8
"""Linear maps of at most this width may mix heads; wider ones make something new."""


@dataclass
class Softmax:
    """One softmax of the run: the module it ran in, and whether it became the weights of an attention."""

    layer: str
    attention: bool = False
    fused: bool = False


@dataclass
class AttentionTracer(TorchDispatchMode):
    """Follows marks by memory: a view shares its base's marks."""

    weights: set[int]
    softmaxes: list[Softmax] = field(default_factory=list)
    scores: set[int] = field(default_factory=set)
    probs: dict[int, set[int]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    supports_higher_order_operators = True

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.kept += results  # memory that is never freed is never used twice
        if name.startswith("_scaled_dot_product") or name in _OPAQUE:
            self.softmaxes.append(Softmax(self.path[-1] if self.path else "", attention=True, fused=True))
        elif name.removesuffix("_") in _PRODUCTS:
            self._product(inputs[-2:], results[0])
        elif name in _SOFTMAX:
            self._softmax(inputs[0], results[0])
        elif name == "convolution" and inputs[1].shape[:2].numel() <= MAX_HEADS**2 and inputs[1].shape[2:].numel() == 1:
            self._follow(inputs[:1], results)  # talking heads, written as a convolution
        elif name.removesuffix("_") in _FOLLOWED:
            self._follow(inputs, results)
        return out

    def _product(self, pair: list[Tensor], result: Tensor) -> None:
        left, right = (_memory(x) for x in pair)
        if left in self.weights or right in self.weights:
            if max(min(x.shape[-2:]) for x in pair if _memory(x) in self.weights) <= MAX_HEADS:
                self._follow(pair, [result])  # talking heads: scores or weights are mixed across heads
            return
        found = self.probs.get(left, set()) | self.probs.get(right, set())
        for index in found:
            self.softmaxes[index].attention = True
        if not found:
            self.scores.add(_memory(result))

    def _softmax(self, scores: Tensor, result: Tensor) -> None:
        self.softmaxes.append(Softmax(self.path[-1] if self.path else ""))
        if _memory(scores) in self.scores:
            self.probs[_memory(result)] = {len(self.softmaxes) - 1}

    def _follow(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        memories = [_memory(x) for x in inputs]
        if memories and self.weights.issuperset(memories):  # a cast or a view of a weight is one
            self.weights |= {_memory(x) for x in results}
        probs = set().union(*(self.probs.get(m, set()) for m in memories))
        for result in results:
            if any(m in self.scores for m in memories):
                self.scores.add(_memory(result))
            if probs:
                self.probs[_memory(result)] = self.probs.get(_memory(result), set()) | probs


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> list[Softmax]:
    """Return every softmax and fused attention that ``model(*args, **kwargs)`` runs, in order."""
    held = [*model.parameters(), *model.buffers()]
    tracer = AttentionTracer({_memory(x) for x in held})
    written_out = mock.patch("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.no_grad(), written_out, _paths(model, tracer.path), tracer:
        model(*args, **kwargs)
    return tracer.softmaxes


@contextmanager
def _paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep ``path`` at the modules that are running."""
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        path.append(names.get(module, path[-1] if path else ""))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        path.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
