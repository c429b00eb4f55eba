"""Families of torchvision, made small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from zoo.family import BATCH, Family, normal

SOURCE = "torchvision"


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7
    )


def _swin(second: bool) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    forms: dict[str, Any] = {}
    if second:
        forms = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=7, **forms)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=7)


def _swin_3d() -> nn.Module:
    from torchvision.models.video import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 2, 2], num_classes=7)


def _mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(heads: int, width: int, out: int, stride: list[int]) -> Any:
        return MSBlockConfig(heads, width, out, [3, 3, 3], [1, 2, 2], stride, [1, 2, 2])

    blocks = [block(2, 16, 16, [1, 1, 1]), block(4, 16, 32, [1, 2, 2])]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((32, 32), 4, blocks, num_classes=7, **options)


def _family(name: str, make: Callable[[], nn.Module], inputs: Callable[[], Tensor], argument: str = "x") -> Family:
    def only(implementation: str) -> nn.Module:
        if implementation != "eager":
            raise ValueError("the form is fixed")
        return make()

    return Family(SOURCE, name, only, lambda model: {argument: inputs()}, needs=("torchvision",))


def _image() -> Tensor:
    return normal(BATCH, 3, 32, 32)


def _video() -> Tensor:
    return normal(BATCH, 3, 4, 32, 32)


FAMILIES = [
    _family("vit", _vit, _image),
    _family("swin", functools.partial(_swin, False), _image),
    _family("swin_v2", functools.partial(_swin, True), _image),
    _family("maxvit", _maxvit, _image),
    _family("swin3d", _swin_3d, _video),
    _family("mvit_v2", _mvit, _video),
]
