"""The exact rewrite: no config, no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnrewrite.variants.base import VariantConfig


@dataclass(frozen=True)
class SdpaConfig(VariantConfig):
    """Exact attention through torch's fused operator. It has no fields and never changes meaning."""

    variant: ClassVar[str] = "sdpa"

    @property
    def starts_as_identity(self) -> bool:
        """Exact at all times."""
        return True
