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

    gate: what the token's part of a head's temperature reads: "head" its own projected features, "full" those of all
        heads, with a weight vector per head; "shared" those of all heads, the same temperature for all.
    parts: "token" and "position" leave the other part out, for ablations.
    on: "query" and "value" leave the other temperature at 1, for ablations.
    position: "linear" trains the gain of ln n itself, 0 at the start, so that a converted model is unchanged until it
        is trained; "sigmoid" trains α with gain σ(α), -7.4 at the start, for training from scratch.
    """

    variant: ClassVar[str] = "ssa"

    gate: Literal["head", "full", "shared"] = "head"
    position: Literal["linear", "sigmoid"] = "linear"
    parts: Literal["both", "token", "position"] = "both"
    on: Literal["both", "query", "value"] = "both"

    @property
    def adds_parameters(self) -> bool:
        """Gates and gains in every layer."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        """Gates start at 0, and linear gains too."""
        return self.position == "linear" or self.parts == "token"

    @property
    def state_names(self) -> tuple[str, ...]:
        """The index of each key among real tokens: the values in the cache have their temperatures already."""
        return ("index",) if self.on != "query" else ()

    @property
    def state_is_optional(self) -> bool:
        """From values without their temperatures these are computed at each step."""
        return True

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return places ``[B, L]`` for the indices of new keys."""
        import torch

        return {"index": x.new_zeros(x.shape[:2], dtype=torch.int32)} if self.on != "query" else {}

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return gates and gains of one layer: ``[H, D]``, ``[H, H, D]`` or ``[1, H, D]`` for queries, and 0-d.

        Raises VariantError AR307 for symbolic head counts.
        """
        sizes = site.sizes()
        if not all(isinstance(sizes[name], int) for name in ("H", "Hkv", "D", "Dv")):
            raise error("AR307", f"head counts and dims must be numbers, not {sizes}", layer=site.layer)
        heads = {"q": (sizes["H"], sizes["D"]), "v": (sizes["Hkv"], sizes["Dv"])}
        of = {name: self._gate_shape(*shape) for name, shape in heads.items()}
        which = [name for name, word in (("q", "query"), ("v", "value")) if self.on in ("both", word)]
        shapes = {f"{name}_gate": of[name] for name in which if self.parts != "position"}
        shapes |= {f"{name}_gain": () for name in which if self.parts != "token"}
        return self.empty_module(shapes).to(device)

    def _gate_shape(self, heads: int, width: int) -> tuple[int, ...]:
        return {"head": (heads, width), "full": (heads, heads, width), "shared": (1, heads, width)}[self.gate]

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with zero gates and initial gains, all fp32."""
        import torch

        start = 0.0 if self.position == "linear" else ALMOST_IDENTITY
        module = torch.nn.Module()
        for name, shape in shapes.items():
            value = torch.full(shape, start if name.endswith("gain") else 0.0, dtype=torch.float32)
            module.register_parameter(name, torch.nn.Parameter(value))
        return module
