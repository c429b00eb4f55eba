"""Routing attention token by token equals the whole sequence at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_support import CLOSE, random_routing

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.routing.decode import empty_state, prefilled_state, routing_decode
from attnrewrite.kernels.routing.reference import routing_attention

KEY_OPTIONS = ("shared_qk", "logits", "center_key")
W = 3


def decode(tensors, centroids, state, mask=None, start=0, **options):
    """Return the rows from ``start`` on and the last state."""
    rows = []
    for n in range(start, tensors[0].shape[2]):
        token = [tensor[:, :, n : n + 1] for tensor in tensors]
        row, state = routing_decode(
            *token, centroids, state, None if mask is None else mask[..., n : n + 1], enable_gqa=True, **options
        )
        rows.append(row)
    return torch.cat(rows, 2), state


def check(tensors, centroids, mask=None, window_size=W, **options):
    query, key, value = tensors
    B, Hkv, N, D = key.shape
    C, Dv = centroids.shape[1], value.shape[-1]
    whole = routing_attention(
        *tensors, centroids, mask, is_causal=True, enable_gqa=True, window_size=window_size, **options
    )
    state = empty_state(B, Hkv, C, window_size, D, Dv, dtype=torch.float64)
    rows, last = decode(tensors, centroids, state, mask, **options)
    torch.testing.assert_close(rows, whole, **CLOSE)
    kept = {name: options[name] for name in KEY_OPTIONS if name in options}
    shared = options.get("shared_qk", False)
    if shared and "center_query" in options:
        kept["center_key"] = options["center_query"]
    for cut in {N // 2, N} - {0}:
        part = (query if shared else key)[:, :, :cut]
        seen = None if mask is None else mask[..., :cut]
        filled = prefilled_state(part, value[:, :, :cut], centroids, window_size, seen, **kept)
        if cut < N:
            rest, filled = decode(tensors, centroids, filled, mask, start=cut, **options)
            torch.testing.assert_close(rest, whole[:, :, cut:], **CLOSE)
        for found, expected in zip(filled, last, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.fixture
def data():
    *tensors, centroids = (tensor.detach() for tensor in random_routing(2, 4, 2, 14, 8, 3, Dv=5))
    return tensors, centroids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4},
        {"window": 1},
        {"scale": 0.7},
        {"logits": "normed"},
        {"center_query": torch.ones(2, 8).cumsum(1), "center_key": torch.ones(2, 8).cumsum(0).cumsum(1)},
        {"window_size": 1},
        {"window_size": 20},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_equals_the_whole(data, options):
    check(*data, **options)


@pytest.mark.parametrize("options", [{}, {"logits": "normed", "center_query": torch.ones(2, 8).cumsum(1)}], ids=str)
def test_shared_query_and_key(data, options):
    (query, _, value), centroids = data
    query = query[:, :2]
    check((query, torch.full_like(query, math.nan), value), centroids, shared_qk=True, **options)


@pytest.mark.parametrize("window", [None, 4])
def test_left_padding(data, window):
    tensors, centroids = data
    mask = torch.arange(14) >= torch.tensor([5, 0]).reshape(2, 1, 1, 1)
    filled = [tensor.masked_fill(~mask.mT, math.nan) for tensor in tensors]
    check(filled, centroids, mask, window=window)


def test_a_sequence_that_has_ended_keeps_its_state(data):
    tensors, centroids = data
    mask = torch.arange(14) < torch.tensor([6, 14]).reshape(2, 1, 1, 1)
    check(tensors, centroids, mask)
    _, key, value = tensors
    filled = prefilled_state(key, value, centroids, W, mask)
    early = prefilled_state(key[:, :, :6], value[:, :, :6], centroids, W)
    for longer, shorter in zip(filled[:3], early[:3], strict=True):
        assert torch.equal(longer[0], shorter[0])


def test_what_is_routed_may_differ_from_what_is_scored(data):
    (query, key, value), centroids = data
    turned = query.flip(-1), key.flip(-1)
    whole = routing_attention(
        *turned, value, centroids, is_causal=True, enable_gqa=True, window_size=W, routing_query=query, routing_key=key
    )
    state = prefilled_state(turned[1][:, :, :13], value[:, :, :13], centroids, W, routing_key=key[:, :, :13])
    last = (tensor[:, :, 13:] for tensor in (*turned, value))
    row, _ = routing_decode(
        *last, centroids, state, enable_gqa=True, routing_query=query[:, :, 13:], routing_key=key[:, :, 13:]
    )
    torch.testing.assert_close(row, whole[:, :, 13:], **CLOSE)


def test_state_is_not_changed_and_does_not_grow(data):
    tensors, centroids = data
    state = empty_state(2, 2, 3, W, 8, 5, dtype=torch.float64)
    before = [part.clone() for part in state]
    _, after = decode(tensors, centroids, state)
    assert all(torch.equal(part, copy) for part, copy in zip(state, before, strict=True))
    assert [part.shape for part in after] == [part.shape for part in state]
    assert after.length == 14


def test_16_bit_state(data):
    tensors, centroids = data
    tensors = [tensor.bfloat16() for tensor in tensors]
    whole = routing_attention(*tensors, centroids, is_causal=True, enable_gqa=True, window_size=W)
    state = empty_state(2, 2, 3, W, 8, 5, dtype=torch.bfloat16)
    rows, state = decode(tensors, centroids, state)
    assert rows.dtype == state.keys.dtype == torch.bfloat16
    torch.testing.assert_close(rows, whole)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 8),
    C=st.integers(1, 4),
    window_size=st.integers(1, 5),
    window=st.none() | st.integers(1, 6),
    normed=st.booleans(),
    shared=st.booleans(),
    pad=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_any_shape(N, C, window_size, window, normed, shared, pad, seed):
    H = 2 if shared else 4
    *tensors, centroids = (tensor.detach() for tensor in random_routing(1, H, 2, N, 4, C, seed=seed))
    mask = (torch.arange(N) >= pad).reshape(1, 1, 1, N)
    logits = "normed" if normed else "raw"
    check(tensors, centroids, mask, window_size, window=window, shared_qk=shared, logits=logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.zeros(1, 4, 2, 8), "key": torch.zeros(1, 2, 2, 8), "value": torch.zeros(1, 2, 2, 5)}, ("2",)),
        ({"centroids": torch.ones(2, 4, 8)}, ("state.keys", "1 x 2 x 3 x 3 x 8", "1 x 2 x 4 x 3 x 8")),
        ({"value": torch.zeros(1, 2, 1, 6)}, ("state.values", "x 5", "x 6")),
        ({"attn_mask": torch.zeros(1, 1, 1, 1)}, ("torch.float32", "torch.bool")),
        ({"enable_gqa": False}, ("4 heads", "have 2")),
        ({"logits": "cosine"}, ("'cosine'", "'raw'")),
        ({"window": 0}, ("0",)),
    ],
)
def test_wrong_arguments_say_both_sides(change, says):
    arguments = {
        "query": torch.zeros(1, 4, 1, 8),
        "key": torch.zeros(1, 2, 1, 8),
        "value": torch.zeros(1, 2, 1, 5),
        "centroids": torch.ones(2, 3, 8),
        "state": empty_state(1, 2, 3, W, 8, 5),
        "enable_gqa": True,
    } | change
    with pytest.raises(LoweringError) as raised:
        routing_decode(**arguments)
    assert raised.value.code == "AR402"
    assert all(part in raised.value.detail for part in says), raised.value.detail


def test_prefill_takes_padding_only():
    key = torch.zeros(1, 2, 4, 8)
    with pytest.raises(LoweringError, match="AR402"):
        prefilled_state(key, key, torch.ones(2, 3, 8), W, torch.zeros(1, 1, 1, 4))
    with pytest.raises(LoweringError, match="window_size is 0"):
        prefilled_state(key, key, torch.ones(2, 3, 8), 0)
