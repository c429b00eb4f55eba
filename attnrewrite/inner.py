"""Inner compilers: what runs the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx


def inductor_modes() -> tuple[str, ...]:
    """Return the names that ``mode=`` takes; they are inductor's."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def compile_inner(inner: str, mode: str, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile ``gm`` with the named compiler."""
    if inner == "eager":
        return gm
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled: Callable[..., Any] = aot_eager(gm, list(example_inputs))
        return compiled
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode)
    return cast("Callable[..., Any]", compile_fx(gm, list(example_inputs), config_patches=patches))
