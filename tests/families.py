"""The model families of the recogniser's first reach, tiny and with random weights, and what their configs say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

LENGTH, BATCH, HEADS, HEAD_DIM = 12, 2, 4, 8
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_TEXT = {"vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """How to build one family, and the facts that a report must recover."""

    name: str
    build: Callable[[str], nn.Module]
    layers: tuple[str, ...]
    masks: tuple[str, ...]
    kv_heads: int = HEADS
    scale: float = HEAD_DIM**-0.5
    softcap: float | None = None
    bias: tuple[bool, ...] = ()
    implementations: tuple[str, ...] = ("eager", "sdpa")
    padded: bool = True
    inputs: Callable[[], dict[str, Any]] = field(default=lambda: text_inputs())


def text_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 64, (BATCH, LENGTH), generator=generator), "use_cache": False}


def _encoder_inputs() -> dict[str, Any]:
    return {"input_ids": text_inputs()["input_ids"]}


def _t5_inputs() -> dict[str, Any]:
    inputs = text_inputs()
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :9]}


def _image_inputs() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Add a padding mask: three tokens on the left of the first sequence."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {**inputs, "attention_mask": mask}


def _paths(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(n) for n in range(2))


def _t5(impl: str) -> nn.Module:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    config._attn_implementation = impl
    return T5ForConditionalGeneration(config)


def _llama(impl: str) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attn_implementation=impl, **_TEXT, **_SIZES))


def _gpt2(impl: str) -> nn.Module:
    rates = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_implementation=impl, **rates))


def _bert(impl: str) -> nn.Module:
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return BertModel(BertConfig(attn_implementation=impl, **rates, **_TEXT, **_SIZES))


def _vit(impl: str) -> nn.Module:
    return ViTModel(ViTConfig(image_size=32, patch_size=8, intermediate_size=64, attn_implementation=impl, **_SIZES))


def _opt(impl: str) -> nn.Module:
    sizes = {"vocab_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(attn_implementation=impl, dropout=0.0, **sizes, **_SIZES))


def _neox(impl: str) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(attn_implementation=impl, **_TEXT, **_SIZES))


def _gemma2(impl: str) -> nn.Module:
    config = Gemma2Config(
        num_key_value_heads=2, head_dim=8, sliding_window=8, attn_implementation=impl, **_TEXT, **_SIZES
    )
    return Gemma2ForCausalLM(config)


def _gpt_oss(impl: str) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, **_SIZES, **_TEXT}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(attn_implementation=impl, rope_parameters=rope, **sizes, **experts)
    model = GptOssForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(weight)
    return model


_T5_LAYERS = (
    *_paths("encoder.block.{}.layer.0.SelfAttention"),
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
    "decoder.block.1.layer.0.SelfAttention",
    "decoder.block.1.layer.1.EncDecAttention",
)
_CAUSAL = ("causal", "causal")

FAMILIES = [
    Family("llama", _llama, _paths("model.layers.{}.self_attn"), _CAUSAL, kv_heads=2),
    Family("gpt2", _gpt2, _paths("transformer.h.{}.attn"), _CAUSAL),
    Family("bert", _bert, _paths("encoder.layer.{}.attention.self"), ("none", "none"), inputs=_encoder_inputs),
    Family(
        "t5",
        _t5,
        _T5_LAYERS,
        ("none", "none", "causal", "none", "causal", "none"),
        scale=1.0,
        bias=(True, True, True, False, True, False),
        inputs=_t5_inputs,
    ),
    Family("vit", _vit, _paths("layers.{}.attention"), ("none", "none"), padded=False, inputs=_image_inputs),
    Family("opt", _opt, _paths("model.decoder.layers.{}.self_attn"), _CAUSAL),
    Family("gpt_neox", _neox, _paths("gpt_neox.layers.{}.attention"), _CAUSAL),
    Family(
        "gemma2",
        _gemma2,
        _paths("model.layers.{}.self_attn"),
        ("window", "causal"),
        kv_heads=2,
        scale=256**-0.5,
        softcap=50.0,
        implementations=("eager",),
    ),
    Family(
        "gpt_oss",
        _gpt_oss,
        _paths("model.layers.{}.self_attn"),
        ("window", "causal"),
        kv_heads=2,
        implementations=("eager",),
    ),
]


def build(family: Family, implementation: str) -> nn.Module:
    """Return the model in eval mode with its random weights."""
    torch.manual_seed(0)
    return family.build(implementation).eval()
