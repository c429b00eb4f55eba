"""Register one's own way of writing attention, where the recogniser does not see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import AttnRewriteError, closest, error
from attnrewrite.passes.attention.form import EmptyRow
from attnrewrite.passes.graph.capture import Capture
from attnrewrite.passes.masks.classify import MaskReader
from attnrewrite.passes.patterns.monomorphism import Host
from attnrewrite.passes.patterns.pattern import Pattern
from attnrewrite.passes.patterns.registry import PATTERNS, Extra
from attnrewrite.passes.patterns.search import look_for
from attnrewrite.passes.proof.certificate import Prover


def register_pattern(
    name: str,
    pattern: Callable[..., Tensor],
    example_inputs: Sequence[Tensor],
    *,
    layout: str | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> None:
    """Make the recogniser find ``pattern``, a function of tensors that computes attention in its own way.

    ``pattern(query, key, value)`` or ``pattern(query, key, value, attn_mask)`` returns what torch's
    ``scaled_dot_product_attention`` returns for these tensors, this ``scale`` (None: 1/sqrt(D)) and ``is_causal``. In
    the graph of a model it is found by its operators and their literals; literals that follow from sizes, such as a
    shape or 1/sqrt(D), are those of the model. What is found is proved, reported and rewritten as any other attention.
    Models that are compiled already are not searched again.

    example_inputs: query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] and, where the pattern takes one,
        attn_mask that broadcasts to [B, H, L, S], boolean (True: visible) or additive. Only shapes and dtypes are used.
    layout: a letter for each dim of the query, ``l`` for its position and ``d`` for the head dim, such as "blhd" or
        "bld". Key, value and result are laid out alike; the mask is [..., L, S]. Default: positions and head dim last.

    Raises:
        MatchError: AR208 where the name is taken, the pattern does not run, or it is not that attention.
    """
    if name in PATTERNS:
        raise error("AR208", f"a pattern named {name!r} is registered already")
    examples = _checked(name, example_inputs, is_causal)
    letters = layout if layout is not None else "abcfghijk"[: max(examples[0].dim() - 2, 0)] + "ld"
    if len(set(letters)) != examples[0].dim() or len(letters) != len(set(letters)) or not {"l", "d"} <= set(letters):
        raise error("AR208", f"{name!r}: layout {letters!r} does not name the {examples[0].dim()} dims of the query")
    if set(letters) & {"s", "e"}:
        raise error("AR208", f"{name!r}: in a layout, s and e are the positions and features of keys and values")
    candidate = Pattern(name, pattern, examples, letters, scale, is_causal)
    PATTERNS[name] = _proved(candidate)


def unregister_pattern(name: str) -> None:
    """Forget a pattern. Raises MatchError AR208 where none has this name."""
    if name not in PATTERNS:
        raise error("AR208", f"there is no pattern {name!r}; {closest(name, PATTERNS)}")
    del PATTERNS[name]


def list_patterns() -> list[str]:
    """Return the names of the registered patterns, in the order in which they are tried."""
    return list(PATTERNS)


def _checked(name: str, inputs: Sequence[Any], is_causal: bool) -> tuple[Tensor, ...]:
    """Return the examples on the meta device."""
    if len(inputs) not in (3, 4) or not all(isinstance(x, Tensor) for x in inputs):
        raise error("AR208", f"{name!r}: example_inputs are query, key, value and, where there is one, attn_mask")
    if len({x.dim() for x in inputs[:3]}) != 1 or inputs[0].dim() < 2 or not inputs[0].is_floating_point():
        shapes = ", ".join(str(list(x.shape)) for x in inputs[:3])
        raise error("AR208", f"{name!r}: query, key and value have shapes {shapes}; they need one rank, at least 2")
    if len(inputs) == 4 and is_causal:
        raise error("AR208", f"{name!r}: a pattern with attn_mask and is_causal=True is not defined, as in torch")
    return tuple(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs)


def _proved(pattern: Pattern) -> Pattern:
    """Find the pattern in its own trace and prove it there; return it with what its rows without keys give."""
    try:
        skeleton = pattern.skeleton()
        pattern = pattern if len(pattern.examples) == 3 else pattern.with_empty(_empty_row(pattern))
    except AttnRewriteError:
        raise
    except Exception as failure:
        raise error("AR208", f"{pattern.name!r} does not run: {type(failure).__name__}: {failure}") from failure
    if skeleton is None:
        raise error("AR208", f"{pattern.name!r}: its operators depend on the sizes of its inputs")
    if len(skeleton[0].steps) < 2:
        raise error("AR208", f"{pattern.name!r} is one operator; there is nothing to recognise")
    extra = Extra()
    module = skeleton[0].module
    look_for(pattern, Host(module.graph), MaskReader(Capture(module, "dynamo")), set(), extra)
    if not extra.attentions:
        reasons = [row.detail for _, row in extra.refused] or ["it does not use all its inputs, or holds tensors"]
        raise error("AR208", f"{pattern.name!r} is not attention: {reasons[0]}")
    wrong = Prover().prove(extra.attentions[0])
    if wrong:
        scale = "1/sqrt(D)" if pattern.scale is None else f"{pattern.scale:g}"
        detail = f"with scale {scale} and is_causal={pattern.is_causal}, {wrong}"
        raise error("AR208", f"{pattern.name!r} is not attention {detail}")
    return pattern


def _empty_row(pattern: Pattern) -> EmptyRow:
    """Run the pattern with a mask that hides every key."""
    generator = torch.Generator().manual_seed(0)
    shapes = [x.shape for x in pattern.resized(pattern.examples)]
    given = zip(shapes, pattern.examples, strict=True)
    query, key, value, mask = (torch.randn(n, generator=generator).to(x.dtype) for n, x in given)
    mask = torch.zeros_like(mask) if mask.dtype == torch.bool else torch.full_like(mask, -torch.inf)
    out = pattern.function(query, key, value, mask)
    if bool(out.isnan().all()):
        return "nan"
    if bool((out == 0).all()):
        return "zero"
    if mask.dtype == torch.bool:
        return "uniform"
    raise error("AR208", f"{pattern.name!r}: rows whose keys are all masked with -inf give neither NaN nor 0")
