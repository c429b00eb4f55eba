"""Register one's own way of writing attention, so that it is found, proved and rewritten as any other.

The model attends with powers of two and divides by their sum after the product with the values.
"""

import math

import torch
from torch import nn

import attnrewrite


def own_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention on [B, H, L, D], with 2^x in place of e^x and the division at the end."""
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 * math.log2(math.e))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights @ value) / weights.sum(-1, keepdim=True)


class Layer(nn.Module):
    """Multi-head self-attention through ``own_attention``."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, L, width]."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return self.out(own_attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()).eval(), torch.randn(2, 24, 64)
    before = attnrewrite.explain(model, x)
    print(f"before: {before.summary['sites']} attentions found")

    # The sizes of the examples do not matter: a match may have any.
    query, key = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 9, 16)
    attnrewrite.register_pattern("powers of two", own_attention, (query, key, key), is_causal=True)
    reports = []
    compiled = torch.compile(model, backend=attnrewrite.Backend(inner="eager", report=reports.append))
    with torch.no_grad():
        worst = float((compiled(x) - model(x)).abs().max())
    for site in reports[0].sites:
        print(site.layer, site.spelling[0], site.mask.kind, site.certificate, site.status)
    if reports[0].summary["rewritten"] != 2 or worst > 1e-5:
        raise SystemExit(f"expected two rewritten layers, equal in value: {reports[0].summary}, {worst:.1e}")

    # What is no attention is refused.
    try:
        attnrewrite.register_pattern("not causal", own_attention, (query, key, key))
    except attnrewrite.AttnRewriteError as error:
        print(error.code, error.detail)
    else:
        raise SystemExit("a causal pattern was taken for one without a mask")
    attnrewrite.unregister_pattern("powers of two")


if __name__ == "__main__":
    main()
