"""The second stage of distillation: all weights learn from a copy of the model as it was before the conversion."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.observation import Batch, Observed, call, outputs_observed
from attnrewrite.passes.rules.sdpa import common_dtype, exact
from attnrewrite.passes.rules.sea import joint_approximation

HIDDEN, LOGITS, TASK = 5.0, 0.2, 0.1
"""Factors of the losses beside those of the layers, as the authors of SEA train language models."""


@dataclass(frozen=True)
class Step:
    """One batch: the loss that the weights follow, and the part of each layer, by layer path."""

    total: Tensor
    layers: dict[str, float]


def joint_steps(model: torch.nn.Module, batches: Iterable[Batch]) -> Iterator[Step]:
    """Yield the losses of ``model`` against a copy of it that runs as it was; gradients reach all its weights."""
    teacher, seen = copy.deepcopy(model), _Layers()
    kept = deque[Batch]()

    def asked() -> Iterator[Batch]:
        for batch in batches:
            kept.append(_with_hidden_states(model, batch))
            yield kept[-1]

    def answered() -> Iterator[Batch]:
        while kept:
            yield kept.popleft()

    expected = outputs_observed(teacher, asked(), seen.teach)
    found = outputs_observed(model, answered(), seen.learn, converted=True, learning=True)
    for theirs, ours in zip(expected, found, strict=True):
        layers = seen.take()
        total = torch.stack(list(layers.values())).mean() + _output_loss(ours, theirs)
        yield Step(total, {layer: float(loss.detach()) for layer, loss in layers.items()})


@dataclass(eq=False)
class _Layers:
    """What the teacher's attentions gave in this batch, in order, and the losses of the student's."""

    taught: deque[tuple[tuple[Tensor, Tensor], Tensor]] = field(default_factory=deque)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def teach(self, at: Observed) -> None:
        if at.request.variant != "sdpa":
            q, k = common_dtype(at.tensors.query(), at.tensors.key())
            self.taught.append(((q, k), exact(at.tensors)))

    def learn(self, at: Observed) -> None:
        if at.output is None:
            return
        scores, wanted = self.taught.popleft()
        error = (at.output - wanted).float().square().mean()
        if at.request.variant == "sea":
            loss = joint_approximation(at.tensors, at.request.config, scores) + error
        else:
            loss = error / wanted.float().square().mean().clamp(min=1e-30)
        layer = at.request.layer  # where a graph break splits the model, the site's path begins there
        self.losses[layer] = self.losses[layer] + loss if layer in self.losses else loss

    def take(self) -> dict[str, Tensor]:
        losses, self.losses = self.losses, {}
        return losses


def _with_hidden_states(model: torch.nn.Module, batch: Batch) -> Batch:
    """Ask a model of transformers for the hidden states of its layers, too."""
    args, kwargs = call(batch)
    if args or not hasattr(model, "main_input_name"):
        return batch
    return {**kwargs, "output_hidden_states": True}


def _output_loss(ours: Any, theirs: Any) -> Tensor | float:
    """Return the losses of hidden states, of the next-token distributions and of labels, as far as there are any."""
    loss: Tensor | float = 0.0
    hidden = zip(getattr(ours, "hidden_states", None) or (), getattr(theirs, "hidden_states", None) or (), strict=True)
    errors = [F.mse_loss(a.float(), b.float()) for a, b in hidden]
    if errors:
        loss = loss + HIDDEN * torch.stack(errors).mean()
    logits, wanted = getattr(ours, "logits", None), getattr(theirs, "logits", None)
    if isinstance(logits, Tensor) and isinstance(wanted, Tensor):
        found, sought = (x.float().flatten(0, -2).log_softmax(-1) for x in (logits, wanted))
        loss = loss + LOGITS * F.kl_div(found, sought, reduction="batchmean", log_target=True)
    own = getattr(ours, "loss", None)
    return loss + TASK * own if isinstance(own, Tensor) else loss
