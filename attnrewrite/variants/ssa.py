"""SSA: config, gates and position gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention

ALMOST_IDENTITY = -7.4
"""sigmoid(-7.4) = 6.1e-4: the gain with which a model trained from scratch begins."""


@dataclass(frozen=True)
class SSAConfig(VariantConfig):
    """Selective self-attention by temperature (Zhang et al., NeurIPS 2024, arXiv 2411.12892).

    gate: "head" gives every head its own weight vector over its own projected features, "full" over those of all
        heads, "shared" one vector over those of all heads, for one temperature that all heads have in common.
    position: "linear" trains the gain of ln n itself, 0 at the start, so that a converted model is unchanged until it
        is trained; "sigmoid" trains α with gain σ(α), -7.4 at the start, for training from scratch.
    """

    variant: ClassVar[str] = "ssa"

    gate: Literal["head", "full", "shared"] = "head"
    position: Literal["linear", "sigmoid"] = "linear"

    @property
    def adds_parameters(self) -> bool:
        """Gates and gains in every layer."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        """Linear gains start at exactly 0."""
        return self.position == "linear"

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return gates and gains of one layer. Raises VariantError AR307 for symbolic head counts.

        The gates are [H, D] and [Hkv, Dv]; "full" has one such matrix per head, "shared" one in all: [1, H, D].
        """
        sizes = site.sizes()
        shape = {name: sizes[name] for name in ("H", "Hkv", "D", "Dv")}
        if not all(isinstance(n, int) for n in shape.values()):
            raise error("AR307", f"head counts and dims must be numbers, not {shape}", layer=site.layer)
        gates: dict[str, tuple[int, ...]] = {"q_gate": (shape["H"], shape["D"]), "v_gate": (shape["Hkv"], shape["Dv"])}
        if self.gate != "head":
            gates = {name: (size[0] if self.gate == "full" else 1, *size) for name, size in gates.items()}
        return self.empty_module({**gates, "q_gain": (), "v_gain": ()}).to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with zero gates and initial gains, all fp32."""
        import torch

        start = 0.0 if self.position == "linear" else ALMOST_IDENTITY
        module = torch.nn.Module()
        for name, shape in shapes.items():
            value = torch.full(shape, start if name.endswith("gain") else 0.0, dtype=torch.float32)
            module.register_parameter(name, torch.nn.Parameter(value))
        return module
