"""The code of a token's position, which linear attention averages beside the value (arXiv 2310.01777, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error


def learned_code(table: Tensor, rank: Tensor, length: int) -> Tensor:
    """Look the ranks up in a table, ``[Nmax, D]``: ``[B, T]`` -> ``[B, T, D]``.

    Raises:
        LoweringError: AR402, a length for which the table has no rows.
    """
    if length > table.shape[0]:
        raise error(
            "AR402",
            f"{length} positions, and a table of {table.shape[0]}",
            hint="a table cannot be extended: convert with a larger max_length, or with positions='fourier'",
        )
    return table[rank]


def fourier_code(rank: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """Return [cos(w_r j), sin(w_r j)] with w_r geometric from 1 to 1e-5: ``[B, T]`` -> ``[B, T, D]`` (ours)."""
    half = (D + 1) // 2
    # float64 until the angle is known: in float32, position 1e5 would lose three digits of it.
    frequency = torch.logspace(0, -5, half, dtype=torch.float64, device=rank.device)
    angle = rank.unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)[..., :D].to(dtype)


def interpolated_identity(rank: Tensor, count: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """Sample the rows of the D x D identity at rank (D - 1) / (n - 1), linearly between two rows.

    The paper says nearest, its code interpolates, and so do we.

    Args:
        rank: ``[B, T]``.
        count: n, the number of real tokens, ``[B, 1]``.
        D: width of the code.
        dtype: of the result, ``[B, T, D]``.
    """
    at = rank.to(dtype) * (D - 1) / (count - 1).clamp(min=1)
    column = torch.arange(D, device=rank.device, dtype=dtype)
    return (1 - (at.unsqueeze(-1) - column).abs()).clamp(min=0)
