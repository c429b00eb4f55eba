"""The cost model: its counts by brute force, what it must prefer, and how near it comes to published times."""

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.catalogue import KERNELS
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.heights import rows_at_once
from attnrewrite.kernels.dense.splits import split
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.strips import Options
from attnrewrite.kernels.tuning.calibration import Point, fit, misfit
from attnrewrite.kernels.tuning.cost import Rates, floor, occupancy, predict
from attnrewrite.kernels.tuning.device import H200, described
from attnrewrite.kernels.tuning.heights import best_height
from attnrewrite.kernels.tuning.published import RATES, points
from attnrewrite.kernels.tuning.work import WORK, Shape

P1 = Shape(4, 16, 16, 4096, 4096, 64, 64, causal=True)
LEAN = Resources(96, 0, 65_536, "HGMMA")
BEST = RATES[H200.name]
USUAL = Config(128, 64, 8, 3)


def seconds(kernel="forward", config=USUAL, shape=P1, used=LEAN, device=H200, rates=BEST):
    return predict(kernel, config, shape, used, device, rates)


@pytest.mark.parametrize("kernel", ["forward", "backward_keys", "votes"])
@pytest.mark.parametrize(("L", "S"), [(64, 64), (50, 70), (70, 50)])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", [0, 21])
def test_tiles_are_those_with_a_visible_pair(kernel, L, S, window, causal, offset):
    """As the kernels walk: from the tile of the first visible pair of a block to that of its last one."""
    shape, config = Shape(1, 1, 1, L, S, 16, 16, causal, window, offset=offset), Config(32, 16)
    rows = kernel == "forward"
    block, step = (config.block_m, config.block_n) if rows else (config.block_n, config.block_m)
    counts = []
    for first in range(0, L if rows else S, block):
        inner = []
        for a, b in itertools.product(range(first, min(first + block, L if rows else S)), range(S if rows else L)):
            i, j = (a, b) if rows else (b, a)
            if (not causal or j <= i + offset) and (window is None or j > i + offset - window):
                inner.append(b // step)
        counts.append(max(inner) - min(inner) + 1 if inner else 0)
    work = WORK[kernel](shape, config)
    assert (work.tiles, work.longest, work.shortest) == (sum(counts), max(counts), min(counts))


@pytest.mark.parametrize(("window", "causal"), [(None, True), (7, True), (7, False), (None, False), (40, True)])
@pytest.mark.parametrize("offset", [0, 5, 30])
def test_pairs(window, causal, offset):
    pairs = itertools.product(range(20), range(30))
    seen = [j <= i + offset or not causal for i, j in pairs if window is None or j > i + offset - window]
    assert Shape(1, 1, 1, 20, 30, 16, 16, causal, window, offset=offset).pairs == sum(seen)


def test_strips_fill_the_device():
    """Nine heads in strips of 4,096 rows would leave the second wave nearly empty."""
    for heads, even in ((16, True), (9, False)):
        shape = Shape(1, heads, heads, 65536, 65536, 64, 64, causal=True, penalty=True)
        height = best_height(shape, 4096, 128, H200, BEST)
        assert height % 128 == 0
        assert (height == 4096) == even
        assert height > 2048


def test_queries_at_once():
    """As many as fit; fewer only where the model has reasons."""
    query = torch.empty(1, 9, 65536, 64, dtype=torch.bfloat16, device="meta")
    call = Call(query, query, query, Options(0.125, True), strength=torch.ones(()))
    assert rows_at_once(call, 1 << 29, None) == 4096
    assert 2048 < rows_at_once(call, 1 << 29, H200) < 4096
    assert rows_at_once(call, 1, H200) == 128
    whole = Call(query[:, :, :4096], query[:, :, :4096], query[:, :, :4096], Options(0.125, True))
    assert rows_at_once(whole, 1 << 29, H200) >= 4096


def test_pairs_of_a_call():
    assert Shape(1, 1, 1, 10, 10, 16, 16, causal=True).pairs == 55
    assert Shape(1, 1, 1, 10, 10, 16, 16, causal=True, window=3).pairs == 27
    assert Shape(1, 1, 1, 10, 7, 16, 16).pairs == 70


def test_every_kernel_has_a_cost():
    assert WORK.keys() == KERNELS.keys()
    for name in KERNELS:
        for width, config in ((x, configs(name, x, 16)[0]) for x in (64, 128, 256)):
            shape = replace(P1, D=width, Dv=width, penalty="votes" in name)
            found = predict(name, config, shape, Resources(255, 0, 65_536, "HGMMA"), H200, BEST)
            assert floor(name, shape, H200) < found < 0.1


def test_a_step_counts_the_programs_that_are_launched():
    parts, share = split(16, 32768, H200.sms)
    step = Shape(1, 16, 16, 1, 32768, 64, 64, causal=True, parts=parts)
    work = WORK["decode"](step, Config(16, 128, 4, 3))
    assert (work.programs, work.longest) == (16 * parts, share // 128)
    assert WORK["merge"](step, Config(4, 16)).tiles == 4 * parts  # of four rows each
    assert WORK["decode"](replace(step, penalty=True), USUAL).memory - work.memory == 2 * 4 * 32768
    whole = replace(step, parts=1)
    used = replace(LEAN, matrix="HMMA")
    assert seconds("decode", shape=whole, used=used) > 3 * seconds("decode", shape=step, used=used)


def test_what_does_not_fit_takes_for_ever():
    assert seconds(used=replace(LEAN, shared=H200.shared_block + 1)) == math.inf
    assert occupancy(Config(128, 64, 8), replace(LEAN, registers=64), H200) == 3  # by shared memory
    assert occupancy(Config(128, 64, 8), replace(LEAN, registers=97, shared=0), H200) == 2  # by registers, in eights
    assert occupancy(Config(128, 64, 4), replace(LEAN, registers=16, shared=0), H200) == 16  # by threads


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"used": replace(LEAN, spills=500)}, {}),
        ({"used": replace(LEAN, matrix="HMMA")}, {}),
        ({"used": replace(LEAN, registers=200)}, {}),
        ({"config": Config(16, 16, 4, 1)}, {}),
        ({"shape": replace(P1, causal=False)}, {}),
        ({"shape": replace(P1, penalty=True)}, {}),
        ({"shape": replace(P1, temperatures=True)}, {}),
        ({}, {"shape": replace(P1, dead=0.75)}),
        ({}, {"shape": replace(P1, window=256)}),
        ({"shape": replace(P1, bits=32)}, {}),
        # Of 64 rows two groups of warps make the same scores; of less HGMMA makes none.
        ({"config": Config(64, 64, 8, 3)}, {"config": Config(128, 64, 8, 3)}),
        ({"config": Config(64, 64, 8, 3)}, {"config": Config(64, 64, 4, 3)}),
        ({"config": Config(32, 64, 8, 3)}, {"config": Config(64, 64, 4, 3)}),
        ({}, {"device": replace(H200, sms=264, matmul=2 * H200.matmul, exponentials=2 * H200.exponentials)}),
    ],
    ids=str,
)
def test_prefers(worse, better):
    assert seconds(**worse) > seconds(**better)


