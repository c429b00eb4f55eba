"""The process that compiles, checks and times candidates: ``python -m attnrewrite.kernels.tuning.worker``.

It reads requests and writes answers, one JSON text a line. What a candidate does to it, a fault or a loop without an
end, costs that candidate: its parent starts another one.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

import torch
from torch import Tensor

from attnrewrite.kernels.dense.catalogue import kernel
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.launch import Launch, cannot_run, first_that_runs, launched_by
from attnrewrite.kernels.dense.sample import Recipe, Sample
from attnrewrite.kernels.dense.specialisation import specialised
from attnrewrite.kernels.generation.emit import TUNED

_TOLERANCE = {"bfloat16": 2.0**-5, "float16": 2.0**-7, "float32": 2.0**-8}
"""Relative errors that are still rounding; float32 with products of tf32."""
_LEAST = Config(16, 16, 4, 1)


def main(requests: IO[str], answers: IO[str]) -> None:
    """Answer until there are no more requests. What ends this process, its parent takes for the candidate's fault."""
    state: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        try:
            answer = _DO[request.pop("do")](state, **request)
        except cannot_run() as failure:
            answer = {"status": "failed", "why": str(failure)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def begin(state: dict[str, Any], recipe: Mapping[str, Any], kernel_name: str, device: str) -> dict[str, Any]:
    """Make a sample of the call, and find the launch in it; answer with what the kernel is specialised for."""
    state.clear()
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    whole = Recipe.from_json(recipe)
    launch = _launch(Sample(whole, place), kernel_name)
    state.update(launch=launch, slice=Sample(whole.slice(), place), place=place, runs={})
    types, values = specialised(launch.whole(_LEAST))
    fixed = {name: value for name, value in values.items() if not name.startswith(TUNED)}
    return {"given": dict(launch.given), "digest": launch.emitted.digest, "types": types, "values": fixed}


def check(state: dict[str, Any], config: list[Any]) -> dict[str, Any]:
    """Run the slice with this configuration, and compare with plain PyTorch."""
    launch, sample = state["launch"], state["slice"]
    met: list[str] = []
    with _only(launch.name, Config(*config), met):
        found = sample.run()
    if launch.emitted.digest not in met:
        return {"status": "failed", "why": "the slice does not run this kernel"}
    if "expected" not in state:
        state["expected"] = _expected(sample, launch.name)
    tolerance = _TOLERANCE[sample.recipe.dtype]
    errors = [_error(a, b) for a, b in zip(found, state["expected"], strict=True)]
    return {"status": "ok" if all(error <= tolerance for error in errors) else "wrong", "error": max(errors)}


def run(state: dict[str, Any], config: list[Any]) -> dict[str, Any]:
    """Answer with the seconds of one run."""
    chosen = Config(*config)
    if chosen not in state["runs"]:
        state["runs"][chosen] = _prepared(state["launch"], chosen, state["place"])
    return {"seconds": state["runs"][chosen]()}


def rest(state: dict[str, Any]) -> dict[str, Any]:
    """Give the memory of the device back."""
    place = state.get("place")
    state.clear()
    if place is not None and place.type == "cuda":
        torch.cuda.empty_cache()
    return {}


def compile_(
    state: dict[str, Any],
    name: str,
    given: Mapping[str, Any],
    types: Mapping[str, str],
    values: Mapping[str, int],
    target: str,
    config: list[Any],
) -> dict[str, Any]:
    """Compile ahead of time, into triton's cache; answer with what a program uses."""
    from attnrewrite.kernels.generation.resources import compiled

    chosen = Config(*config)
    made = kernel(name, given)
    try:
        used = compiled(made, types, {**values, **chosen.constants}, target, warps=chosen.warps, stages=chosen.stages)
    except Exception as failure:  # whatever a compiler raises: this configuration cannot be had
        return {"why": f"{type(failure).__name__}: {failure}"}
    return {"used": asdict(used)}


_DO: dict[str, Callable[..., dict[str, Any]]] = {
    "begin": begin,
    "check": check,
    "run": run,
    "rest": rest,
    "compile": compile_,
}


def _launch(sample: Sample, name: str) -> Launch:
    """Run a sample, and return its first launch of this kernel."""
    found: list[Launch] = []

    def note(launch: Launch) -> None:
        if launch.name == name:
            found.append(launch)
        first_that_runs(launch)

    with launched_by(note):
        sample.run()
    return found[0]


@contextmanager
def _only(name: str, config: Config, met: list[str]) -> Iterator[None]:
    """Run one kernel in one configuration, others as they would; note what is met."""

    def launcher(launch: Launch) -> None:
        if launch.name == name:
            met.append(launch.emitted.digest)
            launch(config)
        else:
            first_that_runs(launch)

    with launched_by(launcher):
        yield


def _expected(sample: Sample, name: str) -> list[Tensor]:
    if sample.recipe.dropout_p == 0:
        return sample.expected()
    with _only(name, _LEAST, []):  # the same weights are dropped whatever the tiles are
        return sample.run()


def _error(found: Tensor, expected: Tensor) -> float:
    apart = torch.linalg.vector_norm(found.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    error = float(apart / size.clamp(min=1e-12))
    return error if error == error else float("inf")  # NaN


def _prepared(launch: Launch, config: Config, place: torch.device) -> Callable[[], float]:
    """Run once, and return what runs again and takes the time."""
    run_it = functools.partial(launch, config)
    run_it()
    if place.type != "cuda":
        return lambda: _elapsed(run_it)
    from attnrewrite.kernels.tuning.clock import SHORT, CudaClock, replayed

    clock = _clock(CudaClock)
    if clock(run_it) < SHORT:
        return functools.partial(clock, replayed(run_it))
    return functools.partial(clock, run_it)


@functools.cache
def _clock(kind: Callable[[], Callable[..., float]]) -> Callable[..., float]:
    return kind()


def _elapsed(run_it: Callable[[], object]) -> float:
    start = time.perf_counter()
    run_it()
    return time.perf_counter() - start


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a compiler prints is no answer
    main(sys.stdin, answers)
