"""Distill: train what a conversion added, each layer from the attention that the model itself computes there."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnrewrite.conversion import conversion_of, new_parameters
from attnrewrite.joint_distillation import Step, joint_steps
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.observation import Batch, Observed, observe
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.sdpa import exact
from attnrewrite.passes.rules.sea import approximation

Progress = Callable[[int, float], object]
"""Is told how many steps are done and the last one's loss; returning False ends the training."""


@dataclass(frozen=True)
class Distillation:
    """The record of a training: the loss of every layer on the first batch, before and after, by layer path."""

    steps: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]


def distill(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    stage: Literal["added", "all"] = "added",
    base_lr: float = 2e-6,
    progress: Progress | None = None,
) -> Distillation:
    """Train a converted model in place, with AdamW, towards the model that it was.

    In stage "added" the parameters that ``convert`` added learn, and all others stay as they are. The model runs as it
    was before it was converted, so it is its own teacher, and each layer learns by itself from the queries, keys and
    values that it gets there. The loss of a layer, of whose parameters some may get no gradient:

    - sea: 0.1 KL(A || A') + MSE(A', A) between its attention A and its estimate A' (arXiv 2310.01777, section 3), in
      closed form, without a matrix of A';
    - else: the squared error of the attention's output, divided by the mean square of the output.

    In stage "all" all parameters learn from a copy of the model, which runs in the mode that it is in. The loss of a
    layer compares it with the copy's; for sea it is 0.1 KL + MSE of A', the same of the student's own dense attention,
    and the squared error of the output. To their mean are added 5 times the mean squared error of hidden states, 0.2
    times the divergence KL of the next-token distributions and 0.1 times the model's own loss, as far as a model of
    transformers gives them: pass mappings, with ``labels`` for the last (arXiv 2310.01777, section 3, with the factors
    of the authors' code).

    Whatever ends the training early leaves the model as the last whole step left it.

    Args:
        model: a converted model.
        batches: inputs of single calls, each a tensor, a sequence or a mapping of keywords; used again from the first
            when they run out.
        steps: number of updates, each from one batch.
        lr: the learning rate; the authors take 1e-4 for 10,000 steps of 32 sequences.
        weight_decay: of AdamW.
        stage: "added" or "all".
        base_lr: in stage "all" the learning rate of the parameters that the model had before; 2e-6 is the authors'.
        progress: called after every step.

    Raises:
        CaptureError: AR102 where there is no batch, no step, no such stage, or no parameter to train.
        VariantError: AR310 where the model carries no conversion.
    """
    if conversion_of(model) is None:
        raise error("AR310", f"{type(model).__name__} carries no conversion")
    if stage not in ("added", "all"):
        raise error("AR102", f"stage is {stage!r}; {closest(str(stage), ('added', 'all'))}", hint="")
    kept = list(batches)
    added = [parameter for _, parameter in new_parameters(model) if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": added, "lr": lr}]
    if stage == "all":
        own = {id(parameter) for parameter in added}
        base = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        groups.append({"params": base, "lr": base_lr})
    count = sum(len(group["params"]) for group in groups)
    for name, number in (("batches", len(kept)), ("steps", steps), ("parameters to train", count)):
        if number < 1:
            raise error("AR102", f"there are {number} {name}; needed is 1 at least", hint="")
    run = _Run(torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=weight_decay), progress)
    start = time.perf_counter()
    try:
        if stage == "all":
            run.follow(joint_steps(model, run.batches(kept, steps)))
        else:
            observe(model, run.batches(kept, steps), run.see)
    finally:
        run.optimizer.zero_grad()
    return Distillation(run.steps, time.perf_counter() - start, run.before, run.after)


@dataclass(eq=False)
class _Run:
    """One training. ``losses`` are those of the batch that the model is at, by layer."""

    optimizer: torch.optim.Optimizer
    progress: Progress | None
    learning: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def batches(self, kept: list[Batch], steps: int) -> Iterator[Batch]:
        """Yield one batch per step, and do the step when the model has run on it."""
        yield kept[0]
        self.before, self.losses, self.learning = self.losses, {}, True
        for batch in itertools.islice(itertools.cycle(kept), steps):
            yield batch
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            loss, self.losses = statistics.fmean(self.losses.values()), {}
            if self.progress is not None and self.progress(self.steps, loss) is False:
                break
        self.learning = False
        yield kept[0]
        self.after = self.losses

    def follow(self, steps: Iterator[Step]) -> None:
        """Take the losses of whole batches, and their gradients."""
        for step in steps:
            self.losses = step.layers
            if self.learning:
                step.total.backward()  # type: ignore[no-untyped-call]

    def see(self, at: Observed) -> None:
        """Take the loss of one layer, and its gradient; its activations are free at once."""
        if at.request.variant == "sdpa":
            return
        with torch.set_grad_enabled(self.learning):
            loss = LOSSES.get(at.request.variant, output_error)(at)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        self.losses[at.site.layer] = self.losses.get(at.site.layer, 0.0) + float(loss.detach())


def output_error(at: Observed) -> Tensor:
    """Return the squared error of the variant's output against the layer's own, relative to the latter."""
    wanted = exact(at.tensors)
    found = RULES[at.request.variant].function(at.request)(at.tensors)
    return (found - wanted).float().square().mean() / wanted.float().square().mean().clamp(min=1e-30)


LOSSES: dict[str, Callable[[Observed], Tensor]] = {
    "sea": lambda at: approximation(at.tensors, at.request.config),
}
"""What a layer learns by, where it is not the error of its output."""
