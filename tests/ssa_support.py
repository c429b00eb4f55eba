"""What the tests of the ssa reference share."""

import math

import torch

from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def causal(L):
    return torch.ones(L, L, dtype=torch.bool).tril()


def weights_and_lse(query, key, tau_q):
    seen = causal(query.shape[2])
    logits = attention_logits(query * tau_q.unsqueeze(-1), key)
    return masked_softmax(logits, seen), logits.masked_fill(~seen, -math.inf).logsumexp(-1)


def spikiness_of(weights, seen):
    """|s|_1 / (n |s|_2^2) of each row, n its number of visible keys: 1 when uniform, 1 / n when one-hot."""
    return weights.sum(-1) / (seen.sum(-1) * weights.square().sum(-1))
