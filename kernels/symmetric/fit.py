"""The shared projection nearest to a pair of trained ones: closed forms and one monotone iteration.

``w_q`` and ``w_k`` are ``[D, d]``, the projections of one head as ``x w``; M = w_q w_kᵀ makes its scores. Everything is
computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PairForm = Literal["full", "symmetric", "diag"]
"""Which S are allowed: all, those with S = Sᵀ, or diagonal ones."""

STEPS = 200


@dataclass(frozen=True)
class Shared:
    """What takes the place of w_q and w_k: ``weight`` [D, d], and ``pair`` [G, d, d] where it is pairwise.

    ``error`` is ``||M - W S Wᵀ|| / ||M||``, in the norm that the fit minimised.
    """

    weight: Tensor
    pair: Tensor | None
    error: float


def fit_symmetric(w_q: Tensor, w_k: Tensor, covariance: Tensor | None = None) -> Shared:
    """Return the W that minimises ``||M - W Wᵀ||``, over the inputs' ``covariance`` ``[D, D]`` where it is given.

    With M_s the symmetric part of M, W is made of the eigenvectors of its d largest positive eigenvalues. M_s has rank
    2d, so the eigenproblem is solved in the span of [w_q w_k].
    """
    left, right = _whitened(covariance, w_q.double(), w_k.double())
    basis, (a, b) = _in_span(left, right)
    values, vectors = torch.linalg.eigh((a @ b.mT + b @ a.mT) / 2)
    kept = values.clamp(min=0)[-w_q.shape[1] :].flip(0)
    weight = basis @ vectors[:, -w_q.shape[1] :].flip(1) * kept.sqrt()
    error = _distance(left, right, weight, weight)
    return Shared(_positive(_coloured(covariance, weight)), None, error)


def fit_signed(w_q: Tensor, w_k: Tensor, covariance: Tensor | None = None) -> Shared:
    """Return W and the diagonal S of signs that minimise ``||M - W S Wᵀ||`` among all symmetric S.

    As ``fit_symmetric``, with the d eigenvalues of M_s that are largest by size, of either sign.
    """
    left, right = _whitened(covariance, w_q.double(), w_k.double())
    basis, (a, b) = _in_span(left, right)
    values, vectors = torch.linalg.eigh((a @ b.mT + b @ a.mT) / 2)
    kept = values.abs().argsort(descending=True)[: w_q.shape[1]]
    weight = basis @ vectors[:, kept] * values[kept].abs().sqrt()
    pair = torch.diag(torch.where(values[kept] < 0, -1.0, 1.0).to(values.dtype))
    error = _distance(left, right, weight @ pair, weight)
    return Shared(_positive(_coloured(covariance, weight)), pair[None], error)


def shared_bias(
    weight: Tensor, w_q: Tensor, w_k: Tensor, b_q: Tensor, mean: Tensor, covariance: Tensor, pair: Tensor | None = None
) -> Tensor:
    """Return the bias ``[d]`` of the shared projection for inputs of this ``mean`` ``[D]`` and ``covariance``.

    The scores of x~ = x - mean hold g . x~_j with g = Mᵀ mean + w_k b_q beside the bilinear part; the best
    ``a`` with W Sᵀ a ~ g gives the bias a - mean W. b_k only adds terms that the softmax cancels.
    """
    weight, w_q, w_k, b_q, mean = (x.double() for x in (weight, w_q, w_k, b_q, mean))
    wanted = w_k @ (w_q.mT @ mean + b_q)
    by = weight if pair is None else weight @ pair.double().mT
    normal = by.mT @ covariance.double()
    centred: Tensor = torch.linalg.lstsq(normal @ by, (normal @ wanted).unsqueeze(-1), driver="gelsd").solution
    return centred.squeeze(-1) - mean @ weight


def fit_pairwise(w_q: Tensor, w_k: Tensor, covariance: Tensor | None = None, steps: int = STEPS) -> Shared:
    """Return W and S that make ``sum_g ||M_g - W S_g Wᵀ||²`` small; ``w_q`` is ``[G, D, d]``, a group's query heads.

    For orthonormal W the best S_g is Wᵀ M_g W. Three closed-form candidates for W are refined by
    W <- the top d eigenvectors of ``sum_g (M P Mᵀ + Mᵀ P M)`` with P = W Wᵀ; where that raises the error, of the same
    plus ``2 c P`` with c = sum_g ||M_g||², which never does. At the end r = x W has the root mean
    square of the old queries.
    """
    left, right = _whitened(covariance, w_q.double(), w_k.double())
    basis, (*a, b) = _in_span(*left, right)
    products = torch.stack([x @ b.mT for x in a])  # [G, n, n]
    width = w_k.shape[1]
    best = max((_refined(w, products, steps) for w in _candidates(products, width)), key=lambda w: _energy(w, products))
    pair = best.mT @ products @ best
    total = products.square().sum()
    gone = (total - _energy(best, products)).clamp(min=0) / total.clamp(min=torch.finfo(total.dtype).tiny)
    size = left.square().sum(-2).mean().sqrt()  # best has columns of length 1
    return Shared(_coloured(covariance, basis @ best) * size, pair / size**2, float(gone.sqrt()))


def fit_keys(w_q: Tensor, w_k: Tensor, covariance: Tensor | None = None, form: PairForm = "full") -> Shared:
    """Return W = w_k and the S_g with ``w_k S_g`` nearest to ``w_q[g]``: keys stay exact, queries are approximated.

    The one that rotary embedding allows: S stands before the rotation. ``w_q`` is ``[G, D, d]``. The error is that of
    the queries, ``||w_q - w_k S|| / ||w_q||``.
    """
    left, right = _whitened(covariance, w_q.double(), w_k.double())
    if form == "full":
        pair = torch.linalg.lstsq(right.expand(left.shape[0], -1, -1), left, driver="gelsd").solution  # [G, d, d]
    else:
        normal, wanted = right.mT @ right, right.mT @ left
        pair = _nearest_diagonal(normal, wanted) if form == "diag" else _nearest_symmetric(normal, wanted)
    tiny = torch.finfo(left.dtype).tiny
    gone = (left - right @ pair).square().sum() / left.square().sum().clamp(min=tiny)
    return Shared(w_k.double(), pair, float(gone.sqrt()))


def _nearest_diagonal(normal: Tensor, wanted: Tensor) -> Tensor:
    tiny = torch.finfo(normal.dtype).tiny
    return torch.diag_embed(wanted.diagonal(dim1=-2, dim2=-1) / normal.diagonal().clamp(min=tiny))


def _nearest_symmetric(normal: Tensor, wanted: Tensor) -> Tensor:
    """Solve ``A S + S A = B + Bᵀ``, what a symmetric S of least squares satisfies, in the eigenbasis of A."""
    values, basis = torch.linalg.eigh(normal)
    sums = (values[:, None] + values).clamp(min=values.abs().max() * torch.finfo(values.dtype).eps)
    found: Tensor = basis @ ((basis.mT @ (wanted + wanted.mT) @ basis) / sums) @ basis.mT
    return found


def fit_rotary(w_q: Tensor, w_k: Tensor, covariance: Tensor | None = None) -> Shared:
    """Return the complex w ``[D, F]`` nearest to complex ``w_q``, ``w_k`` ``[D, F]``, one column per rotated pair.

    Under rotary embedding a pair's score is Re(e^(i n) x Z xᵀ) with Z = w_q w_kᴴ; averaged over offsets n the error is
    ``||Z - w wᴴ||² / 2``. w is the eigenvector of (Z + Zᴴ) / 2 with the positive one of its two eigenvalues.
    """
    left, right = _whitened(covariance, w_q.to(torch.complex128), w_k.to(torch.complex128))
    basis, upper = torch.linalg.qr(torch.stack((left.mT, right.mT), -1))  # [F, D, 2], [F, 2, 2]
    middle = upper @ upper.flip(-1).mH / 2
    values, vectors = torch.linalg.eigh(middle)
    found = (basis @ vectors[..., -1:]).squeeze(-1) * values[:, -1:].clamp(min=0).sqrt()
    energy = left.abs().square().sum(0) * right.abs().square().sum(0)
    tiny = torch.finfo(torch.float64).tiny
    gone = (energy - values[:, -1].clamp(min=0).square()).clamp(min=0).sum() / energy.sum().clamp(min=tiny)
    weight = _coloured(covariance, found.mT)
    phase = weight[:1].conj() / weight[:1].abs().clamp(min=tiny)
    return Shared(weight * phase, None, float(gone.sqrt()))


def _candidates(products: Tensor, width: int) -> list[Tensor]:
    """Return orthonormal starts: both-sided energy, the symmetric part, and leading left and right directions."""
    both = torch.linalg.eigh((products @ products.mT + products.mT @ products).sum(0)).eigenvectors[:, -width:]
    values, vectors = torch.linalg.eigh((products + products.mT).sum(0) / 2)
    symmetric = vectors[:, values.abs().argsort()[-width:]]
    lefts = torch.linalg.eigh((products @ products.mT).sum(0)).eigenvectors
    rights = torch.linalg.eigh((products.mT @ products).sum(0)).eigenvectors
    half = width // 2
    halves = torch.linalg.qr(torch.cat((lefts[:, half - width :], rights[:, -half:]), 1)).Q if half else both
    return [both, symmetric, halves]


def _refined(weight: Tensor, products: Tensor, steps: int) -> Tensor:
    """Raise ``sum_g ||Wᵀ M_g W||²`` step by step. The shift makes every step sure; without it most are longer."""
    shift = 2 * torch.linalg.matrix_norm(products, 2).square().sum()
    width, best = weight.shape[1], _energy(weight, products)
    for _ in range(steps):
        inside = weight @ weight.mT
        outer = (products @ inside @ products.mT + products.mT @ inside @ products).sum(0)
        before = best
        for shifted in (outer, outer + shift * inside):
            tried = torch.linalg.eigh(shifted).eigenvectors[:, -width:]
            energy = _energy(tried, products)
            if energy > best:
                weight, best = tried, energy
                break
        if best - before <= 1e-15 * best:
            break
    return weight


def _energy(weight: Tensor, products: Tensor) -> Tensor:
    return (weight.mT @ products @ weight).square().sum()


def _in_span(*columns: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return an orthonormal basis of the span of all columns, and each block in that basis."""
    basis, upper = torch.linalg.qr(torch.cat(columns, dim=-1))
    return basis, tuple(upper.split([x.shape[-1] for x in columns], dim=-1))


