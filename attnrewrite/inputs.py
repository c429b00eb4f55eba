"""Example inputs for transformers models, made up from their configs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.kernels.diagnostics import error


def example_kwargs(model: nn.Module, batch: int = 1, seq_len: int = 32) -> dict[str, Any]:
    """Make keyword inputs for a transformers model: token ids, pixels or both, from a fixed seed.

    Raises AR102 when the model cannot take ``seq_len`` tokens, AR103 for inputs that cannot be made up.
    """
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    if main == "input_ids":
        inputs["input_ids"] = _token_ids(config, (batch, seq_len), random)
    if main == "pixel_values" or ("pixel_values" in accepted and hasattr(config, "vision_config")):
        inputs["pixel_values"] = _pixels(config, batch, random).to(next(model.parameters()).dtype)
    if main not in inputs:
        detail = f"{type(model).__name__} takes {main!r}, which attnrewrite cannot make up"
        raise error("AR103", detail, hint="write a function that returns (model, inputs): package.module:function")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(config, (batch, seq_len), random)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _token_ids(config: Any, shape: tuple[int, int], random: torch.Generator) -> Tensor:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < shape[1]:
        detail = f"sequence length {shape[1]}: the model has positions for {longest} tokens"
        raise error("AR102", detail, hint=f"choose a sequence length of at most {longest}")
    return torch.randint(text.vocab_size, shape, generator=random)


def _pixels(config: Any, batch: int, random: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=random)
