"""The public functions: the same objects as the references, with torch's argument names and order."""

import inspect

import pytest
import torch

import attnrewrite
from attnrewrite import functional
from attnrewrite.kernels.routing import reference as routing
from attnrewrite.kernels.sea import reference as sea
from attnrewrite.kernels.selective import reference as selective
from attnrewrite.kernels.ssa import reference as ssa
from attnrewrite.kernels.symmetric import reference as symmetric

SDPA_ORDER = ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "window"]


ATTENTIONS = [name for name in functional.__all__ if name.endswith("attention")]


def test_names():
    assert functional.__all__ == [
        "SelectionState",
        "attention",
        "kernels",
        "pairwise_query",
        "routing_attention",
        "sea_attention",
        "selective_attention",
        "selective_decode",
        "selective_memory",
        "ssa_attention",
        "symmetric_attention",
    ]
    assert attnrewrite.functional is functional


@pytest.mark.parametrize("name", ATTENTIONS)
def test_arguments_follow_torch(name):
    names = list(inspect.signature(getattr(functional, name)).parameters)
    start = names.index("attn_mask")
    assert names[:3] == ["shared", "value", "pair"] if name.startswith("symmetric") else ["query", "key", "value"]
    assert names[start : start + len(SDPA_ORDER)] == SDPA_ORDER


@pytest.mark.parametrize(
    ("ours", "dense"),
    [
        (functional.routing_attention, routing.routing_attention),
        (functional.sea_attention, sea.sea_attention),
        (functional.selective_attention, selective.selective_attention),
        (functional.ssa_attention, ssa.ssa_attention),
        (functional.symmetric_attention, symmetric.symmetric_attention),
    ],
)
def test_operators_take_what_their_references_take(ours, dense):
    assert inspect.signature(ours) == inspect.signature(dense)
    assert ours.__doc__ == dense.__doc__


@pytest.mark.parametrize("name", ATTENTIONS)
def test_docstring_gives_shapes_and_code(name):
    text = inspect.getdoc(getattr(functional, name))
    assert all(part in text for part in ("[B, H, L, Dv]", "Returns:", "Raises:", "AR402"))


def test_every_function_runs_on_one_layer():
    query, key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    ones = torch.ones(1, 2, 5)
    plain = functional.attention(query, key, value, is_causal=True)
    warm = functional.ssa_attention(query, key, value, ones, ones, is_causal=True)
    torch.testing.assert_close(warm, plain)
    unvoted = functional.selective_attention(query, key, value, gamma=0.0)
    torch.testing.assert_close(unvoted, plain)
    shared = functional.symmetric_attention(query, value, is_causal=True)
    torch.testing.assert_close(shared, functional.attention(query, query, value, is_causal=True))
    whole = functional.sea_attention(query, key, value, torch.randn(1, 2, 5, 3), is_causal=True, budget=5)
    torch.testing.assert_close(whole, plain)
    centroids = torch.randn(2, 1, 4)
    unrouted = functional.routing_attention(query, key, value, centroids, is_causal=True)
    torch.testing.assert_close(unrouted, plain)
