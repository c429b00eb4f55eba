"""Selective attention over SSA's temperatures: config and parameters of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attnrewrite.variants.selective import SelectiveConfig
from attnrewrite.variants.ssa import SSAConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from attnrewrite.passes.attention.form import Attention


@dataclass(frozen=True)
class SelectiveSSAConfig(SelectiveConfig, SSAConfig):
    """Selective attention (arXiv 2410.02703) whose queries and values have SSA's temperatures (arXiv 2411.12892).

    Votes are the logits as the head uses them, so that the temperature of a query is in its votes, too.

    mode: as of SelectiveConfig.
    selection_head: as of SelectiveConfig.
    protect_first: as of SelectiveConfig.
    gate: as of SSAConfig.
    position: as of SSAConfig.
    parts: as of SSAConfig.
    on: as of SSAConfig.
    """

    variant: ClassVar[str] = "selective_ssa"

    @property
    def adds_parameters(self) -> bool:
        """SSA's gates and gains in every layer, and gamma in mode ``gate``."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        """Where both do."""
        ssa = SSAConfig(position=self.position, parts=self.parts)
        return SelectiveConfig(self.mode).starts_as_identity and ssa.starts_as_identity

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return SSA's module with the parameter of selective attention. Raises VariantError AR307."""
        module = SSAConfig.module(self, site, device, dtype)
        if SelectiveConfig(self.mode).adds_parameters:
            votes = SelectiveConfig.module(self, site, device, dtype)
            for name, parameter in votes.named_parameters():
                module.register_parameter(name, parameter)
        return module

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the same module, to load values into."""
        return SSAConfig.empty_module(self, shapes)
