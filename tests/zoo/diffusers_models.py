"""Families of diffusers, made small; attention is written out or fused, by its own two processors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo.family import BATCH, Family, normal

SOURCE = "diffusers"
WIDTH = 32


def _attention(**options: Any) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(query_dim=WIDTH, heads=4, dim_head=8, **options)


def _block(**options: Any) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(WIDTH, 4, 8, **options)


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _unet_plain() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def _autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=8
    )


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        norm_num_groups=8,
        use_additional_conditions=False,
    )


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )


def _prior() -> nn.Module:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=12
    )


def _video() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )


def _states(length: int, width: int = WIDTH) -> Tensor:
    return normal(BATCH, length, width)


def _latent(channels: int = 4) -> Tensor:
    return normal(BATCH, channels, 8, 8)


def _steps() -> Tensor:
    return torch.full((BATCH,), 5)


def _vector() -> Tensor:
    return normal(BATCH, WIDTH)


def _mask() -> Tensor:
    return torch.zeros(BATCH, 1, 9).masked_fill(torch.arange(9) > 6, -10000.0)


def _with_processors(make: Callable[[], nn.Module], implementation: str) -> nn.Module:
    """Give every attention the processor of the wanted form, where it has the plain one."""
    from diffusers.models import attention_processor

    model = make()
    form = attention_processor.AttnProcessor if implementation == "eager" else attention_processor.AttnProcessor2_0
    plain = (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0)
    layers = [x for x in model.modules() if isinstance(getattr(x, "processor", None), plain)]
    if implementation == "sdpa" and not layers:
        raise ValueError("the form is fixed")
    for layer in layers:
        layer.set_processor(form())
    return model


def _family(name: str, make: Callable[[], nn.Module], **inputs: Callable[[], Any]) -> Family:
    def given(model: nn.Module) -> dict[str, Any]:
        return {name: value() for name, value in inputs.items()}

    return Family(SOURCE, name, functools.partial(_with_processors, make), given, needs=("diffusers",))


_HIDDEN, _TEXT = functools.partial(_states, 12), functools.partial(_states, 9)
_CALL: dict[str, Callable[[], Any]] = {"timestep": _steps, "return_dict": bool}
_UPCAST = {"upcast_attention": True, "upcast_softmax": True}
_NORMS = {"qk_norm": "layer_norm", "norm_num_groups": 8, "residual_connection": True}

FAMILIES = [
    _family("Attention", _attention, hidden_states=_HIDDEN),
    _family("Attention, upcast", lambda: _attention(**_UPCAST), hidden_states=_HIDDEN),
    _family(
        "Attention, norms and residual", lambda: _attention(**_NORMS), hidden_states=functools.partial(_latent, WIDTH)
    ),
    _family(
        "Attention, cross, masked",
        lambda: _attention(cross_attention_dim=WIDTH),
        hidden_states=_HIDDEN,
        encoder_hidden_states=_TEXT,
        attention_mask=_mask,
    ),
    _family(
        "BasicTransformerBlock",
        lambda: _block(cross_attention_dim=WIDTH),
        hidden_states=_HIDDEN,
        encoder_hidden_states=_TEXT,
    ),
    _family("UNet2DModel", _unet_plain, sample=functools.partial(_latent, 3), **_CALL),
    _family("UNet2DConditionModel", _unet, sample=_latent, encoder_hidden_states=_TEXT, **_CALL),
    _family("AutoencoderKL", _autoencoder, sample=lambda: normal(BATCH, 3, 16, 16), return_dict=bool),
    _family("DiTTransformer2DModel", _dit, hidden_states=_latent, class_labels=lambda: torch.tensor([1, 2]), **_CALL),
    _family("PixArtTransformer2DModel", _pixart, hidden_states=_latent, encoder_hidden_states=_TEXT, **_CALL),
    _family(
        "SD3Transformer2DModel",
        _sd3,
        hidden_states=_latent,
        encoder_hidden_states=_TEXT,
        pooled_projections=_vector,
        **_CALL,
    ),
    _family(
        "FluxTransformer2DModel",
        _flux,
        hidden_states=functools.partial(_states, 12, 16),
        encoder_hidden_states=_TEXT,
        pooled_projections=_vector,
        timestep=lambda: torch.ones(BATCH),
        img_ids=lambda: normal(12, 3),
        txt_ids=lambda: torch.zeros(9, 3),
        return_dict=bool,
    ),
    _family(
        "PriorTransformer",
        _prior,
        hidden_states=_vector,
        proj_embedding=_vector,
        encoder_hidden_states=_HIDDEN,
        **_CALL,
    ),
    _family(
        "WanTransformer3DModel",
        _video,
        hidden_states=lambda: normal(BATCH, 4, 2, 4, 4),
        encoder_hidden_states=_TEXT,
        **_CALL,
    ),
]
