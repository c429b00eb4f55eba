"""What compiles, checks and times the candidates of one launch, in processes of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, cast

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.sample import Recipe
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.store.record import Status
from attnrewrite.kernels.tuning.child import Child, WorkerDiedError
from attnrewrite.kernels.tuning.search import BenchError
from attnrewrite.kernels.tuning.workers import Workers

_BEGIN, _COMPILE, _CHECK, _RUN = 180.0, 120.0, 60.0, 30.0
"""Seconds until an answer. The first run of a configuration compiles it, unless triton's cache has it."""


class WorkerBench:
    """A ``search.Bench`` for kernel ``name`` of the call that ``recipe`` makes on ``device``, compiled for ``target``.

    A candidate that ends a worker or lets it hang has failed; another one does the next. The workers are those of one
    bench at a time. Raises BenchError where the call itself cannot be made.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        device: str,
        target: str,
        workers: Workers,
        patience: float = 1.0,
        tick: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.recipe, self.name, self.device, self.target = recipe, name, device, target
        self.workers, self.patience, self.tick = workers, patience, tick
        self._launch: dict[str, Any] = {}

    def compile(self, configs: Sequence[Config], seconds: float) -> Mapping[Config, Resources | None]:
        """Compile side by side."""
        self._begun()
        children: SimpleQueue[Child] = SimpleQueue()
        compilers = self.workers.compilers(len(configs))
        for child in compilers:
            children.put(child)
        end = time.monotonic() + seconds

        def one(config: Config) -> tuple[Config, Resources | None] | None:
            left = end - time.monotonic()
            if left <= 0:
                return None
            child = children.get()
            try:
                used = self._compiled(child, config, min(left, _COMPILE))
                return config, used
            finally:
                children.put(child)

        with ThreadPoolExecutor(len(compilers)) as pool:
            return dict(filter(None, pool.map(one, configs)))

    def check(self, config: Config) -> Status:
        """Run on a slice."""
        self.tick("checking")
        try:
            return cast(Status, self._ask("check", _CHECK, config)["status"])
        except WorkerDiedError:
            return "fault"

    def time(self, config: Config) -> float | None:
        """Return the seconds of one run."""
        self.tick("timing")
        try:
            return cast(float | None, self._ask("run", _RUN, config).get("seconds"))
        except WorkerDiedError:
            return None

    def _compiled(self, child: Child, config: Config, seconds: float) -> Resources | None:
        self.tick("compiling")
        kernel = {name: self._launch[name] for name in ("given", "types", "values")}
        try:
            answer = child.ask(seconds, do="compile", name=self.name, target=self.target, config=config, **kernel)
        except WorkerDiedError:
            return None
        return Resources(**answer["used"]) if "used" in answer else None

    def _ask(self, what: str, seconds: float, config: Config) -> dict[str, Any]:
        self._begun()
        return self.workers.runner.ask(self.patience * seconds, do=what, config=config)

    def _begun(self) -> None:
        """Have a runner that knows the call."""
        runner = self.workers.runner
        if self._launch and runner.alive:
            return
        call = {"recipe": asdict(self.recipe), "kernel_name": self.name, "device": self.device}
        try:
            answer = runner.ask(self.patience * _BEGIN, do="begin", **call)
        except WorkerDiedError as failure:
            raise BenchError(f"the call cannot be made: {failure}") from failure
        if "why" in answer:
            runner.close()
            raise BenchError(f"the call cannot be made: {answer['why']}")
        self._launch = answer
