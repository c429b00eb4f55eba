"""Families of timm, made small; attention is written out or fused, as timm's own switch says."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from zoo.family import BATCH, Family, normal

SOURCE = "timm"

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
_STAGES = {"depths": (1, 1, 1, 1)}

CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, _VIT),
    "deit3_small_patch16_224": (32, _VIT),
    "vit_relpos_small_patch16_224": (32, _VIT),
    "vit_srelpos_small_patch16_224": (32, _VIT),
    "vit_base_patch16_rope_224": (32, _VIT),
    "beit_base_patch16_224": (32, _VIT),
    "eva02_tiny_patch14_224": (32, _VIT),
    "naflexvit_base_patch16_gap": (32, {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}),
    "samvit_base_patch16": (32, {**_VIT, "window_size": 2, "global_attn_indexes": (1,), "neck_chans": 16}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (32, _SWIN),
    "swinv2_tiny_window8_256": (32, _SWIN),
    "swinv2_cr_tiny_224": (32, _SWIN),
    "cait_xxs24_224": (32, {**_VIT, "depth_token_only": 1}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}),
    "convit_tiny": (32, {**_VIT, "local_up_to_layer": 1}),
    "levit_128s": (64, {"img_size": 64, "embed_dim": (16, 32, 48), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "twins_pcpvt_small": (64, {"img_size": 64, "embed_dims": (16, 32, 40, 32), "depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "embed_dims": (16, 32, 32, 32), "depths": (1, 1, 2, 1)}),
    "pit_ti_224": (64, {"img_size": 64}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_outer": 4}),
    "coat_tiny": (64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "volo_d1_224": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "crossvit_tiny_240": (
        240,
        {"depth": ((1, 1, 0), (1, 1, 0)), "embed_dim": (32, 64), "num_heads": (2, 4)},
    ),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 48)}),
    "efficientformerv2_s0": (64, {"img_size": 64, "depths": (1, 1, 2, 2)}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3}),
    "botnet26t_256": (64, {"img_size": 64}),
    "halonet26t": (256, {}),
    "lambda_resnet26t": (64, {}),
    "edgenext_xx_small": (64, {"depths": (1, 2, 2, 2)}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 2, 2)}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "fastvit_sa12": (64, {"layers": (1, 1, 1, 1)}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}),
    "tiny_vit_5m_224": (224, {"depths": (1, 1, 1, 1)}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "vitamin_small_224": (64, {"img_size": 64}),
    "nextvit_small": (64, {}),
    "swiftformer_xs": (64, {"layers": (1, 1, 1, 1)}),
    "shvit_s1": (64, {}),
    "resnest14d": (64, {}),
}


def _make(name: str, options: dict[str, Any], implementation: str) -> nn.Module:
    import timm

    timm.layers.set_fused_attn(implementation == "sdpa")
    model = timm.create_model(name, num_classes=7, **options)
    if implementation == "sdpa" and not any(getattr(module, "fused_attn", False) for module in model.modules()):
        raise ValueError("written out only")
    return model


def _pixels(size: int, model: nn.Module) -> dict[str, Tensor]:
    return {"x": normal(BATCH, 3, size, size)}


_NEEDS = ("timm", "torchvision")

FAMILIES = [
    Family(SOURCE, name, functools.partial(_make, name, options), functools.partial(_pixels, size), needs=_NEEDS)
    for name, (size, options) in CONFIGS.items()
]
