"""Symmetric and pairwise attention: config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants.base import Swap, VariantConfig

if TYPE_CHECKING:
    import torch

    from attnrewrite.passes.attention.form import Attention
    from attnrewrite.passes.graph.capture import Capture
    from attnrewrite.passes.report import Site


@dataclass(frozen=True)
class SymmetricConfig(VariantConfig):
    """Queries and keys from one projection (Courtois et al., Findings of ACL 2024, arXiv 2406.06366).

    form: "pairwise" puts a matrix of its own between queries and keys in every head; "symmetric" puts none.
    pair_init: where these matrices start. "converted" fits them to the trained queries; for training from scratch,
        "normal" draws them from N(0, 1) as the paper does, "scaled" from N(0, 1/D), "identity" starts as symmetric.
    pair_form: "full" matrices, "symmetric" or "diag"onal ones.
    mask_self: whether a token attends to itself only where it sees no other.
    fit: by which inputs the fit weighs its errors: "weights" takes all directions alike; "data" takes the example
        inputs, which are then a real batch without padding.
    max_error: a layer is left as it is where its fit has a larger relative error of the scores (root mean square over
        heads); from 1 on every layer is converted.
    """

    variant: ClassVar[str] = "symmetric"

    form: Literal["symmetric", "pairwise"] = "pairwise"
    pair_init: Literal["converted", "normal", "scaled", "identity"] = "converted"
    pair_form: Literal["full", "symmetric", "diag"] = "full"
    mask_self: bool = False
    fit: Literal["weights", "data"] = "weights"
    max_error: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_error >= 0:
            raise error("AR303", f"symmetric.max_error is {self.max_error}; it takes a number that is not negative")

    @property
    def adds_parameters(self) -> bool:
        """Whether this config needs ``convert``: it removes parameters, and pairwise adds fewer."""
        return True

    @property
    def swaps_modules(self) -> bool:
        """The layer's projections are replaced."""
        return True

    def swaps(
        self,
        model: torch.nn.Module,
        capture: Capture,
        sites: Mapping[str, tuple[Attention, Site]],
        run: Callable[[], object],
    ) -> dict[str, Swap]:
        """Fit every layer, and return the projections of those that come close enough.

        Raises VariantError: AR307 where queries and keys are not ordinary projections of one input, AR321 where no
        layer comes close enough.
        """
        from attnrewrite.variants.sharing import share

        return share(self, model, capture, sites, run)

    def swapped_modules(self, model: torch.nn.Module, details: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
        """Return the projections of a saved layer, without values. Raises SaveError AR603, AR604."""
        from attnrewrite.variants.sharing import shared_modules

        return shared_modules(model, details)
