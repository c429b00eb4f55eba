"""Selective attention over SSA's temperatures: config and parameters of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attnrewrite.variants.selective import SelectiveConfig, state_of_votes
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
    ramp_steps: as of SelectiveConfig.
    gate: as of SSAConfig.
    position: as of SSAConfig.
    parts: as of SSAConfig.
    on: as of SSAConfig.
    """

    variant: ClassVar[str] = "selective_ssa"

    @property
    def adds_parameters(self) -> bool:
        """SSA's gates and gains in every layer, and in all modes but ``raw`` what selective attention adds."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        """Where both do."""
        ssa = SSAConfig(position=self.position, parts=self.parts)
        return SelectiveConfig(self.mode).starts_as_identity and ssa.starts_as_identity

    @property
    def state_names(self) -> tuple[str, ...]:
        """What both keep."""
        return (*state_of_votes(self.mode), *(("index",) if self.on != "query" else ()))

    @property
    def state_is_optional(self) -> bool:
        """Votes are needed."""
        return False

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what both keep of new tokens."""
        return {**SelectiveConfig.new_state(self, holder, x), **SSAConfig.new_state(self, holder, x)}

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return SSA's module with the factor of the votes. Raises VariantError AR307."""
        module = SSAConfig.module(self, site, device, dtype)
        return _with_votes(module, SelectiveConfig.module(self, site, device, dtype)) if self.mode != "raw" else module

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the same module, to load values into."""
        rest = {name: shape for name, shape in shapes.items() if name.endswith(("_gate", "_gain"))}
        votes = {name: shape for name, shape in shapes.items() if name not in rest}
        return _with_votes(SSAConfig.empty_module(self, rest), SelectiveConfig.empty_module(self, votes))


def _with_votes(module: torch.nn.Module, votes: torch.nn.Module) -> torch.nn.Module:
    """Move the state of ``votes`` into ``module``."""
    for name, parameter in votes.named_parameters():
        module.register_parameter(name, parameter)
    for name, buffer in votes.named_buffers():
        module.register_buffer(name, buffer)
    return module
