"""Launch the generated kernels of the dense family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrewrite.kernels.dense import tuned
from attnrewrite.kernels.dense.call import Call, chosen, named
from attnrewrite.kernels.dense.catalogue import OF_VALUES, kernel, made_apart
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.descriptors import can_describe, with_scratch
from attnrewrite.kernels.generation.emit import Emitted, Flag
from attnrewrite.kernels.generation.loading import load
from attnrewrite.kernels.generation.resources import Resources


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, H, L, Dv]`` in the dtype of the query, and the log-sum-exp in base 2 ``[B, H, L]``."""
    B, H, _, L, _ = call.sizes
    out = call.query.new_empty(B, H, L, call.value.shape[3])
    lse = call.query.new_empty(B, H, L, dtype=torch.float32)
    more = {"Out": out, "Lse": lse, **out_strides(out)}
    run("forward", call, more, partial(row_blocks, call), prepare=_live(call))
    return out, lse


@dataclass
class Gradients:
    """By query, key and value; by the temperatures, sinks, and, where asked for, bias ``[B, H, L, S]`` and slopes."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_temperature: Tensor | None = None
    value_temperature: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients are wanted that take work of their own."""

    bias: bool = False
    slopes: bool = False


NOTHING_MORE = Wanted()


def backward(
    call: Call, out: Tensor, lse: Tensor, upstream: Tensor, wanted: Wanted = NOTHING_MORE, *, wide: bool = False
) -> tuple[Gradients, Tensor]:
    """Return the gradients of ``sum(upstream * out)``, and ``sum(upstream * out)`` of each row, ``[B, H, L]``.

    Those by key and value are ``wide``, in float32, where others will be added to them. No atomics: the same inputs
    give the same bits.
    """
    B, H, Hkv, L, S = call.sizes
    warm = call.query_temperature is not None
    dtype = torch.float32 if wide else call.key.dtype
    found = Gradients(
        call.query.new_empty(call.query.shape),
        call.key.new_empty(call.key.shape, dtype=dtype),
        call.value.new_empty(call.value.shape, dtype=dtype),
        lse.new_empty(B, H, L) if warm else None,
        lse.new_empty(B, Hkv, S) if warm else None,
        lse.new_zeros(B, H, L, S) if wanted.bias else None,
    )
    delta = torch.empty_like(lse)
    more: dict[str, Any] = {"Out": out, "Lse": lse, "DOut": upstream, "Delta": delta}
    more |= {**out_strides(out), **named("g", "bhmd", upstream)}
    by_slope = lse.new_empty(B, H, L) if wanted.slopes else None
    keys = {"DKey": found.key, "DValue": found.value, "DValueTau": found.value_temperature}
    queries = {"DQuery": found.query, "DQueryTau": found.query_temperature, "DBias": found.bias, "DSlopes": by_slope}
    flags = {"BIAS_GRADIENT": wanted.bias, "SLOPE_GRADIENT": wanted.slopes}
    run("delta", call, more, partial(row_blocks, call))
    run("backward_keys", call, more | keys, partial(key_blocks, call))
    if made_apart(call.query.shape[3], call.value.shape[3]):
        run("backward_values", call, more | keys, partial(key_blocks, call), OF_VALUES)
    programs = partial(row_blocks, call)
    run("backward_queries", call, more | queries, programs, flags, prepare=_live(call))
    found.slopes = None if by_slope is None else by_slope.sum((0, 2))
    found.sinks = None if call.how.sinks is None else by_sinks(call.how.sinks, lse, delta)
    return found, delta


def by_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient by sinks ``[H]``: less their weight times ``sum(upstream * out)``, over all rows."""
    weights = torch.exp2(sinks.float().view(-1, 1) * math.log2(math.e) - lse)
    return -(weights * delta).masked_fill(lse == float("-inf"), 0.0).sum((0, 2))


BLOCK_LIST = 16
"""Blocks of keys that are looked at together."""


class NoConfigurationError(Exception):
    """The device can run a kernel in none of its configurations."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel that is about to run, all but its configuration."""

    name: str
    call: Call
    given: Mapping[str, Flag]
    emitted: Emitted
    arguments: Mapping[str, Any]
    programs: Callable[[Config], int]
    prepare: Callable[[Config], Mapping[str, Any]] | None = None
    """Makes the arguments that depend on the configuration."""

    @property
    def widest(self) -> int:
        """The larger of the two padded numbers of features."""
        return max(int(self.given["PAD_D"]), int(self.given["PAD_DV"]))

    @property
    def bits(self) -> int:
        """Of an element."""
        return self.call.query.element_size() * 8

    def whole(self, config: Config) -> dict[str, Any]:
        """Return every argument."""
        own = {} if self.prepare is None else self.prepare(config)
        return chosen(self.emitted.parameters, {**self.arguments, **own, **config.constants})

    def uses(self, config: Config) -> Resources | None:
        """Compile it for the device of its tensors, without running it; None where the device cannot run it."""
        try:
            with _passes_named():
                made = load(self.emitted).warmup(grid=(1,), **self.whole(config), **_how(config))
                made.run  # noqa: B018  # loads it, upon which it knows what it uses
        except cannot_run():
            return None
        return Resources(made.n_regs, made.n_spills, made.metadata.shared, "")

    def __call__(self, config: Config) -> None:
        """Run it, unless there is nothing to do. Raises what ``cannot_run`` lists."""
        programs = self.programs(config)
        if not programs:
            return
        start = partial(load(self.emitted)[(programs,)], **self.whole(config), **_how(config))
        with _passes_named():
            if config.descriptors:
                with_scratch(start, self.call.query.device)
            else:
                start()


