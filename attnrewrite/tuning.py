"""Tune kernels one after another, and report what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from attnrewrite.kernels.dense.choice import Kernels, interpreted
from attnrewrite.kernels.dense.keys import Where, here
from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.store.tiers import Store
from attnrewrite.kernels.tuning.bench import WorkerBench
from attnrewrite.kernels.tuning.calibration import Point
from attnrewrite.kernels.tuning.device import Device, present
from attnrewrite.kernels.tuning.rates import fitted
from attnrewrite.kernels.tuning.search import EFFORTS, Bench, Outcome
from attnrewrite.kernels.tuning.tasks import Task, of_run
from attnrewrite.kernels.tuning.tune import points, stored, tune, two_best
from attnrewrite.kernels.tuning.workers import Workers

if TYPE_CHECKING:
    from attnrewrite.loading import LoadedModel

What = Literal["tuned", "stored", "elsewhere", "failed", "left"]
"""Of a kernel: it was tuned; there was a record; another process has it; nothing could be timed; it was left as it is,
as no time was left or nothing was stored to compare."""


class Place(NamedTuple):
    """Where kernels are tuned."""

    device: torch.device
    where: Where
    facts: Device


@dataclass(frozen=True)
class Result:
    """What came of one task."""

    task: Task
    what: What
    outcome: Outcome | None = None

    @property
    def seconds(self) -> float:
        """The time it took."""
        return 0.0 if self.outcome is None else self.outcome.seconds

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        key = self.task.key
        data: dict[str, Any] = {"kernel": key.kernel, "key": key.digest, "sizes": dict(key.bucket), "what": self.what}
        if self.outcome is None:
            return data
        found = self.outcome
        chosen = None if found.winner is None else found.timings.get(found.winner)
        data |= {"compiled": found.compiled, "timed": found.timed, "seconds": round(found.seconds, 2)}
        data |= {"winner": found.winner and found.winner._asdict(), "ms": chosen and chosen.median}
        return {**data, "stopped": found.stopped}


def open_device(name: str) -> Place:
    """Return a GPU by name, such as ``cuda:1``.

    Raises CaptureError AR102 for what is no device, TuningError AR501 where there is no GPU, AR502 for one without a
    cost model.
    """
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise error("AR102", f"--device {name!r}: {cause}") from cause
    if interpreted():
        raise error("AR501", "TRITON_INTERPRET is set, so that triton would not use one")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise error("AR501", f"{name}: torch {torch.__version__} sees no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise error("AR501", f"there are {torch.cuda.device_count()} GPUs, and no {name}")
    try:
        facts = present(index)
    except ValueError as unknown:
        raise error("AR502", str(unknown)) from unknown
    return Place(torch.device("cuda", index), here(index), facts)


def of_model(loaded: LoadedModel, place: Place, *, learns: bool, kernels: Kernels = "auto") -> list[Task]:
    """Compile a model in place with this library's backend, and return what it launches for its example inputs."""
    from torch.utils._pytree import tree_map_only

    model = loaded.model.to(place.device)
    inputs, named = tree_map_only(
        torch.Tensor, lambda x: x.to(place.device), (loaded.example_inputs, loaded.example_kwargs)
    )
    model.compile(backend="attnrewrite", options={"inner": "eager", "verify": False, "kernels": kernels})

    def run() -> None:
        with torch.set_grad_enabled(learns):
            found = model(*inputs, **named)
        tensors = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor) and x.requires_grad]
        if tensors:
            tensors[0].float().sum().backward()  # type: ignore[no-untyped-call]  # torch has no types here

    return of_run(run, place.where)


@dataclass
class Session:
    """Tune with an effort, in the seconds of a ``budget``; ``verify`` compares winners with their runners-up."""

    store: Store
    place: Place
    effort: str = "full"
    budget: float | None = None
    verify: bool = False
    bench: Callable[[Task], Bench] | None = None
    """In the place of processes on the device."""
    workers: Workers = field(default_factory=Workers)

    def tune(self, tasks: Sequence[Task], tell: Callable[[str, int], None]) -> list[Result]:
        """Tune every task, and fit the cost model to what was measured."""
        start, results, measured = time.monotonic(), [], list[Point]()
        try:
            for number, task in enumerate(tasks):
                left = None if self.budget is None else self.budget - (time.monotonic() - start)
                tell(f"{task.key.kernel} {_sizes(task)}", number)
                results.append(self.one(task, left))
                outcome = results[-1].outcome
                measured += points(task, outcome) if outcome else []
        finally:
            self.workers.close()
            if measured:
                record = fitted(measured, self.place.facts, tasks[0].key, time.time())
                if record is not None:
                    self.store.put(record)
        return results

    def one(self, task: Task, left: float | None) -> Result:
        """Tune one task in at most so many seconds."""
        if left is not None and left <= 0:
            return Result(task, "left")
        among = two_best(self.store, task.key) if self.verify else []
        if self.verify and len(among) < 2:  # nothing to compare
            return Result(task, "left")
        if not self.verify and stored(self.store, task.key):
            return Result(task, "stored")
        effort = EFFORTS[self.effort]
        effort = effort if left is None else effort._replace(seconds=min(left, effort.seconds))
        outcome = tune(task, self.place.facts, self._bench(task), self.store, effort, among=among)
        if outcome is None:
            return Result(task, "elsewhere")
        timed = outcome.winner is not None and outcome.timings[outcome.winner].status == "ok"
        return Result(task, "tuned" if timed else "failed", outcome)

    def _bench(self, task: Task) -> Bench:
        if self.bench is not None:
            return self.bench(task)
        return WorkerBench(task.recipe, task.key.kernel, str(self.place.device), task.key.target, self.workers)


def _sizes(task: Task) -> str:
    shape = asdict(task.shape)
    return " x ".join(str(shape[name]) for name in ("B", "H", "L", "S", "D"))
