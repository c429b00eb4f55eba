"""The exact key of a tuning record: everything that decides which configuration is fastest, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

VERSION = 1
"""Of keys and records: readers look at their own version only, so that two may lie side by side."""

KIND = ("family", "kernel", "target", "dtypes", "dims", "flags", "deterministic")
"""Fields without which a record says nothing about a key."""

Value = bool | int | str
Pairs = tuple[tuple[str, Value], ...]
"""A mapping that can be hashed: sorted by name."""


def pairs(values: Mapping[str, Value]) -> Pairs:
    """Return a mapping as sorted pairs."""
    return tuple(sorted(values.items()))


class Device(NamedTuple):
    """What tells devices apart that run the same code: H100 and H200 have the same target and as many processors."""

    name: str
    multiprocessors: int
    shared_memory: int
    """Bytes that one program can have."""
    l2_cache: int
    """Bytes."""
    mig: str = ""
    """The profile of a slice of a GPU, such as ``1g.18gb``; empty for a whole one."""


@dataclass(frozen=True)
class Key:
    """What a record is about. Two keys are the same if every field is."""

    family: str
    """Of kernels, such as ``dense``."""
    kernel: str
    source: str
    """The digest of the emitted kernel."""
    triton: str
    """Version: the fastest configuration changes with it."""
    target: str
    """Such as ``sm_90`` or ``gfx942``."""
    device: Device
    dtypes: tuple[str, ...]
    dims: Pairs
    """Sizes that are compiled in, such as D and Dv."""
    flags: Pairs
    bucket: Pairs
    """Sizes that vary from call to call; see ``bucket``."""
    deterministic: bool = True

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # of fifty parts, and every launch of a kernel looks a key up
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def digest(self) -> str:
        """The name of the key: 48 characters of the SHA-256 of its canonical JSON, and its kind."""
        return hashlib.sha256(canonical(self.to_json())).hexdigest()[:48] + self.kind

    @cached_property
    def kind(self) -> str:
        """What the names of keys end with that may be near: 16 characters of the SHA-256 of the fields ``KIND``."""
        plain = self.to_json()
        return hashlib.sha256(canonical({name: plain[name] for name in KIND})).hexdigest()[:16]

    @property
    def folder(self) -> str:
        """Where records of this key lie: ``v1/<family>/<device>/<digest>``."""
        return f"v{VERSION}/{self.family}/{slug(self.device.name)}/{self.digest}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        nested = {name: dict(getattr(self, name)) for name in ("dims", "flags", "bucket")}
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, **nested, "device": self.device._asdict(), "dtypes": list(self.dtypes)}

    def flat(self) -> dict[str, Value]:
        """Return every field by its name, those inside a field as ``device.name``."""
        found: dict[str, Value] = {}
        for name, value in self.to_json().items():
            if isinstance(value, dict):
                found |= {f"{name}.{part}": inner for part, inner in value.items()}
            else:
                found[name] = ", ".join(value) if isinstance(value, list) else value
        return found


class Difference(NamedTuple):
    """A field in which two keys differ; None where a key lacks it."""

    field: str
    wanted: Value | None
    stored: Value | None

    def __str__(self) -> str:
        return f"{self.field}: wanted {self.wanted}, stored {self.stored}"


def differences(wanted: Key, stored: Key) -> list[Difference]:
    """Return every field in which two keys differ."""
    left, right = wanted.flat(), stored.flat()
    names = [*left, *(name for name in right if name not in left)]
    return [Difference(n, left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)]


def bucket(sizes: Mapping[str, int]) -> Pairs:
    """Return ⌈log2 N⌉ of every size: lengths of one bucket share a configuration."""
    return pairs({name: max(size - 1, 0).bit_length() for name, size in sizes.items()})


def slug(name: str) -> str:
    """Return a device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def canonical(data: object) -> bytes:
    """Return the one JSON text of plain data: names sorted, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
