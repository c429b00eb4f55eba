"""One tiny module per way of writing attention; the class's name says the way."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


class NanoGPT(nn.Module):
    """masked_fill with a slice of a registered buffer."""

    def __init__(self, dropout: float = 0.0, context: int = 64) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, HEADS, C // HEADS).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class FoldedHeads(nn.Module):
    """3-D bmm with heads folded into the batch, scale on the query, a float mask added in place of a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape

        def fold(y: Tensor) -> Tensor:
            return y.view(B, T, HEADS, HEAD_DIM).transpose(1, 2).reshape(B * HEADS, T, HEAD_DIM)

        q, k, v = fold(self.q(x) * HEAD_DIM**-0.5), fold(self.k(x)), fold(self.v(x))
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, HEADS, T, T)
        scores = scores + torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
        out = torch.bmm(torch.softmax(scores.view(B * HEADS, T, T), -1), v)
        return self.o(out.view(B, HEADS, T, HEAD_DIM).transpose(1, 2).reshape(B, T, C))


class GroupedEinsum(nn.Module):
    """Two key-value heads for four query heads, by einsum, with no repetition at all."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, 2, 2, HEAD_DIM)
        k, v = self.k(x).view(B, T, 2, HEAD_DIM), self.v(x).view(B, T, 2, HEAD_DIM)
        weights = torch.einsum("bihgd,bjhd->bhgij", q * HEAD_DIM**-0.5, k).softmax(-1)
        return torch.einsum("bhgij,bjhe->bihge", weights, v).reshape(B, T, WIDTH)


class LongEinsum(nn.Module):
    """The values and the output projection in one einsum of three operands."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(HEADS, HEAD_DIM, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, HEAD_DIM)) for y in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bihd,bjhd->bhij", q * HEAD_DIM**-0.5, k).softmax(-1)
        return torch.einsum("bhij,bjhd,hdw->biw", weights, v, self.o)


class ClassToken(nn.Module):
    """Only the first token asks: a query axis of size 1 is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(B, 1, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (layer(x).reshape(B, T, HEADS, HEAD_DIM).transpose(1, 2) for layer in (self.k, self.v))
        weights = (q * HEAD_DIM**-0.5 @ k.mT).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, 1, C))


class MultiQuery(nn.Module):
    """One key-value head, by broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * HEAD_DIM),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q(x).view(B, T, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        weights = torch.softmax(q @ k.mT / math.sqrt(HEAD_DIM), -1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, T, C))


class SingleHead(nn.Module):
    """Three dims, no heads, a minus-a-billion fill."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return torch.softmax(torch.where(hidden, -1e9, scores), -1) @ self.v(x)


class TransposedScores(nn.Module):
    """k·qᵀ with the softmax over the other axis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.k(x) @ self.q(x).transpose(1, 2) * WIDTH**-0.5
        return torch.softmax(scores, 1).transpose(1, 2) @ self.v(x)


class LearnedScale(nn.Module):
    """A scale per head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.scale, -1)
        return (weights @ v).transpose(1, 2).reshape(B, T, C)


class InPlace(nn.Module):
    """Scores scaled and masked in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        scores /= math.sqrt(WIDTH)
        scores += torch.full((T, T), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return torch.softmax(scores, -1) @ self.v(x)


class Checkpointed(nn.Module):
    """Activation checkpointing around nanoGPT's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NanoGPT()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class CheckpointedWithMask(nn.Module):
    """The mask is built outside the checkpointed body and passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def body(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(WIDTH)
        return torch.softmax(scores + mask, -1) @ self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
        return checkpoint(self.body, x, mask, use_reentrant=False)


class MemoryKeys(nn.Module):
    """Learned keys and values in front, as scores that are joined and weights that are cut apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.keys, self.values = (nn.Parameter(torch.randn(HEADS, 5, HEAD_DIM)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y(x).view(B, T, HEADS, HEAD_DIM).transpose(1, 2) for y in (self.q, self.k, self.v))
        scores = torch.cat([q @ self.keys.mT, q @ k.mT], -1) * HEAD_DIM**-0.5
        weights = torch.softmax(scores, -1)
        out = weights[..., :5] @ self.values + weights[..., 5:] @ v
        return self.o(out.transpose(1, 2).reshape(B, T, C))


class GraphBreak(nn.Module):
    """Two attentions with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = NanoGPT(), NanoGPT()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class MultiheadAttention(nn.Module):
    """torch's own module: with or without weights, with a causal or a padding mask."""

    def __init__(self, need_weights: bool = False, mask: str = "none") -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights, self.mask = need_weights, mask

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1) if self.mask == "causal" else None
        padding = x[..., 0] > 1.0 if self.mask == "padding" else None
        out: Tensor = self.inner(x, x, x, need_weights=self.need_weights, attn_mask=causal, key_padding_mask=padding)[0]
        return out


SPELLINGS: list[tuple[type[nn.Module], str, int]] = [
    (NanoGPT, "causal", HEADS),
    (FoldedHeads, "causal", HEADS),
    (GroupedEinsum, "none", HEADS),
    (LongEinsum, "none", HEADS),
    (ClassToken, "none", HEADS),
    (MultiQuery, "none", HEADS),
    (SingleHead, "causal", 1),
    (TransposedScores, "none", 1),
    (LearnedScale, "none", HEADS),
    (MemoryKeys, "none", HEADS),
    (InPlace, "causal", 1),
    (Checkpointed, "causal", HEADS),
    (CheckpointedWithMask, "causal", 1),
]
