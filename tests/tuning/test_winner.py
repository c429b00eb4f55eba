"""The choice among configurations that are about equally fast."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.winner import relative, settled, winner

A, B, C = Config(64, 64), Config(128, 64), Config(128, 128)
USED = {A: Resources(200, 0, 100, ""), B: Resources(100, 0, 200, ""), C: Resources(100, 0, 100, "")}


def constant(**seconds):
    return {{"a": A, "b": B, "c": C}[name]: [value] * 5 for name, value in seconds.items()}


def test_clearly_faster_wins():
    assert winner(constant(a=1.0, b=1.03, c=1.05), USED)[0] == A


def test_of_equally_fast_ones_the_lighter_wins():
    assert winner(constant(a=1.0, b=1.005, c=1.05), USED)[0] == B
    assert winner(constant(a=1.0, b=1.005, c=1.007), USED)[0] == C


def test_the_edge_lies_in_the_widest_gap():
    for slower, chosen, middle in ((1.012, B, 0.016), (1.018, A, 0.014)):
        found, edge = winner(constant(a=1.0, b=slower), USED)
        assert (found, round(edge, 4)) == (chosen, middle)


def test_equal_use_goes_by_order():
    same = dict.fromkeys(USED, Resources(100, 0, 100, ""))
    assert winner(constant(a=1.0, b=1.0, c=1.0), same)[0] == A


def test_fewer_spills_come_first():
    spilling = {A: Resources(255, 0, 100, ""), B: Resources(64, 4, 0, "")}
    assert winner(constant(a=1.0, b=1.0), spilling)[0] == A


def test_what_slows_the_device_slows_both():
    drift = [1.0, 1.3, 1.1, 0.9, 2.0]
    times = relative({A: drift, B: [1.04 * x for x in drift]})
    assert times[A] == 1
    assert abs(times[B] - 1.04) < 1e-12


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_order_of_configurations_does_not_matter(drift, source):
    samples = {A: drift, B: [1.01 * x for x in drift], C: [1.2 * x for x in drift]}
    mixed = list(samples.items())
    source.shuffle(mixed)
    assert winner(dict(mixed), USED) == winner(samples, USED)


def test_what_disturbs_a_run_tells_nothing():
    times = relative({A: [1.0, 1.9, 1.0, 3.0], B: [5.0, 1.04, 1.2, 1.04]})
    assert abs(times[B] - 1.04) < 1e-12


def noisy(source, floor, scale):
    return [floor * (1 + abs(source.gauss(0, scale))) for _ in range(2000)]


def test_of_noise_that_only_slows_the_very_fastest_runs_count():
    """The mean of a twentieth of 2000 runs is off by 1e-4, the fastest four by 1e-5."""
    source = Random(0)
    times = relative({A: noisy(source, 1.0, 0.03), B: noisy(source, 1.0149, 0.03)})
    assert abs(times[B] - 1.0149) < 4e-5


def test_one_run_that_is_too_fast_does_not_count_for_much():
    source = Random(0)
    samples = {A: noisy(source, 1.0, 0.005), B: noisy(source, 1.0149, 0.005)}
    samples[B][77] = 0.5
    times = relative(samples)
    assert times[A] == 1
    assert times[B] > 1.009


def test_settled_where_noise_is_small_beside_the_gap():
    assert settled({A: [1.0, 1.001, 0.999] * 5, B: [1.1, 1.101, 1.099] * 5}, USED)
    assert not settled({A: [1.0, 1.3, 1.2] * 3, B: [1.1, 1.1, 1.1] * 3}, USED)
    assert not settled({A: [1.0, *[1.2] * 8], B: [1.1] * 9}, USED)
