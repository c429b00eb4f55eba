"""Attention of the dense family in three forms: the formula in float64, the formula as it is, and generated kernels.

On a GPU where there is one, else in triton's interpreter.
"""

from __future__ import annotations

import torch

from attnrewrite.functional import attention, selective_attention, ssa_attention
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.sdpa.reference import masked_softmax
from attnrewrite.kernels.selective.reference import seen_by, selection_penalty
from attnrewrite.kernels.ssa.reference import scaled
from attnrewrite.kernels.visibility import accumulation_dtype, additive, repeat_kv, visible

CAUSAL = {"is_causal": True}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def formula(
    query,
    key,
    value,
    attn_mask=None,
    *,
    is_causal=False,
    window=None,
    softcap=None,
    tau=None,
    rho=None,
    gamma=None,
    vote_query=None,
    vote_key=None,
    sinks=None,
    alibi_slopes=None,
):
    """Attention as an eager model writes it: products in the dtype of the inputs, softmax and votes in float32."""
    dtype, (L, S) = query.dtype, (query.shape[2], key.shape[2])
    wide = accumulation_dtype(dtype)
    query, value = (x if t is None else scaled(x, t) for x, t in ((query, tau), (value, rho)))
    seen = visible(L, S, is_causal=is_causal, window=window, attn_mask=attn_mask)
    logits = (query @ repeat_kv(key, query.shape[1]).mT).to(wide) * query.shape[-1] ** -0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        lag = torch.arange(L, device=query.device).unsqueeze(-1) - torch.arange(S, device=query.device)
        logits = logits - alibi_slopes.to(wide).view(-1, 1, 1) * lag.abs()
    bias = additive(attn_mask)
    logits = logits if bias is None else logits + bias.to(wide)
    if gamma is not None:
        votes = logits[:, 0]
        if vote_query is not None:
            votes = (vote_query @ vote_key.mT).to(wide) * vote_query.shape[-1] ** -0.5
        logits = logits - gamma * selection_penalty(votes, seen_by(seen, 0))[0].unsqueeze(1)
    if sinks is not None:
        column = sinks.to(wide).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        hidden = torch.zeros((), dtype=torch.bool, device=query.device) if seen is None else ~seen
        weights = torch.softmax(torch.cat((logits.masked_fill(hidden, -torch.inf), column), -1), -1)[..., :-1]
        return weights.to(dtype) @ repeat_kv(value, query.shape[1])
    return masked_softmax(logits, seen).to(dtype) @ repeat_kv(value, query.shape[1])


def ours(query, key, value, attn_mask=None, *, tau=None, rho=None, gamma=None, **how):
    how |= {"enable_gqa": True}
    if tau is not None:
        return ssa_attention(query, key, value, tau, rho, attn_mask, **how)
    if gamma is not None:
        return selective_attention(query, key, value, attn_mask, gamma=gamma, **how)
    return attention(query, key, value, attn_mask, **how)


def outputs(function, tensors, upstream, how):
    """The output, and the gradients by everything that has one."""
    out = function(**tensors, **how)
    learn = [x for x in tensors.values() if x.requires_grad]
    return [out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), learn)]


def widened(tensors):
    return {
        n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for n, x in tensors.items()
    }


def compare(tensors, draws=8, **how):
    """Check the bar for the output and every gradient.

    One draw says little about a gradient that is a sum over all pairs, or about products of size 1, where ordinary
    PyTorch may be exact by luck. What misses the bar in the first draw is decided by the root mean square over that
    draw and others, and ours may be off by a rounding step, for one number by several.
    """
    first = {name: three for name, *three in _three(tensors, how)}
    doubtful = {name: [three] for name, three in first.items() if _misses(*three)}
    for seed in range(1, draws) if doubtful else ():
        for name, *three in _three(shuffled(tensors, seed), how):
            if name in doubtful:
                doubtful[name].append(three)
    for name, threes in doubtful.items():
        off, bar = (torch.cat([(x[n].double() - x[2]).flatten() for x in threes]).norm() for n in (0, 1))
        size = torch.cat([x[2].abs().clamp(min=1.0).flatten() for x in threes]).norm()
        dtype, number = tensors["query"].dtype, threes[0][2].dim() == 0
        # One number is a sum over all pairs, of which the rounding errors may cancel in one of the two.
        steps = (32 if dtype == torch.float32 else 8) if number else 1
        step = steps * torch.finfo(dtype).eps * size
        assert off <= max(2 * bar, step), f"{name}: error {off:.2e}, ordinary {bar:.2e} over {draws} draws"


def _misses(found, ordinary, true):
    return (found.double() - true).norm() > 2 * (ordinary.double() - true).norm()


def shuffled(tensors, seed):
    """Another draw of the same numbers: every tensor of several numbers has them in another order; masks stay."""

    def other(x):
        if not x.is_floating_point():
            return x
        order = torch.randperm(x.numel(), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(x.device)
        return x.detach().flatten()[order].view_as(x).requires_grad_(x.requires_grad)

    return {name: other(x) for name, x in tensors.items()}


def _three(tensors, how):
    """Yield ours, ordinary PyTorch's and the true value of the output and of every gradient, with their names."""
    exact = widened(tensors)
    upstream = normal((*tensors["query"].shape[:3], tensors["value"].shape[3]), 7).to(tensors["query"].dtype)
    true = outputs(formula, exact, upstream, how)
    ordinary = outputs(formula, tensors, upstream, how)
    with kernels("triton"):
        found = outputs(ours, tensors, upstream, how)
    names = ["out", *(n for n, x in tensors.items() if x.requires_grad)]
    for name, a, b, c in zip(names, found, ordinary, true, strict=True):
        assert a.dtype == b.dtype, name
        yield name, a, b, c


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)


def drawn(L=63, S=None, H=2, Hkv=2, D=16, Dv=16, B=1, dtype=torch.float32, seed=0):
    source = torch.Generator("cpu").manual_seed(seed)
    shapes = {"query": (B, H, L, D), "key": (B, Hkv, S or L, D), "value": (B, Hkv, S or L, Dv)}
    made = {n: torch.randn(shape, generator=source, device="cpu") for n, shape in shapes.items()}
    return {n: x.to(DEVICE, dtype).requires_grad_() for n, x in made.items()}


def temperatures(tensors, seed=1):
    source = torch.Generator("cpu").manual_seed(seed)
    sizes = {"tau": tensors["query"].shape[:3], "rho": tensors["value"].shape[:3]}
    made = {n: torch.rand(size, generator=source, device="cpu") + 0.5 for n, size in sizes.items()}
    return {n: x.to(DEVICE).requires_grad_() for n, x in made.items()}
