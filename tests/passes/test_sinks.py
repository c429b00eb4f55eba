"""Sinks: one more logit per head, which takes weight and gives no value, as models write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import HEADS, WIDTH, Attention, compiled_like_eager, rewritten
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report, Site

LENGTH = 6


def per_head(model: WithSink, scores: Tensor, _: Tensor) -> Tensor:
    return model.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)


COLUMNS: dict[str, Callable[[WithSink, Tensor, Tensor], Tensor]] = {
    "per head": per_head,
    "repeated": lambda m, scores, x: m.sinks[None, :, None, None].repeat(scores.shape[0], 1, scores.shape[2], 1),
    "computed": lambda m, scores, x: per_head(m, scores, x) if False else _column(F.softplus(m.sinks) - 1, scores),
    "one for all": lambda m, scores, x: m.sinks[:1].sum().expand(*scores.shape[:-1], 1),
    "cast": lambda m, scores, x: per_head(m, scores, x).double().to(scores.dtype),
    "a zero": lambda m, scores, x: scores.new_zeros(*scores.shape[:-1], 1),
}
REFUSED: dict[str, Callable[[WithSink, Tensor, Tensor], Tensor]] = {
    "by query": lambda m, scores, x: (m.sinks * x[..., :1]).mT[..., None],
    "by sequence": lambda m, scores, x: _column((m.sinks * x[:, 0, :1])[..., None, None], scores),
    "by place": lambda m, scores, x: torch.arange(LENGTH).to(scores)[:, None].expand(*scores.shape[:-1], 1),
}


def _column(sinks: Tensor, scores: Tensor) -> Tensor:
    sinks = sinks.view(-1, 1, 1) if sinks.dim() == 1 else sinks
    return sinks.expand(*scores.shape[:-1], 1)
