"""One observation: how long configurations of a kernel took on a device. Immutable, and named by its content."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from attnrewrite.kernels.store.key import VERSION, Key, Pairs, canonical

LARGEST = 4096
"""Bytes of a record."""

Status = Literal["ok", "pruned", "failed", "fault", "wrong"]
"""Timed; not timed because it spills or does not fit; not compiled; crashed or hung; wrong result."""
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Timing:
    """What is known of one configuration: milliseconds over ``n`` runs, and what a program of it uses."""

    config: Pairs
    status: Status = "ok"
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    """Bytes of shared memory."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data without what is not known."""
        data = {**vars(self), "config": dict(self.config)}
        return {name: value for name, value in data.items() if value is not None}


@dataclass(frozen=True)
class Record:
    """Timings for a key. ``winner`` is the configuration to run, one of those with status "ok".

    noise: relative width of the band in which configurations count as equally fast.
    revision: the store counts it up when a key is tuned again; the highest counts. No clock is asked.
    time: seconds since 1970, for people and for pruning.
    origin: what is good to know but decides nothing, such as the versions of driver and torch.
    signature: HMAC-SHA256 of everything else, or empty.
    """

    key: Key
    timings: tuple[Timing, ...]
    winner: Pairs
    noise: float = 0.0
    revision: int = 1
    time: int = 0
    origin: Pairs = ()
    signature: str = ""

    @cached_property
    def data(self) -> bytes:
        """The record as canonical JSON: the content of its file."""
        return canonical(self.to_json())

    @cached_property
    def path(self) -> str:
        """The name of the record: ``v1/<family>/<device>/<digest of the key>/<digest of the record>.json``."""
        return f"{self.key.folder}/{hashlib.sha256(self.data).hexdigest()}.json"

    @property
    def standing(self) -> tuple[int, int, str]:
        """Of the records of one key the one with the highest standing counts, in whichever order they are read."""
        runs = max((timing.n for timing in self.timings if timing.config == self.winner), default=0)
        return self.revision, runs, self.path

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = {
            "version": VERSION,
            "key": self.key.to_json(),
            "timings": [timing.to_json() for timing in self.timings],
            "winner": dict(self.winner),
            "noise": self.noise,
            "revision": self.revision,
            "time": self.time,
            "origin": dict(self.origin),
        }
        return {**data, "signature": self.signature} if self.signature else data

    def signed(self, secret: bytes) -> Record:
        """Return the record with its signature by ``secret``."""
        unsigned = replace(self, signature="")
        return replace(unsigned, signature=hmac.new(secret, unsigned.data, hashlib.sha256).hexdigest())

    def is_signed(self, secret: bytes) -> bool:
        """Whether the signature is that by ``secret``."""
        return hmac.compare_digest(self.signature.encode(), self.signed(secret).signature.encode())

    def pieces(self, secret: bytes = b"") -> Iterator[Record]:
        """Yield records of at most ``LARGEST`` bytes that together hold every timing, signed if there is a secret.

        Raises ValueError where the key, the winner and one more timing are larger.
        """
        whole = self.signed(secret) if secret else self
        if len(whole.data) <= LARGEST:
            yield whole
            return
        first = [timing for timing in self.timings if timing.config == self.winner]
        rest = [timing for timing in self.timings if timing.config != self.winner]
        if len(rest) < 2:
            raise ValueError(f"a record of {len(whole.data)} bytes: a key and two timings take at most {LARGEST}")
        for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            yield from replace(self, timings=(*first, *half)).pieces(secret)


def best(records: Iterable[Record]) -> Record | None:
    """Return the record of a key that counts."""
    return max(records, key=lambda record: record.standing, default=None)


def union(records: Iterable[Record]) -> dict[Pairs, Timing]:
    """Return the timings of all records of a key: what was timed once need not be timed again."""
    ordered = sorted(records, key=lambda record: record.standing)
    return {timing.config: timing for record in ordered for timing in record.timings}
