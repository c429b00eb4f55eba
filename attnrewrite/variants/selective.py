"""Selective attention: config, and the factor of the votes or the selector that casts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention


START = 1e-6
"""Standard deviation of a new selector's logits, for inputs whose features have mean square 1.

About N / 2 queries vote with 0.8 of that each, so that after N = 8192 tokens a penalty is 0.003.
"""


@dataclass(frozen=True)
class SelectiveConfig(VariantConfig):
    """Selective attention (Leviathan, Kalman, Matias, ICLR 2025, arXiv 2410.02703).

    mode: "gate" adds one fp32 factor gamma per layer, 0 at the start, so that a converted model is unchanged until it
        is trained; "ramp" moves such a factor from 0 to 1 by itself, in ramp_steps calls of attnrewrite.update, and
        ends as the paper's method; "new-head" adds a head that votes, from the layer's input and without
        positions, whose votes and output are 0 at the start; "selector" adds the queries and keys of such a head alone,
        whose votes are nearly 0 at the start; "raw" adds nothing and is meant for training from scratch: it changes a
        pretrained model at once.
    selection_head: the query head whose logits are the votes.
    protect_first: whether the first real token of a sequence can never be voted out.
    ramp_steps: length of the ramp in optimizer steps; a tenth of the run is usual.
    """

    variant: ClassVar[str] = "selective"

    mode: Literal["gate", "ramp", "new-head", "selector", "raw"] = "gate"
    selection_head: int = 0
    protect_first: bool = True
    ramp_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp_steps < 1:
            raise error("AR303", f"{self.variant}.ramp_steps is {self.ramp_steps}; it must be 1 or more")

    @property
    def adds_parameters(self) -> bool:
        """A factor or a head, in all modes but ``raw``."""
        return self.mode != "raw"

    @property
    def starts_as_identity(self) -> bool:
        """A factor and a whole head start at 0; a selector near it."""
        return self.mode in ("gate", "ramp", "new-head")

    @property
    def adds_to_output(self) -> bool:
        """The output of a new head."""
        return self.mode == "new-head"

    @property
    def state_names(self) -> tuple[str, ...]:
        """The votes that each key has received, whether votes on it count, and keys and values of a new head."""
        return state_of_votes(self.mode)

    @property
    def summed_state(self) -> tuple[str, ...]:
        """The votes."""
        return ("votes",)

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nobody has voted on new tokens."""
        import torch

        from attnrewrite.kernels.selective.selector import projected

        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        state = {
            "votes": x.new_zeros(x.shape[:2], dtype=kind),
            "protected": x.new_zeros(x.shape[:2], dtype=torch.bool),
        }
        for name, weight in (("vote_key", "k_proj"), ("vote_value", "v_proj")):
            if name in self.state_names and holder is not None:
                state[name] = projected(x, holder.get_parameter(weight))
        return state

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return the module with ``gamma``, or a head: ``q_proj``, ``k_proj``, ``v_proj`` [D, d], ``o_proj`` [d, D].

        Raises VariantError AR307 where the layer's input is not found.
        """
        import torch

        if self.mode in ("gate", "ramp"):
            return self.empty_module({"gamma": ()} if self.mode == "gate" else {"gamma": (), "steps": ()}).to(device)
        D, width = head_and_width(site)
        kind = {"q_proj": 1.0, "k_proj": START} if self.mode == "selector" else {"q_proj": 1.0, "v_proj": 1.0}
        shapes = {"q_proj": (D, width), "k_proj": (D, width)}
        if self.mode == "new-head":
            shapes |= {"v_proj": (D, width), "o_proj": (width, D)}
        holder = self.empty_module(shapes)
        for name, size in kind.items():
            torch.nn.init.normal_(holder.get_parameter(name), std=size * width**-0.5)
        return holder.to(device)

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the module with zeros, fp32: parameters, or with ``ramp`` buffers, of which one counts the steps."""
        import torch

        module = torch.nn.Module()
        for name, shape in shapes.items():
            value = torch.zeros(shape, dtype=torch.int64 if name == "steps" else torch.float32)
            if self.mode == "ramp":
                module.register_buffer(name, value)
            else:
                module.register_parameter(name, torch.nn.Parameter(value))
        return module

    def update(self, layer: str, holder: torch.nn.Module) -> None:
        """Take one step of the ramp."""
        if self.mode == "ramp":
            steps = holder.get_buffer("steps").add_(1)
            holder.get_buffer("gamma").copy_((steps / self.ramp_steps).clamp(max=1.0))


def state_of_votes(mode: str) -> tuple[str, ...]:
    """Return the names of what the votes of a mode need of earlier tokens."""
    own = {"selector": ("vote_key",), "new-head": ("vote_key", "vote_value")}
    return ("votes", "protected", *own.get(mode, ()))


def head_and_width(site: Attention) -> tuple[int, int]:
    """Return the width D of a head and that of the layer's input, d. Raises VariantError AR307."""
    from attnrewrite.passes.attention.form import Reject
    from attnrewrite.passes.facts.projection import source

    try:
        D, width = site.sizes()["D"], source(site).node.meta["val"].shape[-1]
    except Reject as reject:
        raise error(reject.code, reject.detail, layer=site.layer) from None
    if not (isinstance(D, int) and isinstance(width, int)):
        raise error("AR307", f"widths must be numbers, not {(D, width)}", layer=site.layer)
    return D, width
