"""The estimate of the attention matrix as a function of queries, keys and values (arXiv 2310.01777, section 3).

Linear attention over [position code, value] gives each query a context, a small network turns [context, value] into a
row of M / cs numbers and into two factors, and a convolutional network turns the rows into logits over M slices.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.sea.cnn import REACH, Affine, CausalCnn, Cnn, bidirectional_cnn, causal_cnn
from attnrewrite.kernels.sea.linear import (
    linear_attention,
    positive_features,
    prefix_linear_attention,
    relu_features,
)
from attnrewrite.kernels.sea.positions import fourier_code, interpolated_identity, learned_code
from attnrewrite.kernels.visibility import accumulation_dtype, full_precision, repeat_kv


@dataclass(frozen=True)
class Estimator:
    """The parameters, shared by all heads but for the convolutions; ch is the channels per head.

    Args:
        features: ``[F, D]``, drawn once and never trained.
        positions: causal: ``[Nmax, D]``, or None for the Fourier code. Else unused: the interpolated identity.
        encode: linear ``[2 D, D + 2 Dv]``.
        norm: over 2 D.
        rows: linear ``[ch M / cs, 2 D]``.
        scales: linear ``[2, 2 D]``.
        cnn: ``CausalCnn`` or ``Cnn``, which decides which estimate it is.
        M: number of slices.
    """

    features: Tensor
    positions: Tensor | None
    encode: Affine
    norm: Affine
    rows: Affine
    scales: Affine
    cnn: CausalCnn | Cnn
    M: int

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], M: int) -> Estimator:
        """Collect the parameters by name, such as ``encode.weight`` or ``cnn.first.bias``."""

        def affine(name: str) -> Affine:
            return Affine(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        cnn = CausalCnn if is_causal(tensors) else Cnn
        return cls(
            features=tensors["features"],
            positions=tensors.get("positions"),
            encode=affine("encode"),
            norm=affine("norm"),
            rows=affine("rows"),
            scales=affine("scales"),
            cnn=cnn(*(affine(f"cnn.{layer}") for layer in cnn._fields)),
            M=M,
        )


def is_causal(names: Container[str]) -> bool:
    """Whether parameters of these names make a causal estimate."""
    return "cnn.norm.weight" in names


class Estimate(NamedTuple):
    """What ``sea_attention`` takes: logits ``[B, H, L, M]``, and two factors ``[B, H, L]`` between 0 and 1."""

    estimated: Tensor
    scale_prob: Tensor
    mix: Tensor


class EstimatorState(NamedTuple):
    """What the estimate of later tokens needs of the earlier ones; its size does not grow.

    ``sums`` is ``[B, Hkv, F, D + Dv + 1]`` in float32 (float64); ``above`` are twice the last 4 rows,
    ``[B, ch H, 4, M / cs]``, before either convolution; ``length``, ``[B]``, counts the real tokens.
    """

    sums: Tensor
    above: tuple[Tensor, Tensor]
    length: Tensor


class Trace(NamedTuple):
    """What each of T tokens did to an ``EstimatorState``, so that the last of them can be taken back.

    ``keys`` are features ``[B, Hkv, T, F]`` and ``values`` ``[B, Hkv, T, D + Dv + 1]``, whose products are summed up;
    the last column counts. ``rows`` are those before either convolution, ``[B, ch H, 4 + T, M / cs]``.
    """

    keys: Tensor
    values: Tensor
    rows: tuple[Tensor, Tensor]


class SEAState(NamedTuple):
    """The estimator's state, and the sum of the values of the real tokens, ``[B, Hkv, Dv]`` in float32 (float64)."""

    estimator: EstimatorState
    values: Tensor


def causal_estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimator: Estimator,
    padding: Tensor | None = None,
    state: EstimatorState | None = None,
    *,
    earlier: int = 0,
) -> tuple[Estimate, EstimatorState]:
    """Return the estimate of T tokens, row i from the tokens up to i, and the state to go on from.

    Args:
        query: ``[B, H, T, D]`` as the scores see it, after position embedding and norm.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        estimator: with a ``CausalCnn``.
        padding: boolean ``[B or 1, T]``, False at padding.
        state: of the tokens before these; None at the start.
        earlier: how many positions lie before these, for the length of the position table.

    Raises:
        LoweringError: AR402, an estimator of the other kind, or more positions than its table has.
    """
    found, after, _ = traced_estimate(query, key, value, estimator, padding, state, earlier=earlier)
    return found, after


