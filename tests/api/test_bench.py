"""What can be measured: sweeps are read, and every variant and baseline agrees with float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnrewrite.bench.case import BACKWARD, BOTH, FORWARD, Case, Setting, flops
from attnrewrite.bench.contest import Contest, hold
from attnrewrite.bench.memory import bounded, peak
from attnrewrite.bench.peers import PEERS, peer
from attnrewrite.bench.sweep import AXES, MOST_POINTS, points, sweep
from attnrewrite.bench.variants import names, variant
from attnrewrite.variants import list_variants

CPU = torch.device("cpu")
sizes = st.integers(1, 1 << 20)


# --- sweeps ---


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seq_len=1k:32k:x2", [1024, 2048, 4096, 8192, 16384, 32768]),
        ("seq_len=1k:5k:x2", [1024, 2048, 4096]),
        ("seq-len=1K", [1024]),
        ("head_dim=64,128", [64, 128]),
        ("heads=4:10:+3", [4, 7, 10]),
        ("batch=1, 2:8:x4 ,1m", [1, 2, 8, 1 << 20]),
        ("kv_heads=2,2,1", [2, 1]),
    ],
)
def test_a_sweep_is_read(text, found):
    assert sweep(text)[1] == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seq_len", "not of the form"),
        ("seq_len=", "no size"),
        ("seq_len=0", "no size"),
        ("seq_len=-5", "no size"),
        ("seq_len=1.5k", "no size"),
        ("seq_len=1k:2k", "not of the form"),
        ("seq_len=1k:2k:2", "not of the form"),
        ("seq_len=2k:1k:x2", "ends before it begins"),
        ("seq_len=1:9:x1", "never ends"),
        ("seq_len=1:9:+0", "no size"),
        ("seq_len=1:9m:+1", "at most"),
        ("sequence_len=5", "did you mean 'seq_len'"),
    ],
)
def test_a_sweep_that_is_none_says_why(text, said):
    with pytest.raises(ValueError, match=said):
        sweep(text)


@given(axis=st.sampled_from(AXES), wanted=st.lists(sizes, min_size=1, max_size=5, unique=True))
def test_a_list_of_sizes_is_those_sizes(axis, wanted):
    assert sweep(f"{axis}={','.join(map(str, wanted))}") == (axis, wanted)


@given(first=sizes, last=sizes, step=st.integers(2, 100), kind=st.sampled_from("x+"))
def test_a_range_ends_before_its_last_size(first, last, step, kind):
    following = (lambda n: n * step) if kind == "x" else (lambda n: n + step)
    try:
        _, found = sweep(f"seq_len={first}:{last}:{kind}{step}")
    except ValueError:
        assert first > last or (kind == "+" and (last - first) // step >= MOST_POINTS)
        return
    assert found[0] == first
    assert found[-1] <= last < following(found[-1])
    assert all(b == following(a) for a, b in pairwise(found))


@given(st.text("0123456789kmx:+,=. seq_lnhad-", max_size=20))
def test_any_text_is_a_sweep_or_a_value_error(text):
    try:
        axis, found = sweep(text)
    except ValueError:
        return
    assert axis in AXES
    assert all(size >= 1 for size in found)


def test_sweeps_make_the_product():
    found = points({"batch": 1, "seq_len": 7}, ["heads=1,2", "seq_len=8,16"])
    assert [(p["batch"], p["heads"], p["seq_len"]) for p in found] == [(1, 1, 8), (1, 1, 16), (1, 2, 8), (1, 2, 16)]
    with pytest.raises(ValueError, match="twice"):
        points({}, ["heads=1", "heads=2"])
    with pytest.raises(ValueError, match="points"):
        points({}, ["heads=1:100:+1", "seq_len=1:100:+1"])


# --- attentions ---


def small(device=CPU, **sizes):
    return Setting(Case("small", 2, 4, 24, 8, **sizes), device, torch.float32, compiled=False)


def held(setting, attention, passes):
    contest = Contest(setting.case)
    clock = lambda run: (run(), 1e-3)[1]  # noqa: E731  # a name for one use
    hold(contest, setting, {"x": attention}, clock, 1, lambda *_: None, lambda: False, passes)
    return contest


def test_every_variant_can_be_measured():
    assert names() == [info.name for info in list_variants()]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        *names(),
        "selective:mode=selector,selection_head=3",
        "selective:mode=raw,protect_first=false",
        "selective_ssa:mode=ramp",
        "symmetric:form=symmetric",
        "symmetric:mask_self=true",
        "routing:clusters=4,window_size=6,logits=normed",
        "routing:rule=topw,paper_causal=true",
        "sea:slices=8,budget=4,grouping=per_query",
    ],
)
def test_variants_agree_with_float64(text, causal):
    """On all passes, with as many heads of keys and values, or fewer where there are any."""
    grouped = not text.startswith("symmetric:form")
    setting = small(causal=causal, groups=2 if grouped else 4)
    found = held(setting, variant(text), (FORWARD, BACKWARD, BOTH))
    if not causal and text.startswith("selective"):
        assert "causal" in found.failure(BOTH, "x")
        return
    assert not found.failures
    assert {metric for metric, _ in found.seconds} == {FORWARD, BACKWARD, BOTH}
    assert 0 < found.errors[FORWARD, "x"] < 1e-5
    assert 0 < found.errors[BACKWARD, "x"] < 1e-5
    assert found.memory[FORWARD, "x"] >= setting.query.numel() * 4


@pytest.mark.parametrize("text", [*names(), "symmetric:form=symmetric,mask_self=true", "routing:shared_qk=true"])
def test_variants_decode(text):
    found = held(small(step=True, groups=4), variant(text), (FORWARD,))
    if text == "sea":
        assert "estimator" in found.failure(FORWARD, "x")
    else:
        assert 0 < found.errors[FORWARD, "x"] < 1e-5


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_baselines_agree_with_float64(name, grouped):
    """Uncompiled; in flex's votes penalties have 16 bit."""
    attention = peer(name)
    groups = 2 if grouped and name != "symmetric-eager" else 4
    found = held(small(groups=groups), attention, (FORWARD, BACKWARD))
    if attention.missing(CPU):
        assert found.failure(FORWARD, "x") == "needs a CUDA GPU"
        return
    if attention.forward_only:
        assert found.failures.pop((BACKWARD, "x")) == "has no backward pass"
    elif name == "flex":
        assert "no backward pass on cpu" in found.failures.pop((BACKWARD, "x"))
    else:
        assert 0 < found.errors[BACKWARD, "x"] < 1e-5
    assert not found.failures
    assert 0 < found.errors[FORWARD, "x"] < (5e-3 if name == "selective-flex" else 1e-5)


