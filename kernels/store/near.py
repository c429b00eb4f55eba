"""Which stored record is nearest to a key that has none."""

from __future__ import annotations

from collections.abc import Iterable

from attnrewrite.kernels.store.key import VERSION, Key, Pairs, Value
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.record import Record, best

_SIBLING, _TRITON, _SOURCE = 4, 8, 16
"""How many steps of a bucket another device, another version of triton or another text of the kernel counts."""
_FAR = 1 << 20


def nearest(wanted: Key, records: Iterable[Record]) -> Record | None:
    """Return the record nearest to a key: the same one, in whichever order they are read."""
    found = [(apart, record) for record in records if (apart := distance(wanted, record.key)) is not None]
    closest = min((apart for apart, _ in found), default=None)
    return best(record for apart, record in found if apart == closest)


def distance(wanted: Key, stored: Key) -> int | None:
    """Return how far a key is from another one, None where a record of it says nothing.

    A step of a bucket is nearer than another device of the same target, that is nearer than another version of triton,
    and another text of the kernel comes last.
    """
    if wanted.kind != stored.kind:
        return None
    apart = _steps(wanted.bucket, stored.bucket)
    apart += _SIBLING * (wanted.device != stored.device)
    apart += _TRITON * (wanted.triton != stored.triton)
    return apart + _SOURCE * (wanted.source != stored.source)


def family_folders(folder: Folder, family: str) -> list[str]:
    """Return the folders of a family's keys on all devices; those near a key end with its kind. Raises OSError."""
    return [key for device in folder.below(f"v{VERSION}/{family}") for key in folder.below(device)]


def _steps(wanted: Pairs, stored: Pairs) -> int:
    left, right = dict(wanted), dict(stored)
    if left.keys() != right.keys():
        return _FAR
    return max((_apart(left[name], right[name]) for name in left), default=0)


def _apart(left: Value, right: Value) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return abs(left - right)
    return 0 if left == right else _FAR
