"""Distillation of the estimate from the teacher's attention, without a student matrix (arXiv 2310.01777, section 3).

The student A' is constant within a slice. So divergence and squared error follow from what the teacher has in each
slice, its negative entropy and its sum of squares: M + 2 numbers per row in place of one per key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax
from attnrewrite.kernels.sea.arguments import check_estimated, check_padding, key_padding
from attnrewrite.kernels.sea.slices import Rows, boundaries, slice_of, visible_rows
from attnrewrite.kernels.visibility import accumulation_dtype, check_attention, full_precision

# Logits that one chunk of queries may hold: 16 MiB in float32.
_CHUNK = 2**22


class Teacher(NamedTuple):
    """The teacher's attention, row by row, in float32 (float64 for float64 inputs).

    ``mass``, ``[B, H, L, M]``, is P, what lies in each slice; ``negentropy`` and ``squares``, ``[B, H, L]``, are the
    sums of p log p and of p^2.
    """

    mass: Tensor
    negentropy: Tensor
    squares: Tensor


def teacher_statistics(
    query: Tensor,
    key: Tensor,
    M: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
) -> Teacher:
    """Return what the losses need of softmax(scale q k^T + bias), a few queries at a time and without gradient.

    Args:
        query: the teacher's, ``[B, H, L, D]``.
        key: ``[B, Hkv, L, D]``.
        M: number of slices.
        attn_mask: padding or bias, as in ``sea_attention``.
        is_causal: key j is visible to query i iff j <= i.
        scale: factor of the logits; ``D ** -0.5`` if None.
        enable_gqa: allow Hkv < H.
        window: with ``is_causal``, query i sees key j iff also i - j < window.
        padding: boolean ``[B or 1, L]``, beside a bias.

    Raises:
        LoweringError: AR402, arguments that do not fit together.
    """
    check_attention(query, key, key, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, window=window)
    check_padding(attn_mask, padding)
    B, H, L, _ = query.shape
    padding, bias = key_padding(attn_mask, L, padding)
    rows = visible_rows(L, L, is_causal=is_causal, window=window, padding=padding, device=query.device)
    step = max(1, _CHUNK // max(1, B * H * L))
    found = []
    with torch.no_grad(), full_precision(query.device):
        for start in range(0, max(L, 1), step):
            part = slice(start, start + step)
            near = bias if bias is None or bias.shape[2] == 1 else bias[:, :, part]
            logits = attention_logits(query[:, :, part], key, near, scale=scale)  # [B, H, R, L]
            column, seen = _columns(rows, part, M)
            p = masked_softmax(logits, seen)
            mass = p.new_zeros(*p.shape[:3], M).scatter_add(-1, column.expand_as(p), p)
            found.append((mass, -torch.special.entr(p).sum(-1), p.square().sum(-1)))
    return Teacher(*(torch.cat(tensors, dim=2) for tensors in zip(*found, strict=True)))


def slice_widths(
    L: int,
    M: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    attn_mask: Tensor | None = None,
    padding: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return how many keys each slice of each query holds, ``[B or 1, L, M]``."""
    padding, _ = key_padding(attn_mask, L, padding)
    rows = visible_rows(L, L, is_causal=is_causal, window=window, padding=padding, device=device)
    return boundaries(rows.count, M).diff(dim=-1)


