"""What there is to tune: every kernel that a call or a model launches, once for each key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from attnrewrite.kernels.dense.descriptors import can_describe
from attnrewrite.kernels.dense.keys import Where, key_of, shape_of
from attnrewrite.kernels.dense.launch import Launcher, first_that_runs, launched_by
from attnrewrite.kernels.dense.sample import Recipe, Sample
from attnrewrite.kernels.store.key import Key
from attnrewrite.kernels.tuning.work import Shape

if TYPE_CHECKING:
    from attnrewrite.kernels.dense.launch import Launch


class Task(NamedTuple):
    """A kernel for calls of one size, how to make such a call, and whether it may load tiles by descriptors."""

    key: Key
    shape: Shape
    recipe: Recipe
    descriptors: bool

    @classmethod
    def of(cls, launch: Launch, key: Key) -> Task:
        """Return the task of tuning a launch, of which this is the key."""
        return cls(key, shape_of(launch), Recipe.of(launch), can_describe(launch))


def of_recipe(recipe: Recipe, device: torch.device, where: Where) -> list[Task]:
    """Return what a call launches. No kernel runs."""
    return _noted(lambda: Sample(recipe, device).run(), where, lambda launch: None)


def of_run(run: Callable[[], object], where: Where) -> list[Task]:
    """Return what ``run`` launches while it runs."""
    return _noted(run, where, first_that_runs)


def _noted(run: Callable[[], object], where: Where, launcher: Launcher) -> list[Task]:
    found: dict[Key, Task] = {}

    def note(launch: Launch) -> None:
        key = key_of(launch, where)
        found.setdefault(key, Task.of(launch, key))
        launcher(launch)

    with launched_by(note):
        run()
    return list(found.values())


_KINDS: dict[str, Literal["selective", "symmetric"]] = {"selective": "selective", "symmetric": "symmetric"}


def recipes(
    variant: str,
    *,
    B: int,
    H: int,
    Hkv: int,
    lengths: tuple[int, ...],
    D: int,
    Dv: int,
    dtype: str,
    causal: bool,
    learns: bool,
    step: bool,
) -> Iterator[Recipe]:
    """Yield calls of a variant: whole sequences, with gradients if it ``learns``, and for a ``step`` their last query.

    variant: one with kernels, see ``dense/catalogue.py``.
    """
    kind: Literal["dense", "selective", "symmetric"] = _KINDS.get(variant, "dense")
    for length in lengths:
        sizes = (B, H, Hkv, length, length, D, Dv)
        more: dict[str, Any] = {"dtype": dtype, "scale": D**-0.5, "causal": causal, "temperatures": variant == "ssa"}
        whole = Recipe(*sizes, kind=kind, learns=learns, **more)
        yield whole
        if step and causal:
            yield replace(whole, L=1, offset=length - 1, learns=False)