def traced_estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    estimator: Estimator,
    padding: Tensor | None = None,
    state: EstimatorState | None = None,
    *,
    earlier: int = 0,
) -> tuple[Estimate, EstimatorState, Trace]:
    """Return what ``causal_estimate`` does, and what each token did to the state."""
    cnn = estimator.cnn
    if not isinstance(cnn, CausalCnn):
        raise error("AR402", "the estimator is bidirectional; needed is a causal one", hint="")
    B, _, T, D = query.shape
    real = _real(padding, key)
    with full_precision(query.device):
        dtype = accumulation_dtype(query.dtype)
        before = torch.zeros(B, dtype=torch.long, device=query.device) if state is None else state.length
        rank = (before.unsqueeze(-1) + real.long().cumsum(-1) - 1).clamp(min=0)  # [B, T]
        if estimator.positions is None:
            code = fourier_code(rank, D, dtype)
        else:
            code = learned_code(estimator.positions, rank, earlier + T).to(dtype)
        coded, keys = _augmented(value.to(dtype), code, relu_features(key, estimator.features), real)
        context, sums = prefix_linear_attention(
            relu_features(query, estimator.features), keys, coded, None if state is None else state.sums
        )
    rows, scale_prob, mix = _rows(context, value, estimator)
    estimated, seen = causal_cnn(rows, cnn, real, None if state is None else state.above)
    above = seen[0][:, :, -REACH:], seen[1][:, :, -REACH:]
    counted = F.pad(coded, (0, 1), value=1.0).masked_fill(~real[:, None, :, None], 0.0)
    after = EstimatorState(sums, above, before + real.sum(-1))
    return Estimate(estimated, scale_prob, mix), after, Trace(keys, counted, seen)


def bidirectional_estimate(
    query: Tensor, key: Tensor, value: Tensor, estimator: Estimator, padding: Tensor | None = None
) -> Estimate:
    """Return the estimate of all tokens from all tokens; it depends on how many are real, not on the padding.

    Args:
        query: ``[B, H, L, D]`` as the scores see it, after position embedding and norm.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        estimator: with a ``Cnn``.
        padding: boolean ``[B or 1, L]``, False at padding.

    Raises:
        LoweringError: AR402, an estimator of the other kind.
    """
    cnn = estimator.cnn
    if not isinstance(cnn, Cnn):
        raise error("AR402", "the estimator is causal; needed is a bidirectional one", hint="")
    real = _real(padding, key)
    with full_precision(query.device):
        dtype = accumulation_dtype(query.dtype)
        rank = (real.long().cumsum(-1) - 1).clamp(min=0)
        code = interpolated_identity(rank, real.sum(-1, keepdim=True), query.shape[-1], dtype)
        keys = positive_features(key, estimator.features, True, real)
        coded, keys = _augmented(value.to(dtype), code, keys, real)
        context = linear_attention(positive_features(query, estimator.features, False), keys, coded)
    rows, scale_prob, mix = _rows(context, value, estimator)
    return Estimate(bidirectional_cnn(rows, cnn, estimator.M, real), scale_prob, mix)


def _augmented(value: Tensor, code: Tensor, keys: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return [code, value] and the keys' features, both 0 at padding."""
    code = code.unsqueeze(1).expand(*value.shape[:3], -1)
    padding = ~real[:, None, :, None]
    return torch.cat((code, value), dim=-1).masked_fill(padding, 0.0), keys.masked_fill(padding, 0.0)


def _rows(context: Tensor, value: Tensor, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows ``[B, ch H, L, M / cs]``, channel h ch + split, and the two factors."""
    B, H, L, _ = context.shape
    dtype = estimator.encode.weight.dtype
    told = torch.cat((context.to(dtype), repeat_kv(value, H).to(dtype)), dim=-1)
    hidden = F.linear(told, *estimator.encode)
    hidden = F.gelu(F.layer_norm(hidden, hidden.shape[-1:], *estimator.norm))
    channels = estimator.cnn.first.weight.shape[1] // H
    rows = F.linear(hidden, *estimator.rows).reshape(B, H, L, channels, -1)
    factors = torch.sigmoid(F.linear(hidden, *estimator.scales))
    return rows.transpose(2, 3).flatten(1, 2), factors[..., 0], factors[..., 1]


def _real(padding: Tensor | None, key: Tensor) -> Tensor:
    B, _, T, _ = key.shape
    if padding is None:
        return torch.ones(B, T, dtype=torch.bool, device=key.device)
    return padding.expand(B, T)
