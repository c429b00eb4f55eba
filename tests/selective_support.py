"""What the tests of the selective reference share."""

import math
from types import SimpleNamespace

import torch

from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax
from attnrewrite.kernels.selective.reference import selection_penalty

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def causal(L):
    return torch.ones(L, L, dtype=torch.bool).tril()


def parts(query, key, seen, *, gamma=1.0, selection_head=0, protect_first=True):
    """Everything between the logits and the weights; ``seen`` is [L, L] or [B, L, L]."""
    logits = attention_logits(query, key)
    penalty, state = selection_penalty(logits[:, selection_head], seen, protect_first=protect_first)
    mask = seen if seen.dim() == 2 else seen.unsqueeze(1)
    penalized = logits - gamma * penalty.unsqueeze(1)
    return SimpleNamespace(
        logits=logits,
        penalty=penalty,
        state=state,
        penalized=penalized,
        weights=masked_softmax(penalized, mask),
        lse=penalized.masked_fill(~mask, -math.inf).logsumexp(-1),
    )


def dense_formula(query, key, value, *, seen=None, inclusive=False, protect=0, own_votes=False, future_votes=False):
    """The definition, pair by pair, with switches for the usual mistakes; selection head 0, one batch row."""
    L, H, Hkv = query.shape[2], query.shape[1], key.shape[1]
    seen = causal(L) if seen is None else seen
    heads = [h * Hkv // H for h in range(H)]
    logits = torch.stack([query[0, h] @ key[0, g].T for h, g in enumerate(heads)]) / math.sqrt(query.shape[-1])
    votes = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        for j in range(L):
            may = (seen[i, j] or future_votes) and (i != j or own_votes) and j != protect
            votes[i, j] = max(logits[0, i, j].item(), 0.0) if may else 0.0
    penalty = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        penalty[i] = votes[: i + 1 if inclusive else i].sum(0)
    out = torch.zeros(1, H, L, value.shape[-1], dtype=torch.float64)
    for h, g in enumerate(heads):
        for i in range(L):
            if seen[i].any():
                keys = seen[i].nonzero().flatten()
                out[0, h, i] = torch.softmax(logits[h, i, keys] - penalty[i, keys], 0) @ value[0, g, keys]
    return out
