"""Work on whole stores: what is there, what is broken, what can go, and how it gets from one to another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from attnrewrite.kernels.store.key import VERSION, Difference, Key, differences
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.near import family_folders
from attnrewrite.kernels.store.place import Place
from attnrewrite.kernels.store.record import Record, best
from attnrewrite.kernels.store.validation import Refusal, read

Tick = Callable[[], None]
"""Called after each record."""

_KEPT = (Refusal.VERSION, Refusal.SIGNATURE)
"""What another version of this library, or one with another secret, can still read."""
_COMPARED = 1000
_ABANDONED = 3600
"""Seconds after which a file that is still being written has lost its writer."""


class Row(NamedTuple):
    """How many keys of a family are known on a device."""

    family: str
    device: str
    keys: int


@dataclass
class Copied:
    """What a copy did: paths that are new, how many were there already, and how many were refused for what."""

    new: list[str] = field(default_factory=list)
    present: int = 0
    refused: Counter[Refusal] = field(default_factory=Counter)


def rows(folder: Folder) -> list[Row]:
    """Return what a folder holds. No record is opened. Raises OSError."""
    devices = [device for family in folder.below(f"v{VERSION}") for device in folder.below(family)]
    return [Row(Path(name).parent.name, Path(name).name, len(folder.below(name))) for name in devices]


def keys(folder: Folder, start: str, secret: bytes) -> Iterator[tuple[Record, list[Record]]]:
    """Yield of each key whose digest begins with ``start`` the record that counts, and all. Raises OSError."""
    for name in folder.folders():
        if name.rpartition("/")[2].startswith(start):
            found = [read(data, path, secret) for path, data in folder.fetch(name).items()]
            records = [record for record in found if isinstance(record, Record)]
            counts = best(records)
            if counts is not None:
                yield counts, records


def closest(folder: Folder, wanted: Key, secret: bytes) -> list[tuple[Record, list[Difference]]]:
    """Return the stored records of a key's kind with the fewest fields that differ, at most three.

    Where there are none of its kind, those of its family are compared, up to ``_COMPARED`` keys. Raises OSError.
    """
    names = family_folders(folder, wanted.family)
    alike = [name for name in names if name.endswith(wanted.kind)]
    found: dict[Key, Record] = {}
    for name in alike or names[:_COMPARED]:
        for path, data in folder.fetch(name).items():
            record = read(data, path, secret)
            if isinstance(record, Record):
                found[record.key] = record
    pairs = [(record, differences(wanted, record.key)) for record in found.values()]
    return sorted(pairs, key=lambda pair: (len(pair[1]), pair[0].path))[:3]


def contents(place: Place, paths: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield records' contents by their paths; what was removed meanwhile is left out."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path, place.read(path)


def copy(source: Iterable[Record | Refusal], target: Place, *, dry_run: bool, tick: Tick) -> Copied:
    """Write every record of ``source`` that ``target`` does not have."""
    return _add(source, target, set(target.paths()), Copied(), dry_run, tick)


def transfer(source: Place, target: Place, secret: bytes, *, dry_run: bool, tick: Tick) -> Copied:
    """Write every record of another place that ``target`` does not have; only those are read."""
    there = set(target.paths())
    paths = list(source.paths())
    absent = [path for path in paths if path not in there]
    found = (read(data, path, secret) for path, data in contents(source, absent))
    return _add(found, target, there, Copied(present=len(paths) - len(absent)), dry_run, tick)


def _add(
    source: Iterable[Record | Refusal], target: Place, there: set[str], done: Copied, dry_run: bool, tick: Tick
) -> Copied:
    for record in source:
        if isinstance(record, Refusal):
            done.refused[record] += 1
        elif record.path in there:
            done.present += 1
        else:
            if not dry_run:
                target.write(record.path, record.data)
            there.add(record.path)
            done.new.append(record.path)
        tick()
    return done


def broken(folder: Folder, secret: bytes, tick: Tick) -> Iterator[tuple[str, Refusal]]:
    """Yield every record of a folder that is refused. Raises OSError."""
    for path, data in contents(folder, folder.paths()):
        found = read(data, path, secret)
        if isinstance(found, Refusal):
            yield path, found
        tick()


def removable(folder: Folder, days: int | None, secret: bytes, tick: Tick) -> Iterator[tuple[str, str]]:
    """Yield what a folder can do without, and why: broken, replaced by a later revision, or older than ``days``.

    Times are those in the records; one from the future is young. Raises OSError.
    """
    oldest = 0 if days is None else time.time() - days * 24 * 3600
    for name in folder.folders():
        found = {path: read(data, path, secret) for path, data in folder.fetch(name).items()}
        records = {path: record for path, record in found.items() if isinstance(record, Record)}
        latest = max((record.revision for record in records.values()), default=0)
        for path, record in found.items():
            if isinstance(record, Refusal):
                if record not in _KEPT:
                    yield path, str(record)
            elif record.revision < latest:
                yield path, "replaced by a later one"
            elif record.time < oldest:
                yield path, f"older than {days} days"
            tick()
    for partial in folder.partials():
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _ABANDONED:
                yield str(partial.relative_to(folder.root)), "left by a writer that was killed"
