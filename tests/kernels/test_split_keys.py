"""Few queries on generated kernels: the keys are split among programs. Selective attention counts votes on the way."""

import pytest
import torch

from attnrewrite.functional import attention, selective_attention, selective_decode, ssa_attention
from attnrewrite.kernels.dense import decode as few_queries
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.dense.splits import Split, split
from attnrewrite.kernels.selective.step import step
from attnrewrite.kernels.strips import Options


def drawn(L, S, H=4, Hkv=2, D=16, Dv=24, B=2, dtype=torch.float32):
    source = torch.Generator().manual_seed(0)
    shapes = {"query": (B, H, L, D), "key": (B, Hkv, S, D), "value": (B, Hkv, S, Dv)}
    return {n: torch.randn(shape, generator=source).to(dtype) for n, shape in shapes.items()}


def compare(assert_no_worse, function, tensors, **how):
    """Against the reference in float64, and in the precision of the tensors."""
    exact = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    with kernels("reference"):
        ordinary, true = function(**tensors, **how), function(**exact, **how)
    with kernels("triton"):
        ours = function(**tensors, **how)
    assert ours.dtype == ordinary.dtype
    bar = max((ordinary.double() - true).norm().item(), torch.finfo(ours.dtype).eps * true.norm().item() / 8)
    assert (ours.double() - true).norm() <= 2 * bar


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("L", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain(assert_no_worse, monkeypatch, splits, L, dtype):
    monkeypatch.setattr(few_queries, "split", lambda *_: Split(splits, -(-700 // splits // 256) * 256))
    compare(assert_no_worse, attention, drawn(L, 700, dtype=dtype), enable_gqa=True)


@pytest.mark.parametrize(
    "how",
    [
        {"is_causal": True},
        {"softcap": 2.0},
        {"attn_mask": torch.arange(600).view(1, 1, 1, 600) >= torch.tensor([0, 300]).view(2, 1, 1, 1)},
        {"attn_mask": torch.rand(4, 2, 600, generator=torch.Generator().manual_seed(1)) > 0.5},
        {"attn_mask": torch.randn(1, 4, 1, 600, generator=torch.Generator().manual_seed(1))},
    ],
    ids=["causal", "softcap", "padding", "pairs", "bias"],
)
def test_forms(assert_no_worse, how):
    compare(assert_no_worse, attention, drawn(2, 600), enable_gqa=True, **how)


def test_groups_of_more_heads_than_a_tile_has_rows(assert_no_worse):
    compare(assert_no_worse, attention, drawn(3, 300, H=40, Hkv=2, B=1), enable_gqa=True)


def test_temperatures(assert_no_worse):
    tensors = drawn(2, 600)
    tensors |= {"query_temperature": torch.rand(2, 4, 2) + 0.5, "value_temperature": torch.rand(2, 2, 600) + 0.5}
    compare(assert_no_worse, ssa_attention, tensors, enable_gqa=True)


def test_the_log_sum_exp_and_sinks():
    tensors = drawn(2, 600, Hkv=4)
    sinks = torch.tensor([1.0, -1.0, 0.0, 3.0])
    out, lse = few_queries.decode(Call(**tensors, how=Options(0.25, sinks=sinks)))
    logits = tensors["query"].double() @ tensors["key"].double().mT / 4
    logits = torch.cat((logits, sinks.double().view(1, 4, 1, 1).expand(2, 4, 2, 1)), -1)
    assert torch.allclose(lse.double(), logits.logsumexp(-1) / torch.log(torch.tensor(2.0)), atol=1e-5)
    true = logits.softmax(-1)[..., :-1] @ tensors["value"].double()
    assert torch.allclose(out.double(), true, atol=1e-5)


@pytest.mark.parametrize("processors", [1, 132])
def test_splits_fill_the_device_and_no_more(processors):
    for keys in (0, 100, 32768):
        for groups in (1, 16, 1024):
            parts, share = split(groups, keys, processors)
            assert (parts - 1) * share < max(1, keys) <= parts * share
            assert share % 256 == 0
    assert split(1, 32768, processors).parts == (2 if processors == 1 else 128)
    assert split(1024, 32768, processors).parts == 1


def whole_and_steps(tensors, cuts, mask=None, **how):
    """Selective attention of a sequence at once on the reference, and in steps on kernels."""
    with kernels("reference"):
        whole = selective_attention(**tensors, attn_mask=mask, enable_gqa=True, **how)
        _, end = selective_decode(**tensors, attn_mask=mask, enable_gqa=True, **how)
    state, outs, start = None, [], 0
    with kernels("triton"):
        for stop in cuts:
            given = (tensors["query"][:, :, start:stop], tensors["key"][:, :, :stop], tensors["value"][:, :, :stop])
            seen = None if mask is None else mask[..., :stop]
            out, state = selective_decode(*given, state, seen, enable_gqa=True, **how)
            outs.append(out)
            start = stop
    return whole, torch.cat(outs, 2), end, state


@pytest.mark.parametrize(
    "how",
    [
        {"selection_head": 3, "gamma": 0.5},
        {"window": 20},
        {"softcap": 2.0},
        {"protect_first": False},
    ],
    ids=str,
)
def test_votes_step_by_step(how):
    cuts = [1, 2, 30, 31, 35, 70]
    whole, steps, end, state = whole_and_steps(drawn(70, 70), cuts, **how)
    assert torch.allclose(steps, whole, atol=3e-6)
    assert torch.equal(end.protected, state.protected)
    near = slice(70 - how.get("window", 70), None)  # what is behind the window, nobody will read
    assert torch.allclose(state.votes[:, near], end.votes[:, near], atol=2e-5)


def test_votes_step_by_step_with_padding_on_the_left():
    mask = torch.arange(70).view(1, 1, 1, 70) >= torch.tensor([0, 33]).view(2, 1, 1, 1)
    whole, steps, end, state = whole_and_steps(drawn(70, 70), [40, 41, 42, 70], mask)
    assert torch.allclose(steps[0], whole[0], atol=3e-6)
    assert torch.allclose(steps[1, :, 33:], whole[1, :, 33:], atol=3e-6)
    assert torch.equal(end.protected, state.protected)
    assert torch.allclose(state.votes[1, 33:], end.votes[1, 33:], atol=2e-5)


@pytest.mark.parametrize(("L", "recent"), [(1, 1), (5, 1), (5, 4), (20, 3)])
def test_a_cache_of_fixed_size(L, recent):
    """Queries stand at a position that only the device knows; a mask hides what is not written yet."""
    S, at = 90, 40
    tensors = drawn(L, S)
    votes = torch.rand(2, S, generator=torch.Generator().manual_seed(2)) * (torch.arange(S) < at)
    protected = (torch.arange(S) == 0).expand(2, S)
    seen = torch.arange(S) <= at + torch.arange(L).unsqueeze(-1)
    given = (*tensors.values(), torch.tensor(0.5), votes, protected, seen[None, None], torch.tensor(at), None, None)
    rest = (0.25, 0.0, None, None, 1, True, None, None, recent)
    with kernels("reference"):
        true = step(*given, *rest)
    with kernels("triton"):
        found = step(*given, *rest)
    for a, b in zip(found, true, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), atol=1e-5)


def test_evicted_keys_stay_away():
    tensors = drawn(1, 60)
    votes = torch.zeros(2, 60)
    votes[:, 5:50] = torch.inf
    given = (*tensors.values(), torch.tensor(0.0), votes, torch.zeros(2, 60, dtype=torch.bool), None, None, None, None)
    with kernels("triton"):
        out, received, _ = step(*given, 0.25, 0.0, None, None, 0, True)
    kept = {n: x if n == "query" else torch.cat((x[:, :, :5], x[:, :, 50:]), 2) for n, x in tensors.items()}
    assert torch.allclose(out, attention(**kept, enable_gqa=True), atol=1e-6)
    assert received[:, 0, 5:50].isinf().all()
