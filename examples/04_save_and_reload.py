"""Save a converted model and load it again, to the last bit: JSON and safetensors, no pickle.

The folder is that of the base model, which transformers still loads as it was, with the conversion beside it.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attnrewrite


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    model = tiny_llama()
    ids = torch.randint(96, (2, 16))
    with torch.no_grad():
        base_logits = model(ids, use_cache=False).logits

    attnrewrite.convert(model, attnrewrite.SSAConfig(), example_inputs=(ids,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ssa." in name:  # in place of training
                parameter.normal_(std=0.3)
        expected = model(ids, use_cache=False).logits

    with tempfile.TemporaryDirectory() as scratch:
        folder = attnrewrite.save_pretrained(model, Path(scratch) / "llama-ssa")
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size:9,} bytes  {file.name}")

        # The folder alone: base and conversion.
        reloaded = attnrewrite.load_pretrained(folder)
        # Or the conversion into a base that is there already.
        loaded_into = attnrewrite.load_pretrained(tiny_llama(), folder)
        # transformers by itself reads the base and leaves the conversion alone.
        base = AutoModelForCausalLM.from_pretrained(folder)

    with torch.no_grad():
        for what, found in (("the folder alone", reloaded), ("into a base", loaded_into)):
            if not torch.equal(found(ids, use_cache=False).logits, expected):
                raise SystemExit(f"loaded from {what}, the model gives other logits")
        if not torch.equal(base(ids, use_cache=False).logits, base_logits):
            raise SystemExit("the saved base is not the base")
    if torch.equal(expected, base_logits):
        raise SystemExit("the conversion does nothing")
    print("the same logits, bit for bit; the base alone gives its own")


if __name__ == "__main__":
    main()
