"""Compile a transformers model with ``backend="attnrewrite"``: the same outputs, by fused attention.

The model asks for the eager spelling: matmul, mask, softmax, matmul. Every layer of it is found, proved and
rewritten.
Without a variant the backend never changes what a model computes, so the outputs differ by rounding at most.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnrewrite


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    model = tiny_llama()
    ids = torch.randint(96, (2, 24))

    # A function is called with the report of every graph that is compiled; a path would make it a JSON file.
    reports: list[Any] = []
    # inner="eager" runs the rewritten graph as it is, which starts at once; without it, inductor compiles it.
    options = {"report": reports.append, "inner": "eager"}
    compiled = torch.compile(model, backend="attnrewrite", options=options)

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        logits = compiled(ids, use_cache=False).logits

    for report in reports:
        for site in report.sites:
            heads = f"{site.heads}/{site.kv_heads} heads of {site.head_dim}"
            print(f"{site.layer}  {site.source}  {heads}  {site.mask.kind}  {site.status} -> {site.variant}")

    difference = float((logits - expected).abs().max())
    print(f"largest difference of the logits: {difference:.1e}")

    rewritten = sum(report.summary["rewritten"] for report in reports)
    if rewritten != model.config.num_hidden_layers:
        raise SystemExit(f"{rewritten} of {model.config.num_hidden_layers} attention layers were rewritten")
    if difference > 1e-5:
        raise SystemExit("the rewritten model computes something else")

    # Options are checked: a misspelled one is an error that names the closest, never ignored.
    try:
        attnrewrite.Backend(varient="sdpa")
    except attnrewrite.AttnRewriteError as error:
        print(f"\n{error}")


if __name__ == "__main__":
    main()
