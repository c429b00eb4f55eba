"""What the tests of routing attention share: the worked example, random data, the definition row by row."""

from types import SimpleNamespace

import pytest
import torch

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
CAUSAL = {"is_causal": True, "paper_causal": True}
RULES = pytest.mark.parametrize("rule", ["topw", "argmax_window"])


def worked_example():
    """B 1, H 1, N 6, D 4, C 2, to be used with window size 3."""
    n = torch.arange(6, dtype=torch.float64)[:, None]
    c = torch.arange(4, dtype=torch.float64)
    data = SimpleNamespace(
        query=torch.sin(1 + 0.9 * n + 0.2 * c * (n + 1)),
        key=torch.cos(0.5 + 0.8 * n - 0.7 * c),
        value=torch.sin(0.3 * n * (c + 1) + 0.2 * c),
    )
    data = SimpleNamespace(**{name: tensor[None, None] for name, tensor in vars(data).items()})
    directions = torch.tensor([[1, 0.5, -0.5, -1], [-1, 1, 0.5, -0.5]], dtype=torch.float64)
    data.centroids = (2 * directions / directions.norm(dim=-1, keepdim=True))[None]
    return data


def random_routing(B, H, Hkv, N, D, C, *, S=None, Dv=None, dtype=torch.float64, seed=0):
    """Query, key, value requiring gradients, and centroids of norm sqrt(D)."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    S = S or N
    tensors = (draw(B, H, N, D), draw(B, Hkv, S, D), draw(B, Hkv, S, Dv or D))
    centroids = draw(Hkv, C, D)
    centroids = D**0.5 * centroids / centroids.norm(dim=-1, keepdim=True)
    return (*(tensor.to(dtype).requires_grad_() for tensor in tensors), centroids)


def ln0(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def best(values, count):
    """Positions of the largest values, ties to the lower position, ascending."""
    return sorted(sorted(range(len(values)), key=lambda n: (-values[n], n))[:count])


def clusters_of(affinities):
    return [max(range(len(row)), key=lambda c: (row[c], -c)) for row in affinities]


def meetings(query_affinity, key_affinity, rule, w, *, shared, causal, own_key=True):
    """The list of (query, keys) of one head, without mask and window. Affinities are lists of rows."""
    N, C = len(query_affinity), len(query_affinity[0])
    if rule == "topw":
        columns = [([row[c] for row in query_affinity], [row[c] for row in key_affinity]) for c in range(C)]
        return [(i, best(keys, w)) for queries, keys in columns for i in best(queries, w)]
    asked, offered = clusters_of(query_affinity), clusters_of(key_affinity)
    found = []
    for i in range(N):
        before = [j for j in range(i + 1) if offered[j] == asked[i]]
        after = [j for j in range(i + 1, N) if offered[j] == asked[i]]
        keys = before[-w:] if causal else before[len(before) - min(len(before), w - w // 2) :] + after[: w // 2]
        found.append((i, keys if shared or not own_key or i in keys else [*keys, i]))
    return found


def by_definition(
    query,
    key,
    value,
    centroids,
    w,
    *,
    rule="argmax_window",
    shared=False,
    normed=False,
    causal=False,
    window=None,
    scale=None,
    bias=None,
    self_logit=-5e4,
    shrink=0.0,
    own_key=True,
):
    """Routing attention one query at a time; the last three arguments make the variants that are not ours."""
    B, H, L, D = query.shape
    group = H // key.shape[1]
    out = torch.zeros(B, H, L, value.shape[-1], dtype=query.dtype)
    for b in range(B):
        for h in range(H):
            q, v, mu = query[b, h], value[b, h // group], centroids[h // group]
            k = q if shared else key[b, h // group]
            s, t = (ln0(q), ln0(k)) if normed else (q, k)
            affinities = [(ln0(x) @ mu.T).tolist() for x in (q, k)]
            count = torch.zeros(L, dtype=query.dtype)
            for i, keys in meetings(*affinities, rule, w, shared=shared, causal=causal, own_key=own_key):
                kept = [j for j in keys if not causal or (j <= i and (window is None or i - j < window))]
                if not kept:
                    continue
                logits = t[kept] @ s[i] * (D**-0.5 if scale is None else scale)
                if bias is not None:
                    logits = logits + bias.expand(B, H, L, L)[b, h, i, kept]
                if shared and self_logit is not None and i in kept:
                    logits[kept.index(i)] = self_logit
                out[b, h, i] += logits.softmax(0) @ v[kept]
                count[i] += 1
            out[b, h] /= (count + shrink).clamp(min=1)[:, None]
    return out


def detached(*tensors):
    return [tensor.detach().clone() for tensor in tensors]


def padding(*lengths, N, left=False):
    position = torch.arange(N)
    real = torch.stack([position >= N - n if left else position < n for n in lengths])
    return real[:, None, None]
