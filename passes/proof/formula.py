"""Evaluate the normal form of a site: the formula that every rewrite starts from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from attnrewrite.passes.attention.form import Attention, Scores
from attnrewrite.passes.graph.axes import Symbol, arrange, flat
from attnrewrite.passes.graph.nodes import op, shape
from attnrewrite.passes.proof.replay import Inputs, Sizes


def formula(site: Attention, sizes: Sizes, inputs: Inputs) -> torch.Tensor:
    """Return the site's result on test inputs, in the layout of its output."""
    size = sizes.__getitem__
    operands = inputs.operands
    q = arrange(operands["query"], site.query.layout, site.query_layout, size)
    k, v = _whole(site, "key", inputs, size), _whole(site, "value", inputs, size)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = site.scores.alpha * (q @ k.mT)  # [B, H, L, S]
    scores = _scale_and_terms(site, site.scores, scores, inputs, size)
    if site.scores.floor is not None:
        scores = scores.clamp(min=site.scores.floor)
    zero = site.output is site.anchor or op(site.anchor) == "_safe_softmax" or site.guarded
    empty = (scores == -math.inf).all(-1, keepdim=True) & zero
    probs = _softmax(site, scores, inputs, size).masked_fill(empty, 0.0)
    for gate in site.gates:
        factor = arrange(inputs.nodes[gate.node], gate.layout, site.mask_layout(gate.layout), size)
        probs = probs / factor if gate.divide else probs * factor
    return arrange(probs @ v, site.result_layout, site.output_layout, size)


def _whole(site: Attention, role: str, inputs: Inputs, size: Callable[[Symbol], int]) -> torch.Tensor:
    """Return the keys or values, blocks joined."""
    want = site.key_layout if role == "key" else site.value_layout
    parts = []
    for block, (operand, cols) in enumerate(site.blocks(role)):
        wanted = (*want[:2], flat(cols), want[3])
        parts.append(arrange(inputs.operands[f"{role}{block}"], operand.layout, wanted, size))
    return torch.cat(parts, 2)


def _softmax(site: Attention, scores: torch.Tensor, inputs: Inputs, size: Callable[[Symbol], int]) -> torch.Tensor:
    sink = site.scores.sink
    if sink is None:
        return torch.softmax(scores, -1)
    column = arrange(inputs.nodes[sink.node], sink.layout, site.mask_layout(sink.layout), size)
    return torch.softmax(torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1), -1)[..., :-1]


def _scale_and_terms(
    site: Attention, form: Scores, scores: torch.Tensor, inputs: Inputs, size: Callable[[Symbol], int]
) -> torch.Tensor:
    for node, layout, divide in form.factors:
        factor = inputs.nodes[node]
        factor = arrange(factor, layout, site.mask_layout(layout), size) if shape_known(node) else factor.squeeze()
        scores = scores / factor if divide else scores * factor
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if form.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -math.inf)
    for term in form.terms:
        value = arrange(inputs.nodes[term.node], term.layout, site.mask_layout(term.layout), size)
        if term.kind == "fill":
            scores = scores.masked_fill(value.bool() if term.when else ~value.bool(), term.value)
        elif value.dtype == torch.bool:
            scores = scores + term.weight * value.double()
        else:
            scores = scores + term.weight * value
    return scores


def shape_known(node: fx.Node) -> bool:
    """Whether a tensor scale is a tensor (and not a number computed in the graph)."""
    return isinstance(node.meta.get("val"), torch.Tensor) and len(shape(node)) > 0
