"""The module that holds the centroids of one converted layer, and how a step of training moves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.kernels.routing.centroids import CentroidState, balance, reseed, update

WARM_DECAY = 0.99
log = logging.getLogger(__name__)


class Centroids(nn.Module):
    """Buffers of one layer: centroids with their moving averages, and the sums of the step under way.

    All floats stay float32 or wider, as 16 bits cannot count, and ``steps`` stays on the CPU, where asking for it waits
    for nothing.
    """

    def __init__(self, sets: int, clusters: int, width: int) -> None:
        super().__init__()
        shapes = {
            "centroids": (sets, clusters, width),
            "ema_count": (sets, clusters),
            "ema_sum": (sets, clusters, width),
            "center_query": (sets, width),
            "center_key": (sets, width),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("steps", torch.full((), -1))
        self.register_buffer("step_count", torch.zeros(sets, clusters), persistent=False)
        self.register_buffer("step_sum", torch.zeros(sets, clusters, width), persistent=False)
        self.register_buffer("lonely", torch.zeros(sets, clusters, width), persistent=False)
        self.register_buffer("lonely_affinity", torch.full((sets, clusters), float("inf")), persistent=False)

    @property
    def ready(self) -> bool:
        """Whether the centroids have been set."""
        return int(self.get_buffer("steps")) >= 0

    @property
    def state(self) -> CentroidState:
        """The centroids and their moving averages."""
        return CentroidState(*map(self.get_buffer, CentroidState._fields))

    def set(self, state: CentroidState, center_query: Tensor, center_key: Tensor) -> None:
        """Start from these centroids."""
        self._write(state)
        self.get_buffer("center_query").copy_(center_query)
        self.get_buffer("center_key").copy_(center_key)
        self.get_buffer("steps").zero_()
        self._clear()

    def advance(self, layer: str, decay: float, warmup: int, reseed_every: int, reseed_below: float) -> None:
        """Apply the sums of the step, those of all processes, to the moving averages; then start new sums."""
        if not self.ready:
            return
        steps, count, total = map(self.get_buffer, ("steps", "step_count", "step_sum"))
        _sum_over_processes(count, total)
        rate = min(decay, WARM_DECAY) if int(steps) < warmup else decay
        moved, ran = update(self.state, count, total, rate), count.sum() > 0
        # A step in which the layer did not run leaves everything; nothing waits for the answer.
        state = CentroidState(*(torch.where(ran, new, old) for new, old in zip(moved, self.state, strict=True)))
        steps.add_(1)
        if reseed_every and int(steps) % reseed_every == 0:
            log.info("%s: smallest and largest cluster over the mean: %s", layer, balance(state.ema_count))
            lonely = _over_processes(self.get_buffer("lonely"), self.get_buffer("lonely_affinity"))
            state = reseed(state, lonely.unsqueeze(0), threshold=reseed_below)
        self._write(state)
        self._clear()

    def _write(self, state: CentroidState) -> None:
        for buffer, value in zip(self.state, state, strict=True):
            buffer.copy_(value)

    def _clear(self) -> None:
        for name in ("step_count", "step_sum", "lonely"):
            self.get_buffer(name).zero_()
        self.get_buffer("lonely_affinity").fill_(float("inf"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, now in self._buffers.items():
            was = before[name]
            assert now is not None
            assert was is not None
            if now.is_floating_point() and now.element_size() < 4:
                self._buffers[name] = was.to(now.device)
        self._buffers["steps"] = self.get_buffer("steps").cpu()
        return self


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_processes(*tensors: Tensor) -> None:
    if _distributed():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _over_processes(lonely: Tensor, affinity: Tensor) -> Tensor:
    """Return the loneliest tokens of all processes, ``[Hc, C, D]``, the same on each."""
    if not _distributed():
        return lonely
    size = torch.distributed.get_world_size()
    tokens, affinities = ([torch.empty_like(x) for _ in range(size)] for x in (lonely, affinity))
    torch.distributed.all_gather(tokens, lonely)
    torch.distributed.all_gather(affinities, affinity)
    first = torch.cat(affinities, dim=1).argsort(dim=1, stable=True)[:, : lonely.shape[1]]
    return torch.cat(tokens, dim=1).gather(1, first.unsqueeze(-1).expand(-1, -1, lonely.shape[2]))