def test_the_part_in_float64_is_that_of_the_whole():
    setting = small(groups=2)
    twin = setting.exact(1)
    assert (twin.case.B, twin.case.H, twin.case.Hkv) == (1, 2, 1)
    for part, whole in zip(twin.tensors, setting.tensors, strict=True):
        assert part.dtype == torch.float64
        assert torch.equal(part, whole[: part.shape[0], : part.shape[1]].double())


def test_flops_are_those_of_visible_pairs():
    case = Case("", 2, 3, 5, 7)
    assert flops(case, FORWARD) == 4 * 2 * 3 * 15 * 7
    assert flops(case._replace(causal=False), BOTH) == 3.5 * 4 * 2 * 3 * 25 * 7
    assert flops(case._replace(step=True), FORWARD) == 4 * 2 * 3 * 5 * 7


def test_the_peak_holds_what_is_made_and_kept():
    x = torch.ones(1 << 18)  # 1 MiB
    assert peak(x.neg, CPU) == 1 << 20
    assert peak(lambda: x.neg().neg().neg(), CPU) == 2 << 20
    assert peak(lambda: x.neg() + x.sin(), CPU) == 3 << 20


def test_too_large_a_size_is_an_error_and_no_end_of_the_process():
    with bounded(CPU), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(1 << 44)
    assert torch.ones(8).sum() == 8
