"""Selective attention: config, and the factor of the votes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention


@dataclass(frozen=True)
class SelectiveConfig(VariantConfig):
    """Selective attention (Leviathan, Kalman, Matias, ICLR 2025, arXiv 2410.02703).

    mode: "gate" adds one fp32 factor gamma per layer, 0 at the start, so that a converted model is unchanged until it
        is trained; "ramp" moves such a factor from 0 to 1 by itself, in ramp_steps calls of attnrewrite.update, and
        ends as the paper's method; "raw" adds nothing and is meant for training from scratch: it changes a
        pretrained model at once.
    selection_head: the query head whose logits are the votes.
    protect_first: whether the first real token of a sequence can never be voted out.
    ramp_steps: length of the ramp in optimizer steps; a tenth of the run is usual.
    """

    variant: ClassVar[str] = "selective"

    mode: Literal["gate", "ramp", "raw"] = "gate"
    selection_head: int = 0
    protect_first: bool = True
    ramp_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp_steps < 1:
            raise error("AR303", f"{self.variant}.ramp_steps is {self.ramp_steps}; it must be 1 or more")

    @property
    def adds_parameters(self) -> bool:
        """All modes but ``raw`` have a factor."""
        return self.mode != "raw"

    @property
    def starts_as_identity(self) -> bool:
        """The factor starts at 0."""
        return self.mode != "raw"

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
        shapes: dict[str, tuple[int, ...]] = {"gamma": ()} if self.mode == "gate" else {"gamma": (), "steps": ()}
        return self.empty_module(shapes).to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with gamma = 0: a parameter, or with ``ramp`` a buffer beside the steps so far."""
        import torch

        module = torch.nn.Module()
        for name in shapes:
            value = torch.zeros((), dtype=torch.int64 if name == "steps" else torch.float32)
            if self.mode == "gate":
                module.register_parameter(name, torch.nn.Parameter(value))
            else:
                module.register_buffer(name, value)
        return module

    def update(self, layer: str, holder: torch.nn.Module) -> None:
        """Take one step of the ramp."""
        if self.mode == "ramp":
            steps = holder.get_buffer("steps").add_(1)
            holder.get_buffer("gamma").copy_((steps / self.ramp_steps).clamp(max=1.0))
