"""What the kernels of the dense family compute, in plain PyTorch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnrewrite.kernels import strips
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.launch import Gradients, Wanted
from attnrewrite.kernels.dense.selective import Selection, SelectiveGradients
from attnrewrite.kernels.selective.backward import gradients
from attnrewrite.kernels.selective.ballot import Ballot, attend
from attnrewrite.kernels.ssa.reference import scaled, through_scaled
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.visibility import full_precision


def plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output as the kernels do; of the log-sum-exp, which only they read, no more than the memory."""
    query, value = _warmed(call)
    with full_precision(call.query.device):
        out = strips.forward(query, call.key, value, call.mask, _how(call))
    return out, out.new_empty(out.shape[:3], dtype=torch.float32)


def plain_backward(call: Call, out: Tensor, upstream: Tensor, wanted: Wanted) -> Gradients:
    """Return the gradients of ``sum(upstream * out)``."""
    query, value = _warmed(call)
    with full_precision(call.query.device):
        found = strips.backward(upstream, query, call.key, value, out, call.mask, _how(call), wanted.bias)
    by_key, others = found.key.to(call.key.dtype), (found.bias, found.sinks, found.slopes if wanted.slopes else None)
    if call.query_temperature is None or call.value_temperature is None:
        return Gradients(found.query.to(query.dtype), by_key, found.value.to(value.dtype), None, None, *others)
    by_query, by_warmth = through_scaled(found.query, call.query, call.query_temperature)
    by_value, by_gain = through_scaled(found.value, call.value, call.value_temperature)
    return Gradients(by_query, by_key, by_value, by_warmth, by_gain, *others)


def plain_selective_forward(call: Call, who: Selection, recent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the votes as the kernels do."""
    assert call.strength is not None
    with full_precision(call.query.device):
        out, received = attend(
            call.query, call.key, call.value, call.strength, call.mask, _ballot(call, who), who.earlier, recent=recent
        )
    return out, out.new_empty(out.shape[:3], dtype=torch.float32), received


def plain_selective_backward(
    call: Call, who: Selection, out: Tensor, upstream: Tensor, later: Tensor, wanted: Wanted
) -> SelectiveGradients:
    """Return the gradients as the kernels do."""
    assert call.strength is not None
    tensors = (call.query, call.key, call.value, call.strength, out, call.mask)
    with full_precision(call.query.device):
        found = gradients(upstream, later, *tensors, _ballot(call, who), who.earlier, bias_needs_grad=wanted.bias)
    slopes = found.slopes if wanted.slopes else None
    dense = Gradients(found.query, found.key, found.value, None, None, found.bias, found.sinks, slopes)
    return SelectiveGradients(dense, found.gamma, found.votes, found.selector)


def _how(call: Call) -> Options:
    return call.how if call.seed is None else dataclasses.replace(call.how, seed=int(call.seed))


def _ballot(call: Call, who: Selection) -> Ballot:
    position = call.how.offset if who.position is None else who.position
    return Ballot(_how(call), who.head, position, who.selector, who.protected)


def _warmed(call: Call) -> tuple[Tensor, Tensor]:
    if call.query_temperature is None or call.value_temperature is None:
        return call.query, call.value
    return scaled(call.query, call.query_temperature), scaled(call.value, call.value_temperature)
