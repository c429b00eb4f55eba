"""What the coverage table needs to know of one family of models, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, WIDTH, HEADS = 2, 12, 32, 4


@dataclass(frozen=True)
class Facts:
    """What a model's configuration allows a site to have."""

    heads: frozenset[Any]
    kv_heads: frozenset[Any]
    windows: frozenset[Any] = frozenset({None})
    softcaps: frozenset[Any] = frozenset({None})

    def agree(self, site: Any) -> bool:
        """Whether a site has the heads, the KV heads, the window and the soft-cap that the configuration allows."""
        odd = not self.heads or site.heads not in self.heads or site.kv_heads not in self.kv_heads
        return not odd and site.mask.window in self.windows and site.softcap in self.softcaps


def modules_facts(model: nn.Module) -> Facts:
    """Read the numbers of heads off the attributes of a model's modules; where none is named, there is one."""
    heads = _attributes(model.modules(), "num_heads", "heads", "n_head", "n_heads", "nhead", "num_attention_heads")
    heads = heads or frozenset({1})
    kv_heads = _attributes(model.modules(), "kv_heads", "num_kv_heads")
    return Facts(heads, heads | kv_heads | {1})


def _attributes(modules: Iterable[nn.Module], *names: str) -> frozenset[int]:
    found = [getattr(module, name, None) for module in modules for name in names]
    return frozenset(value for value in found if isinstance(value, int))


@dataclass(frozen=True)
class Family:
    """How to build one family and what it is fed.

    ``make`` takes "eager" or "sdpa", and raises ValueError where the family does not offer it; ``trains`` is False
    where torch has no backward on CPU; ``needs`` are packages.
    """

    source: str
    name: str
    make: Callable[[str], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    facts: Callable[[nn.Module], Facts] = modules_facts
    trains: bool = True
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name that no other family has."""
        return f"{self.source}/{self.name}"

    def build(self, implementation: str = "eager") -> nn.Module:
        """Return the model in eval mode, with random weights."""
        torch.manual_seed(0)
        return self.make(implementation).eval()


def installed(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ids(length: int = LENGTH) -> Tensor:
    """Return token ids [B, length]."""
    return torch.randint(3, 60, (BATCH, length), generator=_generator())


def normal(*shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=_generator())
