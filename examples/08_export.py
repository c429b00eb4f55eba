"""Write a converted model for other runtimes and compilers: a program that torch alone can run, and MLIR.

The file holds the rewritten attention in plain operators of torch, so whoever loads it needs neither this library nor
the one that the model is from. MLIR needs torch-mlir: pip install 'attnrewrite[mlir]'.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

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
    attnrewrite.convert(model, attnrewrite.SelectiveConfig(), example_inputs=(ids,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".selective." in name:  # in place of training
                parameter.fill_(0.7)

    any_length = {"input_ids": {1: Dim("length", min=2, max=128)}}
    with tempfile.TemporaryDirectory() as scratch:
        path = attnrewrite.export(model, (ids,), Path(scratch) / "llama.pt2", dynamic_shapes=any_length)
        program = torch.export.load(path).module()
        for length in (16, 23):
            other = torch.randint(96, (2, length))
            with torch.no_grad():
                difference = (program(other)["logits"] - model(other, use_cache=False).logits).abs().max()
            print(f"{length} tokens: the program's logits differ by {difference:.1e}")
            if difference > 1e-5:
                raise SystemExit("the program computes something else")

        if find_spec("torch_mlir") is None:
            print("no torch-mlir, no MLIR")
            return
        path = attnrewrite.export(model, (ids,), Path(scratch) / "llama.mlir", "mlir-torch", dynamic_shapes=any_length)
        print(next(line for line in path.read_text().splitlines() if "func.func" in line).strip())


if __name__ == "__main__":
    main()
