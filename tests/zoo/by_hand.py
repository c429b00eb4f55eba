"""Attention as people write it themselves: one small model per well-known style."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.family import BATCH, HEADS, LENGTH, WIDTH, Facts, Family, ids, normal

SOURCE = "written by hand"
DEPTH, HEAD_DIM, VOCABULARY = 2, WIDTH // HEADS, 64


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


class Block(nn.Module):
    """A norm, something that attends, a norm, a feed-forward."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norms = attention, nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.forth, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.attention(self.norms[0](x), *rest)
        return x + self.back(F.gelu(self.forth(self.norms[1](x))))


class LanguageModel(nn.Module):
    """Tokens, positions, blocks, a head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Bert(nn.Module):
    """Padding is the token 0; the mask is repeated to a square."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.attention, self.norms = nn.ModuleList(MultiHeaded() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens > 0).unsqueeze(1).repeat(1, tokens.size(1), 1).unsqueeze(1)
        x = self.tokens(tokens)
        for layer in self.attention:
            x = x + layer(self.norms(x), self.norms(x), self.norms(x), mask)
        return x


class Annotated(nn.Module):
    """Encoder and decoder; the decoder's mask is its padding and the causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder, self.decoder, self.cross = (nn.ModuleList(MultiHeaded() for _ in range(DEPTH)) for _ in range(3))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        seen, length = (source != 0).unsqueeze(-2), target.size(-1)
        causal = torch.triu(torch.ones(1, length, length), diagonal=1).type(torch.uint8) == 0
        mine = (target != 0).unsqueeze(-2) & causal.type_as(seen)
        x, y = self.source(source), self.target(target)
        for layer in self.encoder:
            x = x + layer(x, x, x, seen)
        for layer, cross in zip(self.decoder, self.cross, strict=True):
            y = y + layer(y, y, y, mine)
            y = y + cross(y, x, x, seen)
        return y


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


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, learned positions."""

    def __init__(self, attention: Callable[[], nn.Module] = PatchAttention) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention()) for _ in range(DEPTH)))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.blocks(x)[:, 0]


class Perceiver(nn.Module):
    """Learned latents read a long input, then attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.read, self.think = MultiHeaded(), MultiHeaded()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + self.read(latents, x, x, mask[:, None, None])
        return latents + self.think(latents, latents, latents)


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


def _no_fused(make: Callable[[], nn.Module], implementation: str) -> nn.Module:
    if implementation != "eager":
        raise ValueError("written out only")
    return make()


def _facts(model: nn.Module) -> Facts:
    return Facts(frozenset({HEADS}), frozenset({HEADS, 2}))


def _family(name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], needs: str = "") -> Family:
    return Family(SOURCE, name, functools.partial(_no_fused, make), lambda model: inputs(), _facts, needs=needs)


def _tokens() -> dict[str, Tensor]:
    return {"tokens": ids()}


def _padded() -> Tensor:
    tokens = ids()
    tokens[0, -3:] = 0
    return tokens


def _pixels() -> dict[str, Tensor]:
    return {"pixels": normal(BATCH, 3, 32, 32)}


def _long() -> dict[str, Tensor]:
    return {"x": normal(BATCH, 3 * LENGTH, WIDTH), "mask": (torch.arange(3 * LENGTH) < 30).expand(BATCH, -1)}


_nano = functools.partial(LanguageModel, functools.partial(FusedQkv, False))
_nano_fused = functools.partial(LanguageModel, functools.partial(FusedQkv, True))

FAMILIES = [
    Family(
        SOURCE, "nanoGPT", lambda form: (_nano if form == "eager" else _nano_fused)(), lambda model: _tokens(), _facts
    ),
    _family("minGPT", functools.partial(LanguageModel, SeparateQkv), _tokens),
    _family("BERT-pytorch", Bert, lambda: {"tokens": _padded()}),
    _family("annotated transformer", Annotated, lambda: {"source": _padded(), "target": ids(9)}),
    _family("Llama, complex rotation", functools.partial(LanguageModel, Rotary), _tokens),
    _family("T5 bias", functools.partial(LanguageModel, RelativeBias), _tokens),
    _family("einsum", functools.partial(LanguageModel, Einsum), _tokens),
    _family("einops", functools.partial(LanguageModel, Rearranged), _tokens, needs="einops"),
    _family("ViT", VisionTransformer, _pixels),
    _family("Perceiver", Perceiver, _long),
]
