"""Selective attention: config and the parameter of mode ``gate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attnrewrite.variants.base import VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention


@dataclass(frozen=True)
class SelectiveConfig(VariantConfig):
    """Selective attention (Leviathan, Kalman, Matias, ICLR 2025, arXiv 2410.02703).

    mode: "gate" adds one fp32 factor gamma per layer, 0 at the start, so that a converted model is unchanged until it
        is trained; "raw" adds nothing and is meant for training from scratch: it changes a pretrained model at once.
    selection_head: the query head whose logits are the votes.
    protect_first: whether the first real token of a sequence can never be voted out.
    """

    variant: ClassVar[str] = "selective"

    mode: Literal["gate", "raw"] = "gate"
    selection_head: int = 0
    protect_first: bool = True

    @property
    def adds_parameters(self) -> bool:
        """Only mode ``gate`` does."""
        return self.mode == "gate"

    @property
    def starts_as_identity(self) -> bool:
        """Mode ``gate`` starts at gamma = 0."""
        return self.mode == "gate"

    @property
    def state_names(self) -> tuple[str, ...]:
        """The votes that each key has received, and whether votes on it count."""
        return ("votes", "protected")

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nobody has voted on new tokens."""
        import torch

        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {
            "votes": x.new_zeros(x.shape[:2], dtype=kind),
            "protected": x.new_zeros(x.shape[:2], dtype=torch.bool),
        }

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return the module that holds ``gamma``."""
        return self.empty_module({"gamma": ()}).to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with gamma = 0."""
        import torch

        module = torch.nn.Module()
        for name, shape in shapes.items():
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32)))
        return module
