"""Which stored record is nearest to a key that has none."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from attnrewrite.kernels.store.key import VERSION, Key, Pairs, Value
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.record import Record, best

LOOKED_AT = 256
"""Keys of a device that are looked at: reading them takes some tenths of a second, once per process."""
_STEP, _SIBLING, _TRITON, _SOURCE = 1, 4, 8, 16
_FAR = 1 << 20


def distance(wanted: Key, stored: Key) -> int | None:
    """Return how far a key is from another one, None where a record of it says nothing.

    Kernel, target, types, sizes that are compiled in and flags must be the same. A step of a bucket is nearer than
    another device of the same target, that is nearer than another version of triton, and another text of the kernel
    comes last.
    """
    same = ("family", "kernel", "target", "dtypes", "dims", "flags", "deterministic")
    if any(getattr(wanted, name) != getattr(stored, name) for name in same):
        return None
    apart = _STEP * _steps(wanted.bucket, stored.bucket)
    apart += _SIBLING * (wanted.device != stored.device)
    apart += _TRITON * (wanted.triton != stored.triton)
    return apart + _SOURCE * (wanted.source != stored.source)


def nearest(wanted: Key, records: Iterable[Record]) -> Record | None:
    """Return the record nearest to a key: the same one, in whichever order they are read."""
    found = [(apart, record) for record in records if (apart := distance(wanted, record.key)) is not None]
    closest = min((apart for apart, _ in found), default=None)
    return best(record for apart, record in found if apart == closest)


def neighbours(wanted: Key) -> Iterator[Key]:
    """Yield the keys that are at most a step away in each bucket: nothing is nearer."""
    choices = [(value, value - 1, value + 1) if isinstance(value, int) else (value,) for _, value in wanted.bucket]
    for values in list(itertools.product(*choices))[1:]:
        names = (name for name, _ in wanted.bucket)
        yield replace(wanted, bucket=tuple(zip(names, values, strict=True)))


def family_folders(folder: Folder, family: str) -> Iterator[str]:
    """Yield the folders of a family's keys on all devices, of each device the first ``LOOKED_AT``. Raises OSError."""
    for device in folder.below(f"v{VERSION}/{family}"):
        yield from folder.below(device)[:LOOKED_AT]


def _steps(wanted: Pairs, stored: Pairs) -> int:
    left, right = dict(wanted), dict(stored)
    if left.keys() != right.keys():
        return _FAR
    return max((_apart(left[name], right[name]) for name in left), default=0)


def _apart(left: Value, right: Value) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return abs(left - right)
    return 0 if left == right else _FAR
