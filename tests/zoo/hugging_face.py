"""Tiny models of many families of transformers, with random weights, from their own configs.

A config is made small by one table of sizes; what a family needs beside it stands in ``FAMILIES``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from zoo.family import BATCH, HEADS, WIDTH, Facts, Family, ids, normal

SOURCE = "transformers"
KV_HEADS = 2

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads",), HEADS),
    "num_key_value_heads": KV_HEADS,
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("hidden_dim", "ffn_hidden_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_encoder_ffn_dim", "num_decoder_ffn_dim"), 64),
    **dict.fromkeys(("vocab_size", "n_words"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_2d_position_embeddings"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    "word_embed_proj_dim": WIDTH,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 8,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Set every size that the config, or a config in it, has."""
    for name, value in _SIZES.items():
        if isinstance(config.__dict__.get(name), int):
            setattr(config, name, value)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):  # every layer runs, in training too
        if name in config.__dict__:
            setattr(config, name, 0.0)
    for inner in list(config.__dict__.values()):
        if isinstance(inner, PretrainedConfig):
            shrink(inner)
    if isinstance(config.__dict__.get("layer_types"), list):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def text(model: nn.Module) -> dict[str, Any]:
    """Token ids, also for the decoder of a pair."""
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids()}
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = ids(9)
    return inputs


def image(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, 3, 32, 32)}


