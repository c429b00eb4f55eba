"""One pattern: a function with the contract of torch's fused attention, and what of its graph must be found."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnrewrite.passes.attention.form import EmptyRow
from attnrewrite.passes.patterns.skeleton import Label, Skeleton, template, trace

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Pattern:
    """One registered pattern.

    ``examples`` are query, key, value and, where the function takes one, the mask, on the meta device. ``layout`` has
    a letter per dim of the query: ``l`` is the position, ``d`` the head dim. ``empty`` is what a row without visible
    keys gives.
    """

    name: str
    function: Callable[..., Tensor]
    examples: tuple[Tensor, ...]
    layout: str
    scale: float | None = None
    is_causal: bool = False
    empty: EmptyRow = "zero"
    serial: int = field(default_factory=lambda: next(_serial))
    memo: dict[torch.dtype | None, tuple[Skeleton, tuple[Label, ...]] | None] = field(default_factory=dict)

    @property
    def key_layout(self) -> str:
        """The letters of the key: ``s`` is its position."""
        return self.layout.replace("l", "s")

    @property
    def value_layout(self) -> str:
        """The letters of the value: ``e`` is its feature."""
        return self.key_layout.replace("d", "e")

    @property
    def result_layout(self) -> str:
        """The letters of the result."""
        return self.layout.replace("d", "e")

    @property
    def score_layout(self) -> str:
        """The letters of scores and mask."""
        return "".join(x for x in self.layout if x not in "ld") + "ls"

    def alpha(self, width: int) -> float:
        """Return the scale for a head dim of ``width``."""
        return 1.0 / math.sqrt(width) if self.scale is None else self.scale

    def skeleton(self, dtype: torch.dtype | None = None) -> tuple[Skeleton, tuple[Label, ...]] | None:
        """Return the skeleton and what to look for, for values of ``dtype`` (None: of the examples' dtypes).

        None where the function does not run with that dtype, or its operators depend on sizes.
        """
        if dtype not in self.memo:
            self.memo[dtype] = self._skeleton(dtype)
        return self.memo[dtype]

    def _skeleton(self, dtype: torch.dtype | None) -> tuple[Skeleton, tuple[Label, ...]] | None:
        floats = [x if dtype is None or not x.is_floating_point() else x.to(dtype) for x in self.examples]
        try:
            with _quiet():
                first, second = trace(self.function, floats), trace(self.function, self.resized(floats))
        except Exception:
            if dtype is None:
                raise
            return None
        labels = template(first, second)
        return None if labels is None else (first, labels)

    def resized(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return values of other sizes, related as those of the examples are."""
        query, key, value = (x.shape for x in self.examples[:3])
        taken = {*query, *key, *value}
        fresh = (p for p in _PRIMES if p not in taken)
        sizes = {letter: next(fresh) for letter in dict.fromkeys(self.layout + "se")}
        shared = [x for n, x in enumerate(self.layout) if x not in "ld" and query[n] != key[n]]
        whole = {**sizes, **{x: sizes[x] * next(fresh) for x in shared}}
        lines = ((self.layout, whole), (self.key_layout, sizes), (self.value_layout, sizes), (self.score_layout, whole))
        out = []
        for given, (letters, by) in zip(values, lines, strict=False):
            tail = letters[len(letters) - given.dim() :]
            shape = [by[x] if n != 1 else 1 for x, n in zip(tail, given.shape, strict=True)]
            out.append(given.new_empty(shape))
        return out

    def with_empty(self, empty: EmptyRow) -> Pattern:
        """Return the same pattern with another verdict on rows without visible keys."""
        return replace(self, empty=empty)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging what a trial that fails says."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
