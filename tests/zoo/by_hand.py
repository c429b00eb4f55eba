"""Models around attention that people write themselves: one small model per well-known style."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.family import BATCH, HEADS, LENGTH, WIDTH, Facts, Family, ids, normal
from zoo.hand_layers import (
    Einsum,
    FusedQkv,
    MultiHeaded,
    PatchAttention,
    Rearranged,
    RelativeBias,
    Rotary,
    SeparateQkv,
)

SOURCE = "written by hand"
DEPTH, VOCABULARY = 2, 64


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


def _no_fused(make: Callable[[], nn.Module], implementation: str) -> nn.Module:
    if implementation != "eager":
        raise ValueError("written out only")
    return make()


def _facts(model: nn.Module) -> Facts:
    return Facts(frozenset({HEADS}), frozenset({HEADS, 2}))


def _family(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], needs: tuple[str, ...] = ()
) -> Family:
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
    _family("einops", functools.partial(LanguageModel, Rearranged), _tokens, needs=("einops",)),
    _family("ViT", VisionTransformer, _pixels),
    _family("Perceiver", Perceiver, _long),
]
