"""Attention layers as people write them themselves, one per well-known style."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.family import HEADS, WIDTH

HEAD_DIM = WIDTH // HEADS


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """Turn [B, L, H * D] into [B, H, L, D]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """Turn [B, H, L, D] into [B, L, H * D]."""
    return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], -1)


def projections(count: int, bias: bool = True) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(count))


class FusedQkv(nn.Module):
    """nanoGPT: one projection, split; the causal mask is a slice of a buffer, or the fused operator is called."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), fused
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = map(split, self.qkv(x).split(WIDTH, dim=2))
        if self.fused:
            return self.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return self.out(merge(F.softmax(scores, dim=-1) @ v))


class SeparateQkv(nn.Module):
    """minGPT in its first form: three projections, dropout on the weights, a boolean buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.out = projections(4)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("hidden", torch.ones(64, 64).tril() == 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        k, q, v = split(self.key(x)), split(self.query(x)), split(self.value(x))
        scores = q @ k.mT / HEAD_DIM**0.5
        scores = scores.masked_fill(self.hidden[:length, :length], -1e10)
        return self.out(merge(self.drop(scores.softmax(-1)) @ v))


class Attend(nn.Module):
    """BERT-pytorch: the attention proper is a module without parameters, and returns its weights too."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: nn.Module | None) -> Any:
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        weights = F.softmax(scores, dim=-1)
        weights = weights if dropout is None else dropout(weights)
        return torch.matmul(weights, value), weights


class MultiHeaded(nn.Module):
    """The annotated transformer and its kin: a list of projections, and the weights are kept for a look."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears, self.attend, self.dropout = projections(4), Attend(), nn.Dropout(dropout)
        self.num_heads, self.weights = HEADS, None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        pairs = zip(self.linears, (query, key, value), strict=False)
        q, k, v = (split(linear(x)) for linear, x in pairs)
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
        out, self.weights = self.attend(q, k, v, mask, self.dropout)
        return self.linears[-1](merge(out))


class Einsum(nn.Module):
    """Nothing but einsum, with weights that are held as [heads, width, head dim]."""

    def __init__(self) -> None:
        super().__init__()
        shape = (HEADS, WIDTH, HEAD_DIM)
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(shape) * WIDTH**-0.5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btw,hwd->bthd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(HEAD_DIM)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max).softmax(dim=-1)
        return torch.einsum("bhij,bjhd,hwd->biw", weights, v, self.o)


class Rearranged(nn.Module):
    """einops: rearrange for the heads, einsum for the products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange

        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * HEAD_DIM**-0.5).softmax(dim=-1)
        out = torch.einsum("b h i j, b h j d -> b h i d", weights, v)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))


class PatchAttention(nn.Module):
    """ViT: query, key and value from one tensor [3, B, H, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class RelativeBias(nn.Module):
    """T5: no scale, and a bias per head from a table of logarithmic distances."""

    def __init__(self, buckets: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = projections(4, bias=False)
        self.table, self.buckets = nn.Embedding(buckets, HEADS), buckets

    def bias(self, length: int) -> Tensor:
        steps = torch.arange(length)
        distance = (steps[:, None] - steps[None, :]).clamp(min=0)
        exact = self.buckets // 2
        far = exact + (torch.log(distance.float() / exact + 1e-6) / math.log(32 / exact) * exact).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=self.buckets - 1))
        return self.table(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        length = x.shape[1]
        hidden = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)
        scores = torch.matmul(q, k.transpose(3, 2)) + (self.bias(length) + hidden)
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(merge(torch.matmul(weights, v)))


class Rotary(nn.Module):
    """Llama: complex rotation, fewer KV heads that are repeated, softmax in float32."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.q, self.o = projections(2, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD_DIM, bias=False) for _ in range(2))
        self.kv_heads = kv_heads

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (self._rotated(split(y, h), turn) for y, h in ((self.q(x), HEADS), (self.k(x), self.kv_heads)))
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=1) for y in (k, split(self.v(x), self.kv_heads)))
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD_DIM) + mask
        return self.o(merge(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)))

    def _rotated(self, x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(3).type_as(x)
