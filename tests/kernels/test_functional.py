"""The public functions: the same objects as the references, with torch's argument names and order."""

import inspect

import pytest
import torch

import attnrewrite
from attnrewrite import functional
from attnrewrite.kernels.routing import reference as routing
from attnrewrite.kernels.sdpa import reference as sdpa
from attnrewrite.kernels.selective import reference as selective
from attnrewrite.kernels.ssa import reference as ssa

SDPA_ORDER = ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "window"]


def test_names_are_the_references():
    assert functional.__all__ == ["attention", "routing_attention", "selective_attention", "ssa_attention"]
    assert functional.attention is sdpa.attention
    assert functional.routing_attention is routing.routing_attention
    assert functional.selective_attention is selective.selective_attention
    assert functional.ssa_attention is ssa.ssa_attention
    assert attnrewrite.functional is functional


@pytest.mark.parametrize("name", functional.__all__)
def test_arguments_follow_torch(name):
    names = list(inspect.signature(getattr(functional, name)).parameters)
    start = names.index("attn_mask")
    assert names[:3] == ["query", "key", "value"]
    assert names[start : start + len(SDPA_ORDER)] == SDPA_ORDER


@pytest.mark.parametrize("name", functional.__all__)
def test_docstring_gives_shapes_and_code(name):
    text = inspect.getdoc(getattr(functional, name))
    assert all(part in text for part in ("[B, H, L, D]", "Returns:", "Raises:", "AR402"))


def test_every_function_runs_on_one_layer():
    query, key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    ones = torch.ones(1, 2, 5)
    plain = functional.attention(query, key, value, is_causal=True)
    warm = functional.ssa_attention(query, key, value, ones, ones, is_causal=True)
    assert torch.equal(warm, plain)
    unvoted = functional.selective_attention(query, key, value, gamma=0.0)
    torch.testing.assert_close(unvoted, plain)
    centroids = torch.randn(2, 1, 4)
    unrouted = functional.routing_attention(query, key, value, centroids, is_causal=True)
    torch.testing.assert_close(unrouted, plain)
