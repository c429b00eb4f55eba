"""Selective attention three ways: ``raw`` by the backend, ``gate`` by ``convert``, and in a mixed plan.

``raw`` has no parameters, so the backend can apply it to an untouched model; it changes what the model
computes and is meant for training from scratch. ``gate`` adds one number per layer, 0 at the start, so that a
converted model starts as it was.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnrewrite
from attnrewrite import SelectiveConfig, SSAConfig


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    # The votes of earlier queries lie in no key-value cache, so selective attention needs whole sequences.
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def main() -> None:
    model = tiny_llama()
    ids = torch.randint(96, (2, 24))
    plain = logits_of(model, ids)

    backend = attnrewrite.Backend(variant=SelectiveConfig(mode="raw"), inner="eager")
    raw = logits_of(torch.compile(model, backend=backend), ids)
    print(f"raw: the logits move by up to {float((raw - plain).abs().max()):.2g}")
    if torch.allclose(raw, plain, atol=1e-3):
        raise SystemExit("nobody voted")
    if not torch.allclose(raw[:, :3], plain[:, :3], atol=1e-4):
        raise SystemExit("no vote can reach the first three positions")

    inputs = {"input_ids": ids, "use_cache": False}
    attnrewrite.convert(model, SelectiveConfig(mode="gate"), example_kwargs=inputs)
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("selective.gamma")]
    shut = logits_of(model, ids)
    with torch.no_grad():
        for gamma in gates:
            gamma.fill_(1.0)
    opened = logits_of(model, ids)
    print(f"gate: {len(gates)} new numbers; at 0 the model is as it was, at 1 it is the raw form")
    if not torch.allclose(shut, plain, atol=1e-4) or not torch.allclose(opened, raw, atol=1e-4):
        raise SystemExit("the gate does not lead from plain to raw")
    attnrewrite.restore(model)

    # Globs on layer paths: the first that matches a layer is taken; layers without a match stay as they are.
    plan = {"model.layers.0.*": SelectiveConfig(), "model.layers.1.*": SSAConfig()}
    attnrewrite.convert(model, plan, example_kwargs=inputs)
    new = [name for name, _ in model.named_parameters() if ".selective." in name or ".ssa." in name]
    print("mixed:", *new, sep="\n  ")
    if len(new) != 1 + 4 or any(".layers.2." in name for name in new):
        raise SystemExit("the plan was not followed")
    if not torch.allclose(logits_of(model, ids), plain, atol=1e-4):
        raise SystemExit("the mixed model does not start as the same function")


if __name__ == "__main__":
    main()