def video(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": normal(BATCH, model.config.num_frames, 3, 32, 32)}


def image_and_text(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": ids(), **image(model)}


def wave(model: nn.Module) -> dict[str, Any]:
    return {"input_values": normal(BATCH, 4000)}


def _features(bins: int, length: int) -> Callable[[nn.Module], dict[str, Any]]:
    def make(model: nn.Module) -> dict[str, Any]:
        taken = inspect.signature(model.forward).parameters
        decoder = {"decoder_input_ids": ids(9)} if "decoder_input_ids" in taken else {}
        return {"input_features": normal(BATCH, bins, length), **decoder}

    return make


def states(model: nn.Module) -> dict[str, Any]:
    steps = torch.arange(5).expand(BATCH, 5)
    sizes = {"states": model.config.state_dim, "actions": model.config.act_dim, "rewards": 1, "returns_to_go": 1}
    return {"timesteps": steps, **{name: normal(BATCH, 5, size) for name, size in sizes.items()}}


def series(model: nn.Module) -> dict[str, Any]:
    return {"past_values": normal(BATCH, model.config.context_length, model.config.num_input_channels)}


def _family(
    name: str,
    changes: dict[str, Any] | None = None,
    inputs: Callable[[nn.Module], dict[str, Any]] = text,
    heads: int | None = None,
) -> Family:
    """One model type: what its config needs beside small sizes, and what it is fed.

    ``heads`` is for a family whose config gives the number of heads in another way.
    """
    make = functools.partial(_make, name, changes or {})
    return Family(SOURCE, name, make, functools.partial(_inputs, inputs), lambda model: facts(model.config, heads))


def _make(name: str, changes: dict[str, Any], implementation: str) -> nn.Module:
    transformers.logging.set_verbosity_error()
    config = shrink(AutoConfig.for_model(name))
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=implementation)


def _inputs(inputs: Callable[[nn.Module], dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments of one call, without a cache."""
    taken = inspect.signature(model.forward).parameters
    return {**inputs(model), **({"use_cache": False} if "use_cache" in taken else {})}


def facts(config: Any, told: int | None = None) -> Facts:
    """Return what a config and the configs in it allow; ``told`` is the number of heads where they do not say it."""
    configs = list(_configs(config))
    heads = _numbers(configs, "num_attention_heads", "num_heads", "num_decoder_attention_heads", "n_head", "n_heads")
    heads |= _numbers(configs, "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads")
    heads = heads if told is None else frozenset({told})
    kv_heads = _numbers(configs, "num_key_value_heads", "num_kv_heads") | heads | {1}
    windows = _numbers(configs, "sliding_window", "window_size", "local_attention", "attention_window_size") | {None}
    caps = _numbers(configs, "attn_logit_softcapping", "attention_logits_soft_cap") | {None}
    return Facts(heads, kv_heads, windows, caps)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for inner in vars(config).values():
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            yield from _configs(inner)


def _numbers(configs: list[Any], *names: str) -> frozenset[Any]:
    found: set[Any] = set()
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            found |= set(value) if isinstance(value, list | tuple) else {value}
    return frozenset(found - {None})


def _plain(names: str, inputs: Callable[[nn.Module], dict[str, Any]] = text) -> list[Family]:
    return [_family(name, inputs=inputs) for name in names.split()]


_ROTARY = {"rotary_dim": 8}
_LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
_LATENT |= {"num_key_value_heads": HEADS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 4}
_SWIN = {"num_heads": [2, 4], "depths": [2, 2], "embed_dim": 16, "hidden_size": 32, "window_size": 2, "patch_size": 4}

FAMILIES: list[Family] = [
    *_plain("albert bart bert big_bird biogpt blenderbot bloom cohere cohere2"),
    _family("convbert", heads=HEADS // 2),  # head_ratio: half the heads attend, the others are convolutions
    *_plain("data2vec-text deberta deberta-v2"),
    *_plain("distilbert doge electra ernie falcon fnet gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo"),
    *_plain(
        "gpt_neox gpt_oss granite imagegpt jetmoe layoutlm llama m2m_100 marian mbart megatron-bert mistral mixtral"
    ),
    *_plain("mobilebert modernbert mpnet mpt mt5 nystromformer olmo olmo2 opt pegasus persimmon phi phi3 plbart"),
    *_plain(
        "prophetnet qwen2 qwen2_moe qwen3 rembert roberta roc_bert roformer smollm3 squeezebert stablelm starcoder2"
    ),
    *_plain(
        "t5 tapas umt5 xglm xlm-roberta xlnet diffllama granite_swa mimo_v2_flash olmo3 exaone4 bigbird_pegasus mvp"
    ),
    *_plain("nllb-moe canine yoso mra visual_bert markuplm internlm3 helium arcee apertus seed_oss vaultgemma jamba"),
    *_plain(
        "olmoe phimoe ctrl xlm-roberta-xl nomic_bert eurobert jina_embeddings_v3 modernbert-decoder splinter ibert"
    ),
    *_plain("cpmant recurrent_gemma deepseek_v4"),
    *_plain("beit deit dinov2 vit vit_mae yolos dpt ijepa mobilevit segformer glpn pvt pvt_v2 cvt", image),
    *_plain("clip_vision_model siglip_vision_model sam_vision_model", image),
    *_plain("clip_text_model"),
    *_plain("wav2vec2 wavlm hubert sew unispeech wav2vec2-conformer", wave),
    *_plain("clip groupvit owlvit blip vilt", image_and_text),
    *_plain("videomae vivit timesformer", video),
    _family("codegen", _ROTARY),
    _family("gptj", _ROTARY),
    _family("esm", {"vocab_size": 99, "mask_token_id": 4, "pad_token_id": 0}),
    _family("flaubert", {"emb_dim": WIDTH, "n_words": 99}),
    _family("xlm", {"emb_dim": WIDTH, "n_words": 99}),
    _family("luke", {"entity_vocab_size": 20}),
    _family("openai-gpt"),
    _family("qwen3_next", {"layer_types": ["full_attention", "full_attention"]}),
    _family("swin", _SWIN, image),
    _family("swinv2", _SWIN, image),
    _family("donut-swin", _SWIN, image),
    _family("maskformer-swin", _SWIN, image),
    _family("deepseek_v2", {**_LATENT, "num_experts_per_tok": 2}),
    _family("deepseek_v3", _LATENT),
    _family("minicpm3", _LATENT),
    _family("hunyuan_v1_dense", {"head_dim": 8}),
    _family("ministral", {"head_dim": 8}),
    _family("decision_transformer", inputs=states),
    _family("patchtst", {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2}, series),
    _family("whisper", {"num_mel_bins": 16, "max_source_positions": 32}, _features(16, 64)),
    _family("speech_to_text", {"input_feat_per_channel": 16, "conv_channels": 32}, lambda m: _speech(m)),
    _family("wav2vec2-bert", {"feature_projection_input_dim": 16}, lambda m: {"input_features": normal(BATCH, 24, 16)}),
    _family("sew-d", inputs=wave),
    _family("pegasus_x"),
    _family("fsmt"),
    _family("led"),
    _family("longformer"),
]


def _speech(model: nn.Module) -> dict[str, Any]:
    return {"input_features": normal(BATCH, 64, 16), "decoder_input_ids": ids(9)}