class PassFailedError(Exception):
    """One of the compiler's passes failed."""


@contextmanager
def _passes_named() -> Iterator[None]:
    """Give a failing pass, of which triton makes a bare RuntimeError like any other, an error of its own."""
    try:
        yield
    except RuntimeError as failure:
        if "PassManager" not in str(failure):
            raise
        raise PassFailedError(str(failure)) from failure


def _how(config: Config) -> dict[str, int]:
    """Return how triton is asked to compile."""
    return {"num_warps": config.warps, "num_stages": config.stages}


def run(
    name: str,
    call: Call,
    more: Mapping[str, Any],
    programs: Callable[[Config], int],
    flags: Mapping[str, Flag] | None = None,
    prepare: Callable[[Config], Mapping[str, Any]] | None = None,
) -> None:
    """Launch kernel ``name``, specialised for ``call``, with the arguments and flags that the call lacks.

    ``prepare`` makes those that depend on the configuration.

    Raises NoConfigurationError where the device can run it in none.
    """
    given = {**call.flags(), **(flags or {})}
    _launcher(Launch(name, call, given, kernel(name, given), {**call.arguments(), **more}, programs, prepare))


def first_that_runs(launch: Launch) -> None:
    """Run a launch in the first of its configurations that the device can run."""
    failure: Exception | None = None
    for config in tuned.configurations(launch):
        if (launch.emitted, config) in _FAILED or (config.descriptors and not can_describe(launch)):
            continue
        try:
            launch(config)
            return
        except cannot_run() as cause:
            _FAILED.add((launch.emitted, config))
            failure = cause
    raise NoConfigurationError(f"{launch.emitted.name}: {failure}") from failure


_FAILED: set[tuple[Emitted, Config]] = set()
"""What was tried in vain on this machine."""

Launcher = Callable[[Launch], None]
_launcher: Launcher = first_that_runs


@contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Hand all launches inside to ``launcher``, which may run them, or do without."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def cannot_run() -> tuple[type[Exception], ...]:
    """Return what triton raises where a kernel cannot be compiled for the device, or does not fit it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError, PassFailedError


def row_blocks(call: Call, config: Config) -> int:
    """Return how many programs there are, one for a block of rows of a head."""
    B, H, _, L, _ = call.sizes
    return B * H * -(-L // config.block_m)


def key_blocks(call: Call, config: Config) -> int:
    """Return how many programs there are, one for a block of keys of a head."""
    B, _, Hkv, _, S = call.sizes
    return B * Hkv * -(-S // config.block_n)


def _live(call: Call) -> Callable[[Config], Mapping[str, Any]] | None:
    """List the blocks of keys that count for each block of rows, where votes have put keys out of account."""
    return None if call.death is None else lambda config: live_blocks(call, config)


def live_blocks(call: Call, config: Config) -> dict[str, Tensor]:
    """Return the numbers of the blocks ``[B, row blocks, key blocks]``, and how many they are ``[B, row blocks]``."""
    assert call.death is not None
    B, _, _, L, S = call.sizes
    blocks = -(-L // config.block_m)
    lists = call.death.new_empty(B, blocks, -(-S // config.block_n))
    counts = call.death.new_empty(B, blocks)
    load(kernel("live", {}))[(B * blocks,)](
        Death=call.death,
        Live=lists,
        Lives=counts,
        L=L,
        S=S,
        offset=call.how.offset,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_LIST=BLOCK_LIST,
    )
    return {"Live": lists, "Lives": counts}


def out_strides(out: Tensor) -> dict[str, int]:
    """Name the strides of an output whose features lie side by side."""
    return {"stride_ob": out.stride(0), "stride_oh": out.stride(1), "stride_om": out.stride(2)}
