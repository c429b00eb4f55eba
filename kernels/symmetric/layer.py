"""The shared projections of a whole layer, head by head, and how far its scores are from the trained ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels.symmetric.fit import (
    PairForm,
    energies,
    fit_keys,
    fit_pairwise,
    fit_rotary,
    fit_signed,
    fit_symmetric,
    shared_bias,
)

RIDGE = 1e-4
"""Added to the moments of the inputs, in units of their mean diagonal: few tokens do not span all directions."""


@dataclass(frozen=True, eq=False)
class Projections:
    """Queries and keys of one layer, ``x W + b``.

    ``query`` ``[H, D, d]`` and ``key`` ``[Hkv, D, d]`` with biases ``[H, d]`` and ``[Hkv, d]``, or None. Under rotary
    embedding the first ``rotary`` features turn, feature n with n + rotary/2, or if ``interleaved`` 2n with 2n + 1.
    ``keeps_keys``: what follows the projections is not linear, or not known, so that scores are no product of them.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    rotary: int = 0
    interleaved: bool = False
    keeps_keys: bool = False

    @property
    def biased(self) -> bool:
        """Whether the shared projection has a bias."""
        return self.query_bias is not None or self.key_bias is not None


@dataclass(frozen=True, eq=False)
class Moments:
    """What the projections of a layer get as input: its ``mean`` ``[D]`` and ``second`` moment E[x xᵀ] ``[D, D]``."""

    mean: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class SharedLayer:
    """What takes the place of a layer's queries and keys.

    ``weight`` ``[Hkv, D, d]`` and ``bias`` ``[Hkv, d]`` of the shared projection; ``pair`` ``[H, d, d]``, None where it
    is symmetric. ``errors`` are ``||M - W S Wᵀ|| / ||M||`` of every query head, under rotary embedding the mean over
    offsets; ``weighted`` the same in the norm of the inputs' covariance.
    """

    weight: Tensor
    bias: Tensor | None
    pair: Tensor | None
    errors: list[float]
    weighted: list[float] | None


def fit_layer(layer: Projections, moments: Moments | None, form: PairForm | None) -> SharedLayer:
    """Fit every head of a layer: symmetric with ``form`` None, where H = Hkv, else pairwise with that form of S.

    Pairwise keeps the keys as they are under rotary embedding, where heads share keys, and where ``keeps_keys`` says
    so; elsewhere keys and S are fitted together. ``moments`` weigh the directions of the inputs; without them all
    weigh the same.
    """
    norms = _Norms.of(layer, moments)
    if form is None:
        heads = [_symmetric_head(layer, norms, h) for h in range(layer.query.shape[0])]
    elif layer.rotary or layer.keeps_keys or layer.query.shape[0] != layer.key.shape[0]:
        return with_pair(layer, moments, _pairs_for_keys(layer, norms, form))
    else:
        heads = [_pairwise_head(layer, norms, h, form) for h in range(layer.query.shape[0])]
    weights, biases, pairs = zip(*heads, strict=True)
    bias = torch.stack(biases) if layer.biased else None
    return _measured(layer, moments, torch.stack(weights), bias, None if form is None else torch.stack(pairs))


def with_pair(layer: Projections, moments: Moments | None, pair: Tensor) -> SharedLayer:
    """Return the layer whose shared projection is that of its keys, with S = ``pair`` ``[H, d, d]``."""
    bias = None if layer.key_bias is None else layer.key_bias.double()
    return _measured(layer, moments, layer.key.double(), bias, pair.double())


@dataclass(frozen=True, eq=False)
class _Norms:
    """In which norms errors are small: what features that do not turn weigh, and what features that turn weigh.

    Where nothing turns, terms that a query has in common with all keys cancel in the softmax, so that inputs may be
    centred and the bias follows; where features turn, a bias is one more direction of the input.
    """

    plain: Tensor | None = None
    turned: Tensor | None = None
    mean: Tensor | None = None

    @classmethod
    def of(cls, layer: Projections, moments: Moments | None) -> _Norms:
        if moments is None:
            return cls()
        mean, second = moments.mean.double(), moments.second.double()
        second = second + torch.diag_embed(RIDGE * second.diagonal().mean().expand_as(mean))
        if not layer.biased:
            return cls(second, second)
        beside = torch.cat((mean, mean.new_ones(1)))
        turned = torch.cat((torch.cat((second, mean[None])), beside[:, None]), 1)
        return cls(second - torch.outer(mean, mean), turned, mean)


