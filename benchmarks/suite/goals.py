"""What the generated kernels are held to on a GPU: ratios of times in one run, and one amount of memory."""

from __future__ import annotations

from typing import NamedTuple

from attnrewrite.bench.case import Case

P1 = Case("P1", 4, 16, 4096, 64)
P2 = Case("P2", 2, 16, 8192, 128)
BLOCK = Case("block", 16, 16, 512, 64, causal=False)
DECODE = Case("decode", 1, 16, 32768, 64, step=True)
MEMORY = Case("memory", 1, 16, 16384, 64)
CASES = {case.name: case for case in (P1, P2, BLOCK, DECODE, MEMORY)}

PLAIN, SELECTIVE, SSA, DEAD = "plain", "selective", "ssa", "selective, 75 % dead"
FLASH, CUDNN = "sdpa, flash", "sdpa, cuDNN"
FLEX, FLEX_TMA, FLEX_F = "flex", "flex, TMA", "F + flex"
EAGER, EAGER_SELECTIVE = "eager, inductor", "eager selective, inductor"
VANILLA, SYMMETRIC = "vanilla block", "symmetric block"
STEP, FLEX_STEP = "selective step", "flex step"

OURS = (PLAIN, SELECTIVE, SSA, DEAD, VANILLA, SYMMETRIC, STEP)
"""What runs on generated kernels."""
TUNED_FLEX = (FLEX, FLEX_TMA)
"""FlexAttention at its best: the faster one of these counts."""


class Aim(NamedTuple):
    """``over`` divided by the fastest of ``under``, or bytes where there is none: must be, and should be at most."""

    case: Case
    metric: str
    over: str
    under: tuple[str, ...]
    must: float
    target: float

    @property
    def text(self) -> str:
        """Say what is compared."""
        return f"{self.over} ÷ {FLEX if self.under == TUNED_FLEX else self.under[0]}" if self.under else self.over


GOALS = (
    Aim(P1, "forward", PLAIN, TUNED_FLEX, 1.0, 0.85),
    Aim(P1, "backward", PLAIN, TUNED_FLEX, 1.05, 0.9),
    Aim(P1, "forward", SELECTIVE, TUNED_FLEX, 1.6, 1.25),
    Aim(P1, "backward", SELECTIVE, TUNED_FLEX, 2.0, 1.45),
    Aim(P1, "forward", SELECTIVE, (FLEX_F,), 0.8, 0.5),
    Aim(P1, "forward", DEAD, (SELECTIVE,), 0.42, 0.34),
    Aim(P1, "forward", SSA, (PLAIN,), 1.08, 1.03),
    Aim(P1, "backward", SSA, (PLAIN,), 1.15, 1.08),
    Aim(P2, "forward", PLAIN, TUNED_FLEX, 1.0, 0.85),
    Aim(P2, "backward", PLAIN, TUNED_FLEX, 1.05, 0.9),
    Aim(P2, "forward", PLAIN, (CUDNN,), 1.65, 1.2),
    Aim(P2, "forward", SELECTIVE, TUNED_FLEX, 1.45, 1.15),
    Aim(P2, "backward", SELECTIVE, TUNED_FLEX, 2.0, 1.45),
    Aim(P2, "forward", SELECTIVE, (FLEX_F,), 0.8, 0.5),
    Aim(P2, "forward", SSA, (PLAIN,), 1.08, 1.03),
    Aim(P2, "backward", SSA, (PLAIN,), 1.15, 1.08),
    Aim(BLOCK, "forward", SYMMETRIC, (VANILLA,), 0.97, 0.9),
    Aim(DECODE, "forward", STEP, (FLEX_STEP,), 1.15, 1.03),
    Aim(MEMORY, "GB beyond inputs and output", SELECTIVE, (), 0.6, 0.6),
)
"""The most important case first: a run that is short of time leaves out what comes last."""
