"""The attentions as plain functions on tensors, for models that one writes oneself.

Argument names and layout are those of torch's ``scaled_dot_product_attention``: query [B, H, L, D], key and
value [B, Hkv, S, D].
"""

import torch
import torch.nn.functional as F

from attnrewrite.functional import attention, selective_attention, ssa_attention, symmetric_attention


def main() -> None:
    torch.manual_seed(0)
    B, H, Hkv, L, D = 2, 4, 2, 12, 16
    query = torch.randn(B, H, L, D, requires_grad=True)
    key, value = torch.randn(B, Hkv, L, D), torch.randn(B, Hkv, L, D)

    # Plain attention: torch's own, plus a window and a soft cap.
    plain = attention(query, key, value, is_causal=True, enable_gqa=True)
    if not torch.equal(plain, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)):
        raise SystemExit("plain attention is not torch's")
    near = attention(query, key, value, is_causal=True, enable_gqa=True, window=3)
    moved = (near - plain).abs().amax((0, 1, 3)).detach()
    print(f"window 3: row 2 moves by {float(moved[2]):.2f}, row 5 by {float(moved[5]):.2f}")
    if bool(moved[:3].max() > 1e-6) or bool(moved[5] < 1e-3):
        raise SystemExit("the window does not begin at row 3")

    # Selective: is_causal=True is the default; gamma is the strength of the votes.
    none = selective_attention(query, key, value, enable_gqa=True, gamma=0.0)
    full = selective_attention(query, key, value, enable_gqa=True, selection_head=1)
    if not torch.allclose(none, plain, atol=1e-6):
        raise SystemExit("without votes, selective attention is not plain attention")
    if not torch.allclose(full[:, :, :3], plain[:, :, :3], atol=1e-6):
        raise SystemExit("votes reached the first three rows")
    print(f"selective: votes move row 11 by {float((full - plain)[:, :, 11].abs().max().detach()):.2f}")

    # SSA: a temperature per query and per value; 1 is plain attention, larger is sharper.
    ones_q, ones_v = torch.ones(B, H, L), torch.ones(B, Hkv, L)
    neutral = ssa_attention(query, key, value, ones_q, ones_v, is_causal=True, enable_gqa=True)
    if not torch.allclose(neutral, plain, atol=1e-6):
        raise SystemExit("at temperature 1, SSA is not plain attention")
    warmth = torch.full((B, H, L), 100.0, requires_grad=True)
    sharp = ssa_attention(query, key, value, warmth, ones_v, is_causal=True, enable_gqa=True)
    keys, values = (x.repeat_interleave(H // Hkv, dim=1) for x in (key, value))
    logits = (query @ keys.mT).masked_fill(torch.ones(L, L).triu(1) == 1, -torch.inf)
    best = values.gather(2, logits.argmax(-1, keepdim=True).expand(-1, -1, -1, D))
    share = float(((sharp - best).abs().amax(-1) < 1e-2).float().mean())
    print(f"ssa: at temperature 100, {share:.0%} of the queries take the value of their best key alone")
    if share < 0.8:
        raise SystemExit("a large temperature does not sharpen")

    # Symmetric: queries and keys are one tensor; pairwise: with a matrix per query head between them.
    pair = torch.eye(D).expand(H, D, D)
    if not torch.allclose(
        symmetric_attention(key, value, pair, enable_gqa=True), attention(keys, keys, values), atol=1e-6
    ):
        raise SystemExit("pairwise attention with the identity is not symmetric attention")

    # All are differentiable, in the temperatures and in gamma, too.
    gamma = torch.tensor(0.5, requires_grad=True)
    out = ssa_attention(query, key, value, warmth, ones_v, is_causal=True, enable_gqa=True)
    (out + selective_attention(query, key, value, enable_gqa=True, gamma=gamma)).square().sum().backward()
    if any(x.grad is None or not bool(x.grad.isfinite().all()) for x in (query, warmth, gamma)):
        raise SystemExit("a gradient is missing")
    print(f"gradient of gamma: {float(gamma.grad):.3f}")


if __name__ == "__main__":
    main()
