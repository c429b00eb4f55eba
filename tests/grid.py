"""One attention, written in every combination of ways: layouts x scales x masks x softmaxes x the rest.

Each axis is a table of small functions by name. A ``Cell`` picks one of each; ``Composed`` is the module that computes
it. All cells of one (layout, scale) compute the same function of q, k and v up to mask and softmax precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, KV_HEADS, DIM, WINDOW = 4, 2, 8, 4


# Layouts: from the projections q [B, L, H, D], k and v [B, S, H, D] to scores, and from weights to [B, L, H·D].


def _bhld(q: Tensor, k: Tensor) -> Tensor:
    return q.transpose(1, 2) @ k.transpose(1, 2).transpose(-2, -1)


def _bhld_out(p: Tensor, v: Tensor) -> Tensor:
    return (p @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def _key_permuted(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1))


def _key_permuted_out(p: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(p, v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).reshape(*_bl(p), -1)


def _bl(p: Tensor) -> tuple[int, int]:
    return p.shape[0], p.shape[2]


def _folded(x: Tensor) -> Tensor:
    B, L, H, D = x.shape
    return x.transpose(1, 2).reshape(B * H, L, D)


def _bmm(q: Tensor, k: Tensor) -> Tensor:
    B, L, H, _ = q.shape
    return torch.bmm(_folded(q), _folded(k).transpose(1, 2)).view(B, H, L, -1)


def _bmm_out(p: Tensor, v: Tensor) -> Tensor:
    B, H, L, S = p.shape
    out = torch.bmm(p.reshape(B * H, L, S), _folded(v))
    return out.view(B, H, L, -1).transpose(1, 2).reshape(B, L, -1)


def _baddbmm(q: Tensor, k: Tensor) -> Tensor:
    B, L, H, _ = q.shape
    empty = torch.empty(B * H, L, k.shape[1], dtype=q.dtype, device=q.device)
    return torch.baddbmm(empty, _folded(q), _folded(k).transpose(-1, -2), beta=0, alpha=1.0).view(B, H, L, -1)


def _einsum(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("blhd,bshd->bhls", q, k)


def _einsum_out(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhls,bshd->blhd", p, v).reshape(*_bl(p), -1)


def _ellipsis(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("...id,...jd->...ij", q.transpose(1, 2), k.transpose(1, 2))


def _ellipsis_out(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("... i j, ... j d -> ... i d", p, v.transpose(1, 2)).transpose(1, 2).flatten(2)


def _sequence_first(q: Tensor, k: Tensor) -> Tensor:
    """SBHD, as in Megatron and fairseq: [L, B·H, D]."""
    L, B, H, D = q.transpose(0, 1).shape
    q, k = q.transpose(0, 1).reshape(L, B * H, D), k.transpose(0, 1).reshape(-1, B * H, D)
    return torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0)).view(B, H, L, -1)


def _five_dims(q: Tensor, k: Tensor) -> Tensor:
    """Heads split in two axes, as grouped and windowed code does."""
    q, k = (x.transpose(1, 2).unflatten(1, (2, 2)) for x in (q, k))
    return (q @ k.mT).flatten(1, 2)


def _five_dims_out(p: Tensor, v: Tensor) -> Tensor:
    out = p.unflatten(1, (2, 2)) @ v.transpose(1, 2).unflatten(1, (2, 2))
    return out.flatten(1, 2).transpose(1, 2).flatten(2)


def _key_first(q: Tensor, k: Tensor) -> Tensor:
    """k·qᵀ, turned round afterwards."""
    return (k.transpose(1, 2) @ q.transpose(1, 2).mT).mT


LAYOUTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "bhld": (_bhld, _bhld_out),
    "key_permuted": (_key_permuted, _key_permuted_out),
    "bmm": (_bmm, _bmm_out),
    "baddbmm": (_baddbmm, _bmm_out),
    "einsum": (_einsum, _einsum_out),
    "ellipsis": (_ellipsis, _ellipsis_out),
    "sequence_first": (_sequence_first, _bmm_out),
    "five_dims": (_five_dims, _five_dims_out),
    "key_first": (_key_first, _bhld_out),
}

# Scales: where the factor 1/sqrt(D) stands. (q, k) before the product, scores after it.

C = DIM**-0.5
Pair = tuple[Tensor, Tensor]


def _in_place(scores: Tensor) -> Tensor:
    scores /= math.sqrt(DIM)
    return scores


def _statement(scores: Tensor) -> Tensor:
    scores.mul_(C)
    return scores


SCALES: dict[str, tuple[Callable[[Tensor, Tensor], Pair], Callable[[Tensor], Tensor]]] = {
    "none": (lambda q, k: (q, k), lambda s: s),
    "scores_times": (lambda q, k: (q, k), lambda s: s * C),
    "scores_over": (lambda q, k: (q, k), lambda s: s / math.sqrt(DIM)),
    "in_place": (lambda q, k: (q, k), _in_place),
    "statement": (lambda q, k: (q, k), _statement),
    "query_times": (lambda q, k: (q * C, k), lambda s: s),
    "query_over": (lambda q, k: (q / math.sqrt(DIM), k), lambda s: s),
    "key_times": (lambda q, k: (q, k * C), lambda s: s),
    "both": (lambda q, k: (q * C**0.5, k * C**0.5), lambda s: s),
    "tensor": (lambda q, k: (q, k), lambda s: s / torch.sqrt(torch.tensor(float(DIM), dtype=s.dtype))),
    "rsqrt": (lambda q, k: (q, k), lambda s: s * torch.rsqrt(torch.tensor(float(DIM), dtype=s.dtype))),
    "key_tensor": (lambda q, k: (q, k / torch.full((), DIM**0.5, dtype=k.dtype)), lambda s: s),
    "swapped": (lambda q, k: (C * q, k), lambda s: 1.0 * s),
}


# Masks: on scores [B, H, L, S].


def _hidden(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def _outside(s: Tensor) -> Tensor:
    """Hide the future, and what lies WINDOW or more back."""
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None]
    return (j > i) | (j <= i - WINDOW)


def _additive(s: Tensor, low: float) -> Tensor:
    return torch.full(s.shape[-2:], low, dtype=s.dtype, device=s.device).triu(1)


def _alibi(s: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=s.dtype)
    j = torch.arange(s.shape[-1])
    return slopes[:, None, None] * (j[None, :] - j[:, None]).to(s.dtype)


def _fill_statement(s: Tensor) -> Tensor:
    s.masked_fill_(_hidden(s), float("-inf"))
    return s


def _index_causal(s: Tensor) -> Tensor:
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    return torch.where(j <= i, s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype))


def _low(s: Tensor) -> float:
    return float(torch.finfo(s.dtype).min)


MASKS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "none": ("none", lambda s, pad: s),
    "add_inf": ("causal", lambda s, pad: s + _additive(s, float("-inf"))),
    "add_min": ("causal", lambda s, pad: s + _additive(s, _low(s))),
    "where_min": ("causal", lambda s, pad: _index_causal(s)),
    "fill_inf": ("causal", lambda s, pad: s.masked_fill(_hidden(s), float("-inf"))),
    "fill_in_place": ("causal", lambda s, pad: _fill_statement(s)),
    "where_billion": ("causal", lambda s, pad: torch.where(_hidden(s), -1e9, s)),
    "floored": ("causal", lambda s, pad: torch.max(s + _additive(s, _low(s)), torch.tensor(_low(s), dtype=s.dtype))),
    "tril_zero": ("causal", lambda s, pad: s.masked_fill(torch.tril(torch.ones_like(s[0, 0])) == 0, _low(s))),
    "window": ("window", lambda s, pad: s.masked_fill(_outside(s), -1e9)),
    "padding_fill": ("padding", lambda s, pad: s.masked_fill(~pad[:, None, None], -1e9)),
    "padding_add": ("padding", lambda s, pad: s + (1.0 - pad[:, None, None].to(s.dtype)) * _low(s)),
    "padding_causal": ("causal+padding", lambda s, pad: s.masked_fill(~(pad[:, None, None] & ~_hidden(s)), _low(s))),
    "alibi": ("causal", lambda s, pad: s + _alibi(s) + _additive(s, _low(s))),
}

# Softmaxes: with the precision that models ask for.

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "operator": lambda s: torch.softmax(s, dim=-1),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "upcast": lambda s: F.softmax(s.float(), dim=-1).type_as(s),
    "written_out": lambda s: _quotient(torch.exp(s - s.amax(-1, keepdim=True))),
    "maximum_off": lambda s: torch.softmax(s - s.max(dim=-1, keepdim=True).values, dim=-1),
    "log": lambda s: F.log_softmax(s, dim=-1).exp(),
    "logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)),
    "dropout_zero": lambda s: F.dropout(torch.softmax(s, dim=-1), p=0.0, training=True),
}


def _quotient(e: Tensor) -> Tensor:
    return e / e.sum(dim=-1, keepdim=True)


# Grouped heads: k and v [B, S, Hkv, D] for H query heads.

GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "expand": lambda x: x[:, :, :, None].expand(-1, -1, -1, HEADS // x.shape[2], -1).flatten(2, 3),
    "interleave": lambda x: x.repeat_interleave(HEADS // x.shape[2], dim=2),
    "index": lambda x: x[:, :, [0, 0, 1, 1]],
}

EXTRAS = ("none", "key_value", "scores", "weights")


@dataclass(frozen=True)
class Cell:
    """One way of writing."""

    layout: str
    scale: str
    mask: str
    softmax: str = "operator"
    groups: str = "none"
    extra: str = "none"
    batch: int = 2

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in vars(self).values())


class Composed(nn.Module):
    """Computes the attention of every cell in ``cells``; returns all outputs in one line."""

    def __init__(self, cells: list[Cell]) -> None:
        super().__init__()
        # Each has projections of its own: shared ones would sum the cells' gradients in 16 bit, in some order.
        self.layers = nn.ModuleList(Written(cell) for cell in cells)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return torch.cat([y.flatten() for layer in self.layers for y in layer(x, pad)])


class Written(nn.Module):
    """The attention of one cell."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        width, kv_width = HEADS * DIM, (HEADS if cell.groups == "none" else KV_HEADS) * DIM
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv_width), nn.Linear(width, kv_width)

    def forward(self, x: Tensor, pad: Tensor) -> list[Tensor]:
        cell = self.cell
        q, k, v = (y(x).view(*x.shape[:2], -1, DIM) for y in (self.q, self.k, self.v))
        k, v = GROUPS[cell.groups](k), GROUPS[cell.groups](v)
        product, mix = LAYOUTS[cell.layout]
        before, after = SCALES[cell.scale]
        scores = MASKS[cell.mask][1](after(product(*before(q, k))), pad)
        weights = SOFTMAXES[cell.softmax](scores)
        extra = {"none": [], "key_value": [k, v], "scores": [scores.clamp(-9, 9)], "weights": [weights]}[cell.extra]
        return [self.o(mix(weights, v)), *extra]


def cells(layout: str, scale: str, batch: int = 2) -> list[Cell]:
    """Return one cell per mask; the other axes go round, so that over the grid every pair of values meets."""
    turn = list(LAYOUTS).index(layout) + list(SCALES).index(scale)
    out = []
    for n, mask in enumerate(MASKS):
        softmax = list(SOFTMAXES)[(turn + n) % len(SOFTMAXES)]
        if softmax == "logsumexp" and mask.startswith("padding"):
            softmax = "operator"  # rows without keys sum to S there, and not to 1: see the hazards
        groups = list(GROUPS)[(turn + 3 * n) % len(GROUPS)]
        extra = EXTRAS[(turn // 2 + n) % len(EXTRAS)]
        out.append(Cell(layout, scale, mask, softmax, groups, extra, batch))
    return out
