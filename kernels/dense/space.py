"""The configurations that a kernel may be run with: all that a search looks at, and all that is believed of records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnrewrite.kernels.dense.configs import Config

_TILE = (16, 32, 64, 128)
_EITHER = (False, True)


@dataclass(frozen=True)
class Space:
    """Every combination of these. A field of one value is one that the kernel does not read."""

    block_m: tuple[int, ...] = _TILE
    block_n: tuple[int, ...] = _TILE
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1, 2, 3, 4)
    descriptors: tuple[bool, ...] = (False,)

    def valid(self, config: Mapping[str, Any]) -> bool:
        """Whether these are the fields of a configuration, each with one of its values."""
        if config.keys() != set(Config._fields):
            return False
        known = {name: getattr(self, name) for name in Config._fields}
        return all(type(config[name]) is type(values[0]) and config[name] in values for name, values in known.items())

    def __iter__(self) -> Iterator[Config]:
        values = (getattr(self, name) for name in Config._fields)
        yield from itertools.starmap(Config, itertools.product(*values))


_ROWS = Space(block_m=(4, 8, 16, 32, 64, 128, 256), block_n=(16,), stages=(1, 2))

SPACES = {
    "forward": Space(descriptors=_EITHER),
    "delta": _ROWS,
    "backward_keys": Space(descriptors=_EITHER),
    "backward_values": Space(descriptors=_EITHER),
    "backward_queries": Space(descriptors=_EITHER),
    "backward_shared": Space(),
    "decode": Space(block_m=(16, 32, 64), block_n=(16, 32, 64, 128, 256)),
    "merge": _ROWS,
    "votes": Space(),
    "backward_logits": Space(),
    "backward_votes": Space(),
}
"""By kernel. ``live`` is cut as the kernel is that it works for."""
