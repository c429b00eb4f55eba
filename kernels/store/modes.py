"""What a process does about tuning: whether it searches, and what it does with the store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from attnrewrite.kernels.diagnostics import closest, error

Search = Literal["cached", "off", "quick", "full"]
VARIABLE = "ATTNREWRITE_AUTOTUNE"
_SWITCHES = ("readonly", "offline", "refresh", "strict")


@dataclass(frozen=True)
class Mode:
    """How kernels get their configurations.

    search: "cached" takes what is stored, or else the default; "off" takes the default; "quick" and "full" tune what is
        not stored, within a small and a large budget.
    readonly: nothing is written.
    offline: the shared store is not asked.
    refresh: what is stored is not taken, so that it is tuned again.
    strict: a key that is not stored is TuningError AR511.
    """

    search: Search = "cached"
    readonly: bool = False
    offline: bool = False
    refresh: bool = False
    strict: bool = False


def parse(text: str) -> Mode:
    """Read a mode such as ``"quick,offline"``. Raises CaptureError AR102 for a word that is none."""
    mode = Mode()
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word in get_args(Search):
            mode = replace(mode, search=cast(Search, word))
        elif word in _SWITCHES:
            mode = replace(mode, **cast(dict[str, Any], {word: True}))
        else:
            raise error("AR102", f"{VARIABLE}: {word!r}; {closest(word, (*get_args(Search), *_SWITCHES))}")
    return mode


def from_environment(variables: Mapping[str, str] = os.environ) -> Mode:
    """Return the mode in ``ATTNREWRITE_AUTOTUNE``; without it ranks of a distributed run read and do not write."""
    if VARIABLE in variables:
        return parse(variables[VARIABLE])
    return Mode(readonly=distributed(variables))


def distributed(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks, such as torchrun starts."""
    return variables.get("WORLD_SIZE", "1") not in ("", "0", "1")