Head = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight [D, d], bias [d] and S [d, d]."""


def _symmetric_head(layer: Projections, norms: _Norms, h: int) -> Head:
    (q_turned, q_plain), (k_turned, k_plain) = _parts(layer, "query", h), _parts(layer, "key", h)
    weights, biases = [], []
    if layer.rotary:
        found = _real(fit_rotary(q_turned, k_turned, norms.turned).weight, layer.interleaved)
        weights.append(found[: layer.query.shape[1]])
        biases.append(found[-1])
    if q_plain.shape[1]:
        weights.append(fit_symmetric(q_plain, k_plain, norms.plain).weight)
        biases.append(_bias(layer, norms, h, weights[-1], None))
    return torch.cat(weights, 1), torch.cat(biases) if layer.biased else None, None


def _pairwise_head(layer: Projections, norms: _Norms, h: int, form: PairForm) -> Head:
    w_q, w_k = layer.query[h].double(), layer.key[h].double()
    if form == "full":
        tried = [fit_pairwise(w_q[None], w_k, norms.plain), fit_keys(w_q[None], w_k, norms.plain)]
    else:
        tried = [fit_signed(w_q, w_k, norms.plain)]
    found = min(tried, key=lambda x: _score_error(norms.plain, w_q, w_k, x.weight, x.pair[0]))  # type: ignore[index]  # pairwise
    pair = found.pair[0] if found.pair is not None else None
    return found.weight, _bias(layer, norms, h, found.weight, pair), pair


def _pairs_for_keys(layer: Projections, norms: _Norms, form: PairForm) -> Tensor:
    """Return the S of every head that bring its keys nearest to its queries, bias included."""
    groups = layer.query.shape[0] // layer.key.shape[0]
    queries, keys = _with_bias(layer, "query"), _with_bias(layer, "key")
    found = [fit_keys(q, k, norms.turned, form).pair for q, k in zip(torch.split(queries, groups), keys, strict=True)]
    return torch.cat([pair for pair in found if pair is not None])


def _bias(layer: Projections, norms: _Norms, h: int, weight: Tensor, pair: Tensor | None) -> Tensor:
    if not layer.biased:
        return weight.new_zeros(weight.shape[1])
    w_q, w_k = layer.query[h].double(), layer.key[h].double()
    rest = slice(layer.rotary, None)
    b_q = weight.new_zeros(w_q.shape[1]) if layer.query_bias is None else layer.query_bias[h].double()
    mean = weight.new_zeros(w_q.shape[0]) if norms.mean is None else norms.mean
    covariance = torch.eye(len(mean), dtype=weight.dtype, device=weight.device) if norms.plain is None else norms.plain
    return shared_bias(weight, w_q[:, rest], w_k[:, rest], b_q[rest], mean, covariance, pair)


def _measured(
    layer: Projections, moments: Moments | None, weight: Tensor, bias: Tensor | None, pair: Tensor | None
) -> SharedLayer:
    groups = layer.query.shape[0] // layer.key.shape[0]
    query, query_bias = weight.repeat_interleave(groups, 0), None if bias is None else bias.repeat_interleave(groups, 0)
    if pair is not None:
        query = query @ pair
        query_bias = None if query_bias is None else (query_bias[:, None] @ pair).squeeze(1)
    ours = Projections(query, weight, query_bias, bias, layer.rotary, layer.interleaved)
    errors = _errors(layer, ours, _Norms())
    weighted = None if moments is None else _errors(layer, ours, _Norms.of(layer, moments))
    return SharedLayer(weight, bias, pair, errors, weighted)


def _errors(theirs: Projections, ours: Projections, norms: _Norms) -> list[float]:
    """Return ``||M - M'|| / ||M||`` of every query head; a turned pair counts half, its mean over offsets."""
    groups = theirs.query.shape[0] // theirs.key.shape[0]
    return [_head_error(theirs, ours, norms, h, h // groups) for h in range(theirs.query.shape[0])]


def _head_error(theirs: Projections, ours: Projections, norms: _Norms, h: int, g: int) -> float:
    sides = [(theirs, "query", h), (theirs, "key", g), (ours, "query", h), (ours, "key", g)]
    biased = theirs.biased or ours.biased
    turned, plain = zip(*(_parts(layer, role, n, biased) for layer, role, n in sides), strict=True)
    gone, total = energies(*(_in_norm(norms.plain, w) for w in plain))
    if theirs.rotary:
        parts = energies(*(_in_norm(norms.turned, w).mT.unsqueeze(-1) for w in turned))  # [F, D, 1]
        gone, total = gone + parts[0].sum() / 2, total + parts[1].sum() / 2
    return float((gone / total.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


def _score_error(norm: Tensor | None, w_q: Tensor, w_k: Tensor, weight: Tensor, pair: Tensor) -> float:
    gone, _ = energies(*(_in_norm(norm, w) for w in (w_q, w_k, weight @ pair, weight)))
    return float(gone)


def _in_norm(norm: Tensor | None, weight: Tensor) -> Tensor:
    """Return R weight with Rᵀ R = norm: its Frobenius norm is the weight's in that norm."""
    return weight if norm is None else torch.linalg.cholesky(norm).mT.to(weight.dtype) @ weight


def _parts(layer: Projections, role: str, h: int, biased: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return the features that turn, as complex columns ``[D | D + 1, F]`` with the bias, and the rest ``[D, n]``."""
    whole = _with_bias(layer, role, biased)[h]
    turned = _complex(whole[:, : layer.rotary], layer.interleaved)
    return turned, whole[: layer.query.shape[1], layer.rotary :]


def _with_bias(layer: Projections, role: str, biased: bool | None = None) -> Tensor:
    """Return the weights ``[heads, D, d]``, with the bias as one more row where the layer has any."""
    weight, bias = (layer.query, layer.query_bias) if role == "query" else (layer.key, layer.key_bias)
    if not (layer.biased if biased is None else biased):
        return weight.double()
    row = weight.new_zeros(weight.shape[0], 1, weight.shape[2]) if bias is None else bias.unsqueeze(1)
    return torch.cat((weight, row), 1).double()


def _complex(features: Tensor, interleaved: bool) -> Tensor:
    half = features.shape[-1] // 2
    pair = (features[..., 0::2], features[..., 1::2]) if interleaved else (features[..., :half], features[..., half:])
    return torch.complex(*(x.contiguous() for x in pair))


def _real(columns: Tensor, interleaved: bool) -> Tensor:
    parts = (columns.real, columns.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
