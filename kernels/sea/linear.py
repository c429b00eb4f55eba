"""Random features and the linear attention that they make (arXiv 2310.01777, section 3; features of 2009.14794)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.visibility import accumulation_dtype

_CHUNK = 64  # tokens whose pairs are multiplied out between two states of the running sums; all chunks at once


def feature_count(D: int, divisor: int = 1) -> int:
    """Return floor(D ln D / divisor), 1 at least; the authors divide by 8 for language models."""
    return max(1, int(D * math.log(D) / divisor))


def draw_features(F: int, D: int, *, seed: int = 0) -> Tensor:
    """Draw the matrix of random features, ``[F, D]`` in float32, the same on every machine for the same seed.

    Blocks of D orthonormal rows; each row is scaled by the norm of another normal vector of D numbers.

    Raises:
        LoweringError: AR402, F or D below 1.
    """
    if F < 1 or D < 1:
        raise error("AR402", f"features are {F} x {D}; needed are 1 or more of either", hint="")
    source = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-F // D)):
        drawn = torch.randn(D, D, generator=source, dtype=torch.float64)
        rows, corner = torch.linalg.qr(drawn)
        # The signs that make the factorisation unique.
        blocks.append((rows * corner.diagonal().sign()).T)
    norms: Tensor = torch.randn(F, D, generator=source, dtype=torch.float64).norm(dim=-1, keepdim=True)
    features: Tensor = torch.cat(blocks)[:F] * norms
    return features.float()


def relu_features(states: Tensor, features: Tensor) -> Tensor:
    """Return relu(D^(-1/4) x . omega) + 1e-3, ``[..., F]`` in float32 (float64): nothing leaks across positions."""
    return torch.relu(_projected(states, features)) + 1e-3


def positive_features(states: Tensor, features: Tensor, shared: bool, real: Tensor | None = None) -> Tensor:
    """Return F^(-1/2) (exp(y - |x|^2 / (2 sqrt D) - max) + 1e-4) with y = D^(-1/4) x . omega, ``[..., S, F]``.

    Args:
        states: ``[B, H, S, D]``.
        features: ``[F, D]``.
        shared: the maximum is over all real positions (keys) rather than over each one's features (queries). The
            first sees the whole sequence: never in a causal path.
        real: boolean ``[B or 1, S]``, False at padding.
    """
    y = _projected(states, features)
    if shared:
        largest = y.masked_fill(_padding(real, y), float("-inf")).amax((-2, -1), keepdim=True)
        largest = torch.where(largest == float("-inf"), 0.0, largest)  # nothing but padding
    else:
        largest = y.amax(-1, keepdim=True)
    half = states.to(y.dtype).square().sum(-1, keepdim=True) / (2 * math.sqrt(states.shape[-1]))
    return (torch.exp(y - half - largest) + 1e-4) / math.sqrt(features.shape[0])


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the mean of the values weighted by phi(q_i) . phi(k_j), over all keys: ``[B, H, L, E]``.

    Args:
        query: features ``[B, H, L, F]``.
        key: features ``[B, Hkv, S, F]``, 0 at padding.
        value: ``[B, Hkv, S, E]``.
    """
    return _divided(_grouped(query, key.shape[1]) @ (key.mT @ _with_ones(value)).unsqueeze(2), query)


def prefix_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the same over the keys up to each query, and the sums to go on from.

    Args:
        query: features ``[B, H, T, F]``.
        key: features ``[B, Hkv, T, F]``, 0 at padding.
        value: ``[B, Hkv, T, E]``.
        sums: ``[B, Hkv, F, E + 1]`` of all earlier tokens, the last column for phi(k) itself; None for none.

    Returns:
        ``[B, H, T, E]``, and the sums that include these tokens.
    """
    B, Hkv, T, F = key.shape
    size = 1 if T == 1 else _CHUNK
    q, k, v = (_in_chunks(x, size) for x in (_grouped(query, Hkv), key, _with_ones(value)))
    own = k.mT @ v  # [B, Hkv, T / size, F, E + 1]
    first = own.new_zeros(B, Hkv, F, own.shape[-1]) if sums is None else sums
    before = torch.cat((first.unsqueeze(2), own), dim=2).cumsum(2)
    nearby = (q @ k.mT.unsqueeze(2)).tril() @ v.unsqueeze(2)
    total = (q @ before[:, :, :-1].unsqueeze(2) + nearby).flatten(3, 4)[:, :, :, :T]
    return _divided(total, query), before[:, :, -1]


def _in_chunks(states: Tensor, size: int) -> Tensor:
    """Cut tokens into chunks, the last one filled up with zeros: ``[..., T, E]`` -> ``[..., T / size, size, E]``."""
    T = states.shape[-2]
    count = (T + size - 1) // size
    padded = torch.nn.functional.pad(states, (0, 0, 0, count * size - T))
    return padded.reshape(*states.shape[:-2], count, size, states.shape[-1])


def _projected(states: Tensor, features: Tensor) -> Tensor:
    dtype = accumulation_dtype(states.dtype)
    return states.to(dtype) @ features.to(dtype).T / math.sqrt(math.sqrt(states.shape[-1]))


def _grouped(query: Tensor, Hkv: int) -> Tensor:
    B, H, L, F = query.shape
    return query.reshape(B, Hkv, H // Hkv, L, F)


def _with_ones(value: Tensor) -> Tensor:
    """Append a column of ones, whose sum is the normaliser."""
    return torch.nn.functional.pad(value, (0, 1), value=1.0)


def _divided(sums: Tensor, query: Tensor) -> Tensor:
    # A row before which all is padding has sums 0 and must give 0.
    normaliser = sums[..., -1:]
    mean = sums[..., :-1] / torch.where(normaliser == 0, 1.0, normaliser)
    return mean.reshape(*query.shape[:3], -1)


def _padding(real: Tensor | None, like: Tensor) -> Tensor:
    if real is None:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    return ~real[:, None, :, None]
