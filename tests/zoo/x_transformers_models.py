"""Families of x-transformers, made small: one per switch of its attention."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import nn
from zoo.family import HEADS, WIDTH, Facts, Family, ids, modules_facts

SOURCE = "x-transformers"
HEAD_DIM = WIDTH // HEADS

SWITCHES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "rotary": {"rotary_pos_emb": True},
    "ALiBi": {"alibi_pos_bias": True},
    "T5 bias": {"rel_pos_bias": True},
    "dynamic bias": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "grouped": {"attn_kv_heads": 2},
    "one KV head": {"attn_one_kv_head": True},
    "qk norm": {"attn_qk_norm": True, "attn_qk_norm_scale": 4.0},
    "qk norm, learned": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "memory keys": {"attn_num_mem_kv": 3},
    "null key": {"attn_add_zero_kv": True},
    "soft-cap": {"attn_softclamp_logits": True},
    "talking heads before": {"attn_pre_talking_heads": True},
    "talking heads after": {"attn_post_talking_heads": True},
    "head scale": {"attn_head_scale": True},
    "gated values": {"attn_gate_values": True},
    "gated heads": {"attn_gate_value_heads": True},
    "wider values": {"attn_value_dim_head": 12},
    "window": {"attn_max_attend_past": 4},
    "sparse top-k": {"attn_sparse_topk": 4},
    "residual scores": {"residual_attn": True},
    "sinks": {"attn_head_learned_sink": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "contextual positions": {"attn_use_cope": True, "attn_cope_max_pos": 8},
    "xpos": {"rotary_pos_emb": True, "rotary_xpos": True},
    "polar positions": {"polar_pos_emb": True},
    "L2 distance": {"attn_l2_distance": True},
    "selective": {"attn_selective": True},
    "laser": {"attn_laser": True},
    "value residual": {"add_value_residual": True},
    "latent keys and values": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16},
    "signed weights": {"attn_cog_signed": True},
    "sigmoid": {"attn_sigmoid": True},
}


def _make(options: dict[str, Any], implementation: str) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    fused = {"attn_flash": True} if implementation == "sdpa" else {}
    try:
        layers = Decoder(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=HEAD_DIM, verbose=False, **fused, **options)
    except AssertionError as refusal:  # fused, with a switch that it has not
        raise ValueError(str(refusal)) from None
    return TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers)


def _facts(model: nn.Module) -> Facts:
    past = {getattr(module, "max_attend_past", None) for module in model.modules()} - {None}
    caps = {getattr(module, "logit_softclamp_value", None) for module in model.modules()} | {None}
    windows = frozenset({None, *(number + 1 for number in past)})
    return replace(modules_facts(model), windows=windows, softcaps=frozenset(caps))


FAMILIES = [
    Family(
        SOURCE, name, functools.partial(_make, options), lambda model: {"x": ids()}, _facts, needs=("x-transformers",)
    )
    for name, options in SWITCHES.items()
]