def divergences(estimated: Tensor, teacher: Teacher, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || A') and the squared error of every row, ``[B, H, L]`` each, 0 where no key is seen.

    With W the widths, lse = log sum W e^z and p' = e^(z - lse)::

        KL = sum_j p_j log p_j - sum_m P_m z_m + lse       SSE = sum_j p_j^2 - 2 sum_m P_m p'_m + sum_m W_m p'_m^2

    Args:
        estimated: logits z, ``[B, H, L, M]``.
        teacher: with the same M.
        widths: W, ``[B or 1, L, M]``.
    """
    logits, share, lse, W, seen = _student(estimated, widths)
    kl = teacher.negentropy - (teacher.mass * logits).sum(-1) + lse
    squared = teacher.squares - 2 * (teacher.mass * share).sum(-1) + (W * share.square()).sum(-1)
    return torch.where(seen, kl, 0.0), torch.where(seen, squared, 0.0)


def divergence_gradients(estimated: Tensor, teacher: Teacher, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of both with respect to z, ``[B, H, L, M]``: W p' - P, and p' (e - W sum_m e p').

    Here e = 2 (W p' - P).
    """
    _, share, _, W, seen = _student(estimated, widths)
    kl = W * share - teacher.mass
    squared = share * 2 * (kl - W * (kl * share).sum(-1, keepdim=True))
    return torch.where(seen.unsqueeze(-1), kl, 0.0), torch.where(seen.unsqueeze(-1), squared, 0.0)


def approximation_loss(estimated: Tensor, teacher: Teacher, widths: Tensor) -> Tensor:
    """Return 0.1 KL + MSE: KL the mean over rows that see a key, MSE that over their L entries, zeros included.

    Raises:
        LoweringError: AR402, an estimate of another shape than the teacher's.
    """
    check_estimated(teacher.mass, estimated)
    kl, squared = divergences(estimated, teacher, widths)
    rows = (widths.sum(-1) > 0).unsqueeze(1).expand(kl.shape).sum().clamp(min=1)
    return 0.1 * kl.sum() / rows + squared.sum() / (rows * widths.shape[1])


def attention_loss(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Return 0.1 KL(teacher || A) + MSE of dense attention A = softmax(scale q k^T + bias), as ``approximation_loss``.

    The teacher's is made of its own queries and keys, without gradient. Both matrices are dense, a few queries at a
    time; the student's are kept for backward. Other arguments and errors as in ``teacher_statistics``.
    """
    check_attention(query, key, key, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, window=window)
    check_padding(attn_mask, padding)
    B, H, L, _ = query.shape
    padding, bias = key_padding(attn_mask, L, padding)
    rows = visible_rows(L, L, is_causal=is_causal, window=window, padding=padding, device=query.device)
    step = max(1, _CHUNK // max(1, B * H * L))
    kl = query.new_zeros((), dtype=accumulation_dtype(query.dtype))
    squared = torch.zeros_like(kl)
    with full_precision(query.device):
        for start in range(0, max(L, 1), step):
            part = slice(start, start + step)
            near = bias if bias is None or bias.shape[2] == 1 else bias[:, :, part]
            _, seen = _columns(rows, part, 1)
            some = seen.any(-1, keepdim=True)
            logits = attention_logits(query[:, :, part], key, near, scale=scale)  # [B, H, R, L]
            # A row without keys sees all, so that nothing in it is NaN, and counts nothing.
            student = logits.masked_fill(~seen & some, float("-inf")).log_softmax(-1)
            with torch.no_grad():
                p = masked_softmax(attention_logits(teacher_query[:, :, part], teacher_key, near, scale=scale), seen)
            kl = kl - (torch.special.entr(p) + torch.where(p > 0, p * student, 0.0)).sum()
            squared = squared + torch.where(some, student.exp() - p, 0.0).square().sum()
    count = (rows.count > 0).sum() * H * (B // rows.count.shape[0])
    return (0.1 * kl + squared / L) / count.clamp(min=1)


def _student(estimated: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = estimated.to(accumulation_dtype(estimated.dtype))
    seen = (widths.sum(-1) > 0).unsqueeze(1)  # [B, 1, L]
    # A row without keys gets widths of 1, so that nothing in it is NaN, not even in backward.
    W = torch.where(seen.unsqueeze(-1), widths.unsqueeze(1), 1).to(logits.dtype)
    lse = torch.logsumexp(logits + W.log(), dim=-1, keepdim=True)
    share = torch.where(W > 0, logits - lse, float("-inf")).exp()
    return logits, share, lse.squeeze(-1), W, seen


def _columns(rows: Rows, part: slice, M: int) -> tuple[Tensor, Tensor]:
    """Return the slice of every key for some queries, and whether it is visible: ``[B or 1, 1, R, S]``."""
    count, first = rows.count[:, part].unsqueeze(-1), rows.first[:, part].unsqueeze(-1)
    rank = rows.real.long().cumsum(-1).unsqueeze(1) - 1 - first  # [B, R, S]
    seen = (rank >= 0) & (rank < count) & rows.real.unsqueeze(1)
    column = slice_of(torch.where(seen, rank, 0), count, M).clamp(max=M - 1)
    return column.unsqueeze(1), seen.unsqueeze(1)
