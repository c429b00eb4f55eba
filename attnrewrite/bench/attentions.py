"""The registry: every attention that can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnrewrite.bench.case import Attend, Setting


class UnsupportedError(Exception):
    """Why an attention cannot do what is asked of it."""


Maker = Callable[[Setting], Attend]


@dataclass(frozen=True)
class Attention:
    """Something that is measured.

    make: builds what is called, with whatever it needs beside queries, keys and values drawn beforehand.
    formula: builds what the outcome is compared with, in float64; None: nothing.
    forward_only: whether it has no backward pass.
    heads: how many of the first heads show its error; None: all, because they depend on one another.
    every_pair: whether it takes every visible pair, so that it is no faster than plain attention can be.
    missing: says what a device lacks for it, or None.
    """

    make: Maker
    formula: Maker | None
    forward_only: bool = False
    heads: int | None = 2
    every_pair: bool = True
    missing: Callable[[torch.device], str | None] = lambda device: None
