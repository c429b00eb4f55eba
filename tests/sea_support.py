"""What the tests of the sea reference share."""

import math
from fractions import Fraction
from types import SimpleNamespace

import torch

from attnrewrite.kernels.sea.cnn import Affine, CausalCnn, Cnn
from attnrewrite.kernels.sea.estimator import Estimator
from attnrewrite.kernels.sea.linear import draw_features
from attnrewrite.kernels.sea.reference import sea_attention
from attnrewrite.kernels.sea.selection import selected_pairs
from attnrewrite.kernels.sea.slices import visible_rows

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def half_up(number):
    return math.floor(number + Fraction(1, 2))


def visible_keys(L, *, is_causal=True, window=None, real=None):
    """The keys that each query sees, as lists; padding queries see none."""
    real = [True] * L if real is None else list(real)
    rows = []
    for i in range(L):
        low = 0 if window is None else max(0, i + 1 - window)
        keys = range(low, i + 1) if is_causal else range(L)
        rows.append([j for j in keys if real[j]] if real[i] else [])
    return rows


def chosen(estimated, seen, *, budget, rule="exact", grouping="causal_per_batch", rounding=half_up, capped=True):
    """The definition, slice by slice: sets of keys ``[head][query]`` for estimates ``[H, L, M]``."""
    H, L, M = estimated.shape
    p = torch.log_softmax(estimated, -1).tolist()
    sets = [[set() for _ in range(L)] for _ in range(H)]
    groups = [range(H)] if grouping == "causal_per_batch" else [[h] for h in range(H)]
    for i in range(L):
        n = len(seen[i])
        if n == 0:
            continue
        edges = [rounding(Fraction(m * n, M)) for m in range(M + 1)]
        for heads in groups:
            pixels = [(h, m) for h in heads for m in range(M) if rule == "paper" or edges[m + 1] > edges[m]]
            ratio = Fraction(M, n) if rule == "paper" else min(Fraction(M, n), 1)
            kept = min(max(rounding(len(heads) * budget * ratio), 1), len(pixels))
            for h, m in sorted(pixels, key=lambda pixel: (-p[pixel[0]][i][pixel[1]], *pixel))[:kept]:
                width = edges[m + 1] - edges[m]
                c = min(width, budget) if capped else width
                sets[h][i] |= {seen[i][edges[m + 1] - 1 - u * width // c] for u in range(c)}
    return sets


def attended(query, key, value, sets, *, scale=None, bias=None):
    """Attention to sets of keys ``[head][query]``; one batch row, ``[H, L, Dv]``."""
    H, L, D = query.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.zeros(H, L, value.shape[-1], dtype=query.dtype)
    for h in range(H):
        g = h * key.shape[0] // H
        for i in range(L):
            keys = sorted(sets[h][i])
            if keys:
                logits = key[g, keys] @ query[h, i] * scale
                logits = logits if bias is None else logits + bias[h, i, keys]
                out[h, i] = logits.softmax(0) @ value[g, keys]
    return out


def selected_sets(estimated, rule, **visibility):
    """The same sets as the library selects them, of one batch row."""
    _, H, L, _ = estimated.shape
    rows = visible_rows(L, L, **visibility)
    sets, total = [[set() for _ in range(L)] for _ in range(H)], 0
    for part, pairs in selected_pairs(estimated, rows, rule, 1):
        for r, t in pairs.used[0].nonzero().tolist():
            sets[int(pairs.head[0, r, t])][part.start + r].add(int(pairs.key[0, r, t]))
        total += int(pairs.used[0].sum())
    assert total == sum(len(keys) for head in sets for keys in head), "a pair is selected twice"
    return sets


def worked_example():
    """H 2, N 6, D 2, M 4, k 2, scale_prob .9, mix .75; all indices from 0."""
    h, t = torch.arange(2.0).reshape(1, 2, 1, 1).double(), torch.arange(6.0).reshape(1, 1, 6, 1).double()
    c, m = torch.arange(2.0).double(), torch.arange(4.0).double()
    return SimpleNamespace(
        query=torch.sin(1 + 0.7 * t + 1.1 * c + 0.5 * h),
        key=torch.cos(0.3 + 0.9 * t - 0.8 * c + 0.4 * h),
        value=torch.sin(0.2 + 0.5 * t * (c + 1) + 0.3 * h),
        estimated=2 * torch.sin(0.4 + 1.3 * t + 0.9 * m + 0.7 * h),
        scale_prob=torch.tensor(0.9, dtype=torch.float64),
        mix=torch.tensor(0.75, dtype=torch.float64),
    )


def draw_tensors(B, H, Hkv, L, D, M, *, Dv=None, dtype=torch.float64, seed=0):
    """Query, key, value, estimated, scale_prob, mix."""
    source = torch.Generator().manual_seed(seed)
    Dv = D if Dv is None else Dv
    shapes = ((B, H, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv), (B, H, L, M), (B, H, L), (B, H, L))
    drawn = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    drawn[3] = 2 * drawn[3]
    drawn[4:] = [tensor.sigmoid() for tensor in drawn[4:]]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def run(tensors, **options):
    """Causal attention to 3 keys per query and head, unless told otherwise."""
    query, key, value, estimated, scale_prob, mix = tensors
    options = {"is_causal": True, "enable_gqa": True, "budget": 3} | options
    return sea_attention(query, key, value, estimated, scale_prob=scale_prob, mix=mix, **options)


def draw_estimator(H, D, M, *, is_causal, Dv=None, shrink=2, channels=2, F=5, table=64, dtype=torch.float64, seed=0):
    """An estimator with weights of the size that default initialisation gives."""
    source = torch.Generator().manual_seed(seed)
    Dv = D if Dv is None else Dv
    narrow, wide = M // shrink, channels * H

    def affine(out, *inner):
        size = 1 / math.sqrt(math.prod(inner))
        return Affine(uniform(size, out, *inner), uniform(size, out))

    def uniform(size, *shape):
        return (size * (2 * torch.rand(shape, generator=source, dtype=torch.float64) - 1)).to(dtype)

    def norm(width):
        return Affine(1 + uniform(0.2, width), uniform(0.2, width))

    if is_causal:
        cnn = CausalCnn(
            norm(narrow), affine(wide, wide, 3, 3), affine(wide, wide, 3, 3), affine(H, wide, 1, 1), norm(M)
        )
    else:
        cnn = Cnn(affine(4 * H, wide, 3, 3), affine(4 * H, 4 * H, 3, 3), affine(H, 4 * H, 3, 3))
    return Estimator(
        features=draw_features(F, D, seed=seed),
        positions=torch.randn(table, D, generator=source, dtype=torch.float64).to(dtype) if table else None,
        encode=affine(2 * D, D + 2 * Dv),
        norm=norm(2 * D),
        rows=affine(channels * narrow, 2 * D),
        scales=affine(2, 2 * D),
        cnn=cnn,
        M=M,
    )
