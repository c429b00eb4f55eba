"""Explain what attention two models hold: one written by hand in the manner of nanoGPT, and a BERT.

``explain`` captures a model and matches; it compiles and changes nothing. Every attention becomes a row with
layer, source line, heads, mask and scale; what cannot be rewritten, or is a softmax but no attention, is said
with a code and a hint.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import attnrewrite


class CausalSelfAttention(nn.Module):
    """Attention with the mask in a buffer, as nanoGPT writes it."""

    def __init__(self, width: int, heads: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(length, length))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Attend causally over [B, T, C]."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        weights = self.dropout(F.softmax(scores, dim=-1))
        return self.c_proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C))


class SmallGPT(nn.Module):
    """Attention that can be rewritten, attention with active dropout, and a router that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = CausalSelfAttention(32, 4, 64)
        self.dropped = CausalSelfAttention(32, 4, 64, dropout=0.1)
        self.router = nn.Linear(32, 3)
        self.experts = nn.Linear(32, 3 * 32)

    def forward(self, x: Tensor) -> Tensor:
        """Attend twice, then mix the experts."""
        x = x + self.plain(x)
        x = x + self.dropped(x)
        shares = self.router(x).softmax(-1)  # which expert a token goes to
        return x + (shares.unsqueeze(-1) * self.experts(x).unflatten(-1, (3, 32))).sum(-2)


def show(title: str, report: Any) -> None:
    print(f"{title}: {report.summary}")
    for site in report.sites:
        shape = f"{site.heads} heads of {site.head_dim}, {site.query_length} x {site.key_length}"
        facts = f"{shape}, {site.mask.kind}, scale {site.scale:.3g}"
        print(f"  {site.layer}  {site.source}  {facts}: {site.status}")
        print(f"    written as {', '.join(site.spelling)}; certificate {site.certificate}")
        for rejection in site.rejections:
            print(f"    {rejection.code} {rejection.title}: {rejection.detail}")
            print(f"    hint: {rejection.hints[0]}")
    for rejection in report.rejections:
        print(f"  {rejection.layer or '(top level)'}  {rejection.source}  {rejection.code} {rejection.title}")
        print(f"    {rejection.detail}")


def main() -> None:
    torch.manual_seed(0)
    gpt = SmallGPT().train()
    report = attnrewrite.explain(gpt, torch.randn(2, 16, 32))
    show("written by hand, in train mode", report)

    plain, dropped = report.sites
    if plain.status != "matched" or plain.mask.kind != "causal" or plain.certificate != "proved":
        raise SystemExit("the attention without dropout was not recognised")
    if [rejection.code for rejection in dropped.rejections] != ["AR206"]:
        raise SystemExit("active dropout was not refused")
    if [rejection.code for rejection in report.rejections] != ["AR202"]:
        raise SystemExit("the router was not told from attention")

    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    bert = BertModel(config).eval()
    ids = torch.randint(96, (2, 16))
    attention_mask = torch.ones(2, 16, dtype=torch.long)
    attention_mask[0, 12:] = 0
    print()
    report = attnrewrite.explain(bert, ids, attention_mask=attention_mask)
    show("BERT with a padding mask", report)
    if report.summary["matched"] != 2 or any(site.mask.kind != "padding" for site in report.sites):
        raise SystemExit("BERT's attention was not recognised")


if __name__ == "__main__":
    main()
