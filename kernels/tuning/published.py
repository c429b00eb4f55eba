"""Published times of attention kernels on Hopper, and the rates fitted to them: what is known before measuring here."""

from __future__ import annotations

from collections.abc import Iterator

from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.calibration import Point
from attnrewrite.kernels.tuning.cost import Rates
from attnrewrite.kernels.tuning.work import Shape

_USED = {
    64: (Config(128, 64, 8, 3), Resources(103, 0, 65_536, "HGMMA")),
    128: (Config(128, 64, 8, 3), Resources(183, 0, 131_072, "HGMMA")),
}
"""Configurations of those kernels were not published; these are what our plain forward kernel is compiled to."""

_TUTORIAL = {
    (64, False): {2048: 396, 4096: 400, 16384: 403},
    (64, True): {2048: 342, 4096: 363, 8192: 376, 16384: 363},
    (128, False): {2048: 389, 4096: 389, 16384: 395},
    (128, True): {2048: 323, 4096: 353, 8192: 369, 16384: 378},
}
"""TFLOP/s of triton's tutorial by (features, causal) and length; H100, fp16, hidden size 2048, B N = 16384. Read off
the figure of FlashAttention-3 (arXiv 2407.08608; fp16 forward)."""
_LATER = {1024: 407, 2048: 428, 4096: 460, 8192: 464, 16384: 487}
"""The same kernel in 2025, without warp specialisation: H100, B 4, H 32, D 128, all pairs; pull request 205 of
facebookexperimental/triton."""


def points() -> Iterator[Point]:
    """Yield the published times of triton's forward kernel."""
    for (width, causal), by_length in _TUTORIAL.items():
        heads = 2048 // width
        for length, rate in by_length.items():
            yield _point(Shape(16384 // length, heads, heads, length, length, width, width, causal), rate)
    for length, rate in _LATER.items():
        yield _point(Shape(4, 32, 32, length, length, 128, 128), rate)


def _point(shape: Shape, rate: float) -> Point:
    config, used = _USED[shape.D]
    flops = 4 * shape.B * shape.H * shape.L * shape.S * shape.D / (2 if shape.causal else 1)
    return Point("forward", config, shape, used, flops / (rate * 1e12))


RATES = {"NVIDIA H200": Rates(matmul=0.699, overlap=0.801, tile=1.01e-9, program=2.37e-6)}
"""By device: ``fit(points(), device)``, which is 8 % off on average, as the sources disagree by as much. An H100 has
the same multiprocessors and clocks as an H200."""

CUDNN_FORWARD_D128 = {2048: 484e12, 4096: 518e12, 8192: 529e12, 16384: 539e12}
"""FLOP/s of cuDNN's causal forward pass by length; H100, fp16, from the same figure of FlashAttention-3."""
