"""What the cost model expects of everybody who is measured: seconds on a device, without running anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.splits import split
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.tuning.cost import Rates, floor, predict
from attnrewrite.kernels.tuning.device import Device
from attnrewrite.kernels.tuning.published import CUDNN_FORWARD_D128
from attnrewrite.kernels.tuning.spills import spilling_least
from attnrewrite.kernels.tuning.work import Shape
from suite.goals import (
    CUDNN,
    DEAD,
    FLEX,
    FLEX_F,
    FLEX_STEP,
    MEMORY,
    PLAIN,
    SELECTIVE,
    SSA,
    STEP,
    SYMMETRIC,
    VANILLA,
    Aim,
    Case,
)

Usage = Callable[[str, str, int, Config, str, bool], Resources]
BACKWARD = ("delta", "backward_keys", "backward_queries")
_OF_VOTES = ("backward_logits", "backward_votes")
_FLEX_FORWARD = (
    Config(128, 64, 4, 3),
    Config(128, 128, 4, 3),
    Config(128, 128, 8, 2),
    Config(64, 128, 4, 3),
    Config(64, 64, 4, 3),
)
_FLEX_BACKWARD = {
    "backward_keys": (Config(64, 128, 8, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 3)),
    "backward_queries": (Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 32, 4, 3)),
}
"""What max-autotune tries of FlexAttention on sm_90, less what differs in stages alone, and for the backward pass the
default; torch 2.11, ``torch/_inductor/template_heuristics/triton.py``."""
_FLEX_DECODE = (Config(16, 64, 2, 3), Config(16, 32, 2, 3), Config(16, 128, 2, 3), Config(16, 64, 2, 1))
"""What max-autotune tries where queries are few; it splits the keys by ``get_split_k`` of flex_decoding.py."""
_FLEX_DEFAULT = {128: Config(128, 64, 8, 3)}
"""Of the forward pass by features, where it is not among those."""
_GROWN = 2
"""Small kernels of torch before a step of selective attention: the votes and the protected keys grow."""
_OPTIONS = {"sdpa": {}, "ssa": {"temperatures": True}, "selective": {"penalty": True}}


@dataclass(frozen=True)
class Model:
    """Predictions for a device; ``usage`` compiles."""

    device: Device
    rates: Rates
    usage: Usage

    def ratio(self, aim: Aim) -> float:
        """Return what an aim's ratio, or amount, is expected to be."""
        if aim.case == MEMORY:
            return extra_memory(aim.case) / 1e9
        over = self.seconds(aim.over, aim.case, aim.metric)
        return over / min(self.seconds(name, aim.case, aim.metric) for name in aim.under)

    def floor(self, aim: Aim) -> float:
        """Return the physical floor of an aim's ratio: the busiest unit alone, over what the peer is expected to take.

        Where both are ours, over the other's floor.
        """
        case, metric = aim.case, aim.metric
        if case == MEMORY:
            return 0.0
        if aim.over == STEP:  # the votes' row is read and written beside keys and values
            return 1 + 2 * 4 / (2 * 2 * case.D * case.H)
        least = self._floor(aim.over, case, metric)
        ours = aim.under[0] in (PLAIN, SELECTIVE, VANILLA)
        under = self._floor(aim.under[0], case, metric) if ours else self.seconds(aim.under[0], case, metric)
        return least / under

    def seconds(self, provider: str, case: Case, metric: str) -> float:
        """Return the expected time."""
        forward = metric == "forward"
        if provider in (STEP, FLEX_STEP):
            return self._step(case, provider == STEP)
        if provider == CUDNN:
            return 2 * case.B * case.H * case.N**2 * case.D / CUDNN_FORWARD_D128[case.N]
        if provider.startswith(FLEX):
            return self._flex(case, forward, "sdpa")
        if provider == FLEX_F:
            # Logits are written and read in 16 bit, penalties written, read once more by a scan in two passes.
            return self._gemm(case.B, case.N, case.N, case.D, 8) + self._flex(case, forward, "selective")
        if provider in (VANILLA, SYMMETRIC):
            projections = 3 if provider == VANILLA else 2
            pair = 0.0 if provider == VANILLA else self._gemm(case.B * case.H, case.N, case.D, case.D, 4)
            hidden = case.H * case.D
            rows = self._gemm(1, case.B * case.N, hidden, hidden, 4)
            return projections * rows + pair + self._sum(("forward",), "sdpa", case)
        if provider in (SELECTIVE, DEAD):
            return self._selective(case, forward, 0.75 if provider == DEAD else 0.0)
        return self._sum(("forward",) if forward else BACKWARD, {PLAIN: "sdpa", SSA: "ssa"}[provider], case)

    def kernel(self, name: str, variant: str, case: Case, config: Config, dead: float = 0.0) -> float:
        """Return the seconds of one kernel."""
        used = self.usage(name, variant, case.D, config, self.device.target, case.causal)
        return predict(name, config, shape(case, variant, dead), used, self.device, self.rates)

    def untuned(self, name: str, variant: str, case: Case) -> Config:
        """Return what runs where nothing was tuned."""

        def uses(config: Config) -> Resources:
            return self.usage(name, variant, case.D, config, self.device.target, case.causal)

        first = configs(name, case.D, 16)[0]
        return spilling_least(name, first, shape(case, variant), uses, self.device, self.rates)

    def _sum(self, names: tuple[str, ...], variant: str, case: Case, dead: float = 0.0) -> float:
        found = 0.0
        for name in names:
            of = _compiled(name, variant)
            found += self.kernel(name, of, case, self.untuned(name, of, case), dead)
        return found

    def _selective(self, case: Case, forward: bool, dead: float) -> float:
        votes = self._sum(("votes",), "selective", case)
        if forward:
            return votes + self._sum(("forward",), "selective", case, dead)
        cleared = case.B * case.N**2 * 2 / self.device.memory + self.rates.launch
        own = self._gemm(case.B, case.N, case.D, case.N, 2)  # the selection head's queries
        return cleared + votes + own + self._sum((*BACKWARD, *_OF_VOTES), "selective", case, dead)

    def _flex(self, case: Case, forward: bool, variant: str) -> float:
        names = ("forward",) if forward else BACKWARD
        return sum(
            min(self.kernel(name, _compiled(name, variant), case, config) for config in flex_configs(name, case))
            for name in names
        )

    def _step(self, case: Case, ours: bool) -> float:
        """Return the seconds of one query to all keys; whoever puts the parts together takes as long as our kernel."""
        groups, processors = case.B * case.H, self.device.sms
        parts = split(groups, case.N, processors).parts if ours else max(1, processors // groups * 2)
        tried = configs("decode", case.D, 16)[:1] if ours else _FLEX_DECODE

        def seconds(name: str, config: Config) -> float:
            variant = "selective" if ours and name == "decode" else "sdpa"
            used = self.usage(name, variant, case.D, config, self.device.target, case.causal)
            of = replace(shape(case, variant), L=1, parts=parts)
            return predict(name, config, of, used, self.device, self.rates)

        merged = seconds("merge", configs("merge", case.D, 16)[0])
        together = min(seconds("decode", config) for config in tried) + merged
        return together + (_GROWN * self.rates.launch if ours else 0.0)

    def _gemm(self, batch: int, m: int, n: int, k: int, size: int) -> float:
        """Return the seconds of ``batch`` products [m, k] x [k, n], of which ``size`` bytes per result are moved."""
        moved = batch * (m * n * size + (m + n) * k * 2)
        return max(2 * batch * m * n * k / self.device.matmul, moved / self.device.memory) + self.rates.launch

    def _floor(self, provider: str, case: Case, metric: str) -> float:
        if provider in (VANILLA, SYMMETRIC):
            hidden, count = case.H * case.D, 3 if provider == VANILLA else 2
            pair = 0 if provider == VANILLA else 2 * case.B * case.H * case.N * case.D**2
            flops = count * 2 * case.B * case.N * hidden**2 + pair
            return flops / self.device.matmul + floor("forward", shape(case, "sdpa"), self.device)
        variant = {PLAIN: "sdpa", SSA: "ssa"}.get(provider, "selective")
        names: tuple[str, ...] = ("forward",) if metric == "forward" else BACKWARD
        if variant == "selective":
            names += ("votes",) if metric == "forward" else ("votes", *_OF_VOTES)
        dead = 0.75 if provider == DEAD else 0.0
        return sum(floor(name, shape(case, variant, 0.0 if name == "votes" else dead), self.device) for name in names)


def shape(case: Case, variant: str, dead: float = 0.0) -> Shape:
    """Return a case as the cost model has it."""
    options: dict[str, Any] = _OPTIONS[variant]
    sizes = (case.B, case.H, case.H, case.N, case.N, case.D, case.D)
    return Shape(*sizes, causal=case.causal, dead=dead, **options)


def flex_configs(name: str, case: Case) -> tuple[Config, ...]:
    """Return the configurations that FlexAttention tries for its counterpart of our kernel ``name``."""
    if name == "forward":
        return _FLEX_FORWARD + ((_FLEX_DEFAULT[case.D],) if case.D in _FLEX_DEFAULT else ())
    return _FLEX_BACKWARD.get(name, tuple(configs(name, case.D, 16)[:1]))


def extra_memory(case: Case) -> float:
    """Return the bytes of the penalties and of the log-sum-exp."""
    return case.B * case.N * (case.N * 2 + case.H * 4)


def _compiled(name: str, variant: str) -> str:
    return "sdpa" if name == "delta" else variant
