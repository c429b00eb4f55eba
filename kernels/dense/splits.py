"""How keys are split among programs where there are few queries."""

from __future__ import annotations

from typing import NamedTuple

_SHARE = 256
"""Keys of a part are a multiple of it: of every block of keys."""


class Split(NamedTuple):
    """``parts`` of ``share`` keys each, the last of what is left."""

    parts: int
    share: int


def split(groups: int, S: int, processors: int) -> Split:
    """Return how to split S keys: about two programs for every processor, for ``groups`` heads of keys."""
    wanted = max(1, min(-(-2 * processors // max(1, groups)), -(-S // _SHARE)))
    share = max(1, -(-S // (wanted * _SHARE))) * _SHARE
    return Split(max(1, -(-S // share)), share)
