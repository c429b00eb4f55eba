"""Tiny model folders and files with random weights, for tests of loading, the command line and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**{**sizes, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def llama_folder(folder: Path) -> Path:
    """Save the Llama with a tokenizer of one token per printable ASCII character."""
    llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": VOCABULARY - 1, **letters}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def llama_gguf(path: Path) -> Path:
    """Write the Llama above as one GGUF file, without a tokenizer."""
    config, weights = llama_config(), numpy.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    width, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    shapes = {"token_embd.weight": (VOCABULARY, width), "output_norm.weight": (width,)}
    shapes["output.weight"] = (VOCABULARY, width)
    for layer in range(config.num_hidden_layers):
        block = {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, weights.normal(size=shape, scale=0.1).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
