"""Processes that compile, check and time: with triton's interpreter in the place of a GPU."""

import dataclasses
import sys
import time

import pytest
import torch

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.launch import launched_by
from attnrewrite.kernels.dense.sample import Recipe, Sample
from attnrewrite.kernels.dense.specialisation import specialised
from attnrewrite.kernels.generation import resources
from attnrewrite.kernels.generation.loading import load
from attnrewrite.kernels.tuning.bench import WorkerBench
from attnrewrite.kernels.tuning.child import Child, WorkerDiedError
from attnrewrite.kernels.tuning.search import BenchError
from attnrewrite.kernels.tuning.workers import Workers

SMALL = Recipe(1, 2, 2, 40, 40, 16, 16, dtype="float32", scale=0.25, causal=True, learns=True)
CONFIG, OTHER = Config(16, 16, 4, 1), Config(32, 16, 4, 2)
BY_TMA = OTHER._replace(descriptors=True)
CPU = torch.device("cpu")
RECIPES = {
    "plain": SMALL,
    "grouped": dataclasses.replace(SMALL, H=4),
    "half": dataclasses.replace(SMALL, dtype="bfloat16"),
    "temperatures": dataclasses.replace(SMALL, temperatures=True),
    "mask of keys": dataclasses.replace(SMALL, mask=(1, 1, 1, 40)),
    "mask of pairs": dataclasses.replace(SMALL, mask=(40, 40)),
    "bias": dataclasses.replace(SMALL, mask=(1, 2, 40, 40), bias=True, bias_gradient=True),
    "window and cap": dataclasses.replace(SMALL, window=9, softcap=5.0),
    "sinks and slopes": dataclasses.replace(SMALL, sinks=True, slopes=True, slope_gradient=True),
    "slopes without a gradient": dataclasses.replace(SMALL, kind="selective", slopes=True),
    "step": dataclasses.replace(SMALL, L=1, S=300, offset=299, learns=False),
    "selective": dataclasses.replace(SMALL, kind="selective"),
    "selective step": dataclasses.replace(SMALL, kind="selective", L=1, S=70, offset=69, learns=False),
    "placed": dataclasses.replace(SMALL, kind="selective", L=17, offset=20, placed=True),
    "symmetric": dataclasses.replace(SMALL, kind="symmetric", causal=False),
    "pair": dataclasses.replace(SMALL, kind="symmetric", causal=True, pair=True, learns=False),
}


def launches(recipe):
    """What a call would launch."""
    met = []
    with launched_by(met.append):
        Sample(recipe, CPU).run()
    return met


@pytest.mark.parametrize("name", RECIPES)
def test_a_sample_is_what_plain_pytorch_says(name):
    sample = Sample(RECIPES[name].slice(), CPU)
    found, expected = sample.run(), sample.expected()
    assert len(found) == len(expected)
    tolerance = 2.0**-6 if RECIPES[name].dtype == "bfloat16" else 2.0**-9
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a.double() - b) <= tolerance * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("name", RECIPES)
def test_a_launch_is_made_again_from_its_recipe(name):
    for launch in launches(RECIPES[name]):
        again = Recipe.of(launch)
        assert Recipe.from_json(dataclasses.asdict(again)) == again
        for recipe in (again, again.slice()):
            digests = [x.emitted.digest for x in launches(recipe)]
            assert launch.emitted.digest in digests, launch.name


def test_a_slice_is_small_and_keeps_what_kernels_are_made_for():
    long = dataclasses.replace(SMALL, B=4, H=16, Hkv=4, L=8192, S=8192, mask=(4, 1, 1, 8192))
    assert long.slice() == dataclasses.replace(long, B=1, H=4, Hkv=1, L=200, S=200, mask=(1, 1, 1, 200))
    skipping = dataclasses.replace(long, kind="selective", mask=())
    assert skipping.slice().S == 1024


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with Workers() as workers:
        yield WorkerBench(SMALL, "backward_keys", "cpu", "sm_90", workers)


def test_a_worker_checks_and_times(bench):
    assert bench.check(OTHER) == "ok"
    assert bench.time(OTHER) > 0
    assert bench.check(CONFIG) == "ok"
    assert bench.check(BY_TMA) == "ok"
    assert bench.time(BY_TMA) > 0


def test_workers_stay_for_the_next_kernel(bench):
    first = bench.workers.runner
    assert bench.check(OTHER) == "ok"
    process = first._process
    bench.workers.rest()
    other = WorkerBench(dataclasses.replace(SMALL, S=130, L=130), "forward", "cpu", "sm_90", bench.workers)
    assert other.check(OTHER) == "ok"
    assert other.workers.runner._process is process