@pytest.mark.parametrize(
    ("kernel", "config", "repeated"),
    [
        ("backward_keys", Config(32, 64, 8, 3), 3 / 2),
        ("backward_queries", Config(64, 64, 8, 2), 5 / 3),
        ("backward_shared", Config(64, 32, 8, 2), 8 / 5),
        ("backward_keys", Config(32, 128, 8, 3), 1),
        ("backward_queries", Config(64, 64, 4, 2), 1),
        ("backward_logits", Config(64, 64, 8, 1), 1),
    ],
)
def test_what_groups_of_warps_make_twice_is_counted(kernel, config, repeated):
    """As often as the compiled kernels have HGMMA."""
    shape = replace(P1, D=128, Dv=128)
    busy = replace(H200, matmul=H200.matmul / 1000)  # nothing but products takes time
    found = seconds(kernel, config, shape, device=busy)
    once = seconds(kernel, config, shape, used=replace(LEAN, matrix="HMMA"), device=replace(busy, target="sm_100"))
    assert found / once == pytest.approx(repeated, rel=0.01)


def test_a_program_more_than_the_device_holds_starts_a_wave():
    slots = H200.sms * occupancy(Config(128, 64, 8, 3), LEAN, H200)
    shape = Shape(1, slots, slots, 128, 4096, 64, 64)
    assert seconds(shape=replace(shape, H=slots + 1)) > 1.2 * seconds(shape=shape)


def test_published_times_are_met_and_their_fit_is_what_is_stored():
    known = list(points())
    assert len(known) == 19
    assert fit(known, H200) == BEST
    assert misfit(known, H200, BEST) < 0.09
    for p in known:
        assert 0.88 < predict(*p[:4], H200, BEST) / p.seconds < 1.16


def test_a_fit_finds_the_rates_that_times_were_made_with():
    true = Rates(matmul=0.8, overlap=0.5, tile=2e-8, program=3e-6)
    known = [
        Point(name, config, shape, used, predict(name, config, shape, used, H200, true))
        for name in ("forward", "backward_keys", "votes")
        for shape in (P1, replace(P1, D=128, Dv=128), replace(P1, causal=False, L=512, S=512))
        for used in (LEAN, Resources(200, 0, 100_000, "HGMMA"))
        for config in (Config(128, 64, 8, 3), Config(64, 64, 4, 2))
    ]
    assert misfit(known, H200, fit(known, H200)) < 0.02
    with pytest.raises(ValueError, match="none of the points"):
        fit([known[0]._replace(used=replace(LEAN, shared=1 << 20))], H200)


def test_the_model_is_quick_and_needs_no_torch():
    start = time.perf_counter()
    for _ in range(200):
        seconds()
    assert time.perf_counter() - start < 0.2
    code = "import sys, attnrewrite.kernels.tuning.published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def properties(**changes):
    facts = {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "shared_memory_per_multiprocessor": 233_472,
        "shared_memory_per_block_optin": 232_448,
        "L2_cache_size": 60 << 20,
    }
    return SimpleNamespace(**{**facts, **changes})


def test_a_device_is_read_from_torch():
    assert described(properties(), 1.98e9, 4.8e12) == H200
    part = described(properties(multi_processor_count=66), 1.98e9, 4.8e12)
    assert (part.sms, part.memory, part.matmul) == (66, H200.memory / 2, H200.matmul / 2)
    other = described(properties(name="NVIDIA H20", multi_processor_count=78), 1.98e9, 4.0e12)
    assert other.target == "sm_90"
    assert other.matmul == pytest.approx(0.8 * 4096 * 78 * 1.98e9)
    assert other.memory == pytest.approx(3.6e12)
    with pytest.raises(ValueError, match="sm_70"):
        described(properties(name="NVIDIA V100", major=7), 1.5e9, 9e11)
