"""Rotary embeddings and norms of queries and keys, in the ways that they are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from handmade import Change, D, L, Layer, halves, only, same
from torch import Tensor


def rotate_half(layer: Layer, x: Tensor) -> Tensor:
    a, b = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = layer.cos.repeat(1, 2), layer.sin.repeat(1, 2)
    return x * cos + torch.cat((-b, a), -1) * sin


def pairs(layer: Layer, x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((a * layer.cos - b * layer.sin, b * layer.cos + a * layer.sin), -1).flatten(-2)


def every_second(layer: Layer, x: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * layer.cos.repeat_interleave(2, -1) + turned * layer.sin.repeat_interleave(2, -1)


def as_complex(layer: Layer, x: Tensor) -> Tensor:
    turn = torch.complex(layer.cos, layer.sin)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


def partial(layer: Layer, x: Tensor) -> Tensor:
    a, b = x[..., :2], x[..., 2:4]
    turned = torch.cat((a * layer.cos[:, :2] - b * layer.sin[:, :2], b * layer.cos[:, :2] + a * layer.sin[:, :2]), -1)
    return torch.cat((turned, x[..., 4:]), -1)


def by_position(layer: Layer, x: Tensor) -> Tensor:
    return x * (torch.arange(L)[:, None] * torch.arange(1, D + 1)).cos()


def swapped_halves(layer: Layer, x: Tensor) -> Tensor:
    return torch.cat((x[..., D // 2 :], x[..., : D // 2]), -1)


@pytest.mark.parametrize(
    ("change", "kind", "dims"),
    [
        (same, "none", 0),
        (halves, "half", D),
        (rotate_half, "half", D),
        (pairs, "interleaved", D),
        (every_second, "interleaved", D),
        (as_complex, "interleaved", D),
        (partial, "half", 4),
        (by_position, "other", None),
        (swapped_halves, "none", 0),
    ],
)
def test_rotary_embedding(change: Change, kind: str, dims: int | None) -> None:
    site = only(Layer(change))
    assert (site.rope, site.rope_dims, site.cross) == (kind, dims, False)


def rms(layer: Layer, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(layer: Layer, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    ("query", "key", "kind"),
    [
        (rms, rms, "rms"),
        (lambda layer, x: F.rms_norm(x, (D,)), None, "rms"),
        (lambda layer, x: F.normalize(x, dim=-1), None, "l2"),
        (lambda layer, x: x / x.norm(dim=-1, keepdim=True), None, "l2"),
        (centred, centred, "layer"),
        (lambda layer, x: layer.norm(x), None, "layer"),
        (lambda layer, x: halves(layer, layer.norm(x)), None, "layer"),
        (rms, same, "mixed"),
        (halves, None, "none"),
        (lambda layer, x: x * x.mean(-1, keepdim=True), None, "none"),
    ],
)
def test_norms(query: Change, key: Change | None, kind: str) -> None:
    assert only(Layer(query, key)).qk_norm == kind