def test_an_interrupted_question_is_not_answered_to_the_next(monkeypatch):
    """Ctrl-C while a worker runs: its answer would be taken for that to another question."""
    with Child((sys.executable, "-c", FAULTY)) as child:
        config = [128, 16]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Child, "_line", interrupted)
            child.ask(20, do="check", config=config)
        assert not child.alive
        assert child.ask(20, do="begin") == {"given": {}, "types": {}, "values": {}}


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_worker_compiles_ahead_of_time(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    launch = next(x for x in launches(SMALL) if x.name == "forward")
    types, values = specialised(launch.whole(CONFIG))
    kernel = {"given": dict(launch.given), "types": types, "values": values}
    with Child() as child:
        answer = child.ask(120, do="compile", name="forward", target="sm_90", config=OTHER, **kernel)
        assert answer["used"]["registers"] > 0
        assert answer["used"]["spills"] == 0
        assert answer["used"]["bulk"] == 0
        answer = child.ask(120, do="compile", name="forward", target="sm_90", config=BY_TMA, **kernel)
        assert answer["used"]["bulk"] > 0
        kernel["types"] = {**types, "Q": "*no_such_type"}
        assert "why" in child.ask(120, do="compile", name="forward", target="sm_90", config=OTHER, **kernel)


FAULTY = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    what, config = request["do"], request.get("config")
    if what == "begin":
        answer = {"given": {}, "types": {}, "values": {}}
    elif config[0] == 16:
        os.abort()
    elif config[0] == 32:
        time.sleep(60)
    elif config[0] == 64:
        answer = {"status": "wrong"}
    else:
        answer = {"status": "ok", "seconds": 0.5, "used": dict(registers=1, spills=0, shared=0, matrix="")}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def faulty():
    with Workers((sys.executable, "-c", FAULTY)) as workers:
        yield WorkerBench(SMALL, "forward", "cpu", "sm_90", workers, patience=0.03)


def test_a_crash_or_a_hang_costs_one_candidate(faulty):
    start = time.monotonic()
    assert faulty.check(Config(16, 16)) == "fault"
    assert faulty.check(Config(32, 16)) == "fault"
    assert faulty.check(Config(64, 16)) == "wrong"
    assert faulty.time(Config(16, 16)) is None
    assert faulty.time(Config(32, 16)) is None
    assert faulty.time(Config(128, 16)) == 0.5
    assert time.monotonic() - start < 30


def test_a_crash_of_the_compiler_costs_one_candidate(faulty):
    found = faulty.compile([Config(16, 16), Config(128, 16), Config(128, 32)], 20)
    assert found[Config(16, 16)] is None
    assert found[Config(128, 16)].registers == found[Config(128, 32)].registers == 1


def test_no_time_to_compile(faulty):
    assert faulty.compile([Config(128, 16)], 0) == {}


def test_a_call_that_cannot_be_made():
    with Workers((sys.executable, "-c", "raise SystemExit(3)")) as workers:
        broken = WorkerBench(SMALL, "forward", "cpu", "sm_90", workers)
        with pytest.raises(BenchError, match="exit code 3"):
            broken.check(CONFIG)


def test_a_child_that_does_not_speak_json():
    with (
        Child((sys.executable, "-c", "input(); print('hello', flush=True)")) as child,
        pytest.raises(WorkerDiedError),
    ):
        child.ask(20, do="begin")
    assert not child.alive


@pytest.mark.triton
@pytest.mark.parametrize("config", [CONFIG, BY_TMA], ids=str)
@pytest.mark.parametrize("name", ["plain", "half", "mask of keys", "selective", "selective step", "temperatures"])
def test_what_is_compiled_ahead_is_what_a_launch_looks_for(name, config, monkeypatch):
    """The source that is compiled ahead has the name, in triton's cache, of what triton makes of the arguments."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    sources = []

    class StopError(Exception):
        pass

    def stop(source, **_):
        sources.append(source)
        raise StopError

    monkeypatch.setattr(triton, "compile", stop)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for launch in launches(RECIPES[name]):
        arguments = launch.whole(config)
        function = JITFunction(load(launch.emitted).fn)
        monkeypatch.setattr(resources, "load", lambda emitted, function=function: function)
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, specialisation, options = bind(**arguments, num_warps=4, num_stages=1)
        packed = function._pack_args(backend, {"num_warps": 4, "num_stages": 1}, bound, specialisation, options)
        _, signature, constants, attributes = packed
        theirs = triton.compiler.ASTSource(function, signature, constants, attributes)
        types, values = specialised(arguments)
        with pytest.raises(StopError):
            resources.compiled(launch.emitted, types, values, "sm_90", warps=4, stages=1)
        assert sources[-1].hash() == theirs.hash(), launch.name