def _whitened(covariance: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
    """Multiply by the square root of the covariance: Frobenius norms then weigh directions as the inputs do."""
    if covariance is None:
        return weights
    return tuple(_power(covariance, 0.5).to(weight.dtype) @ weight for weight in weights)


def _coloured(covariance: Tensor | None, weight: Tensor) -> Tensor:
    return weight if covariance is None else _power(covariance, -0.5).to(weight.dtype) @ weight


def _power(covariance: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance.double())
    whole: Tensor = (vectors * values.clamp(min=torch.finfo(torch.float64).tiny).pow(exponent)) @ vectors.mT
    return whole


def _positive(weight: Tensor) -> Tensor:
    """Fix the sign of every column: its largest entry is positive."""
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -weight, weight)


def _distance(w_q: Tensor, w_k: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ``||w_q w_kᵀ - left rightᵀ|| / ||w_q w_kᵀ||``."""
    gone, total = energies(w_q, w_k, left, right)
    return float((gone / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt())


def energies(w_q: Tensor, w_k: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``||w_q w_kᴴ - left rightᴴ||²`` and ``||w_q w_kᴴ||²`` of ``[.., D, n]``, without a D x D matrix."""
    _, (q, k, a, b) = _in_span(w_q, w_k, left, right)
    whole, ours = q @ k.mH, a @ b.mH
    return (whole - ours).abs().square().sum((-2, -1)), whole.abs().square().sum((-2, -1))
