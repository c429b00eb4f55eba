"""The store: memory, then the local folder, the shared store, what came with the library, and what is near."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from attnrewrite.kernels.diagnostics import AttnRewriteWarning, error
from attnrewrite.kernels.store import misses
from attnrewrite.kernels.store.behind import Shared
from attnrewrite.kernels.store.bundled import FOLDER, bundled
from attnrewrite.kernels.store.key import Key, Pairs, differences
from attnrewrite.kernels.store.lease import lease
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.modes import Mode, distributed
from attnrewrite.kernels.store.near import family_folders, nearest
from attnrewrite.kernels.store.record import Record, Timing, best, union
from attnrewrite.kernels.store.validation import Refusal, Space, fits, read

log = logging.getLogger(__name__)
_CACHED = Mode()
Tier = Literal["memory", "local", "shared", "bundled", "near"]


class Found(NamedTuple):
    """A record and where it was. One of tier "near" is of another key."""

    record: Record
    tier: Tier


class Store:
    """Records of tuning, one store for each process. Threads that ask at once do at worst the same work twice.

    local: the folder of this user, None for memory only.
    shared: the store of a team, asked for what is not local.
    secret: where there is one, records are signed with it, and only those with its signature are read, except for what
        comes with this library.
    packs: the folder of what comes with this library.
    used: is told of every record that is made or found for its own key.
    """

    def __init__(
        self,
        local: Folder | None = None,
        shared: Shared | None = None,
        mode: Mode = _CACHED,
        secret: bytes = b"",
        packs: Path = FOLDER,
        used: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.local, self.shared, self.mode, self.secret = local, shared, mode, secret
        self.packs, self.used = packs, used
        self.refused: dict[str, Refusal] = {}  # by path
        self._memory: dict[Key, Found | None] = {}
        self._bundled: dict[str, dict[Key, Record]] = {}
        self._folders: dict[str, list[str]] = {}
        self._warned: set[str] = set()

    def find(self, key: Key, space: Space) -> Found | None:
        """Return the record for a key or for the nearest one, whose winner is valid in ``space``; None where none is.

        The first answer for a key holds for the process. Raises TuningError AR511 in mode "strict" where nothing is
        stored for the key itself.
        """
        if key not in self._memory:
            self._memory[key] = self._look(key, space)
        return self._memory[key]

    def put(self, record: Record) -> None:
        """Keep a record in memory and, unless the mode is "readonly", in the local folder and the shared store.

        Sending it takes no time of the caller. Raises ValueError where the record is too large; what cannot be written
        is AR512, a warning.
        """
        if self.mode.readonly:
            self._memory[record.key] = Found(record, "memory")
            return
        before = [other.revision for other in self._local(record.key)]
        for piece in replace(record, revision=1 + max(before, default=0)).pieces(self.secret):
            self._memory[record.key] = Found(piece, "memory")
            self.used(piece)
            self._write(piece)
            if self.shared is not None and not self.mode.offline:
                self.shared.put(piece)
        if self.local is not None:
            misses.forget(self.local.root, record.key)

    def timings(self, key: Key, space: Space) -> Mapping[Pairs, Timing]:
        """Return what is known of each configuration of ``space`` for this key: only the others need to be timed."""
        records = [] if self.mode.refresh else [*self._local(key), *self._shared(key)]
        return {config: timing for config, timing in union(records).items() if fits(config, space)}

    def accept(self, path: str, data: bytes) -> Refusal | None:
        """Keep a record that came from elsewhere in the local folder, as it is. Return why not, where it is refused."""
        record = read(data, path, self.secret)
        if isinstance(record, Refusal):
            self._refuse(path, record)
            return record
        self._memory.pop(record.key, None)
        if not self.mode.readonly:
            self._write(record)
        return None

    def lease(self, key: Key, seconds: float) -> AbstractContextManager[bool]:
        """Say whether this process is the one that tunes ``key``; see ``lease.py``.

        Inside, ``find`` looks again: another process may have tuned it meanwhile.
        """
        found = self._memory.get(key)
        if found is None or found.tier == "near":
            self._memory.pop(key, None)
        return nullcontext(True) if self.local is None else lease(self.local.root, key, seconds)

    def _look(self, key: Key, space: Space) -> Found | None:
        if self.mode.search == "off" or self.mode.refresh:
            return None
        found = self._exact(key, space)
        if found is not None:
            self.used(found.record)
            return found
        near = self._near(key, space)
        self._miss(key, near)
        return Found(near, "near") if near else None

    def _exact(self, key: Key, space: Space) -> Found | None:
        record = self._fit(self._local(key), space)
        if record is not None:
            return Found(record, "local")
        records = self._shared(key)
        record = self._fit(records, space)
        if record is not None:
            if not self.mode.readonly:
                for each in records:
                    self._write(each)
            return Found(record, "shared")
        record = self._fit(filter(None, [self._came(key.family).get(key)]), space)
        return Found(record, "bundled") if record else None

    def _near(self, key: Key, space: Space) -> Record | None:
        """Return the nearest record that is here; the shared store is not listed for it."""
        records = [*self._came(key.family).values(), *self._alike(key)]
        return nearest(key, (record for record in records if fits(record.winner, space)))

    def _miss(self, key: Key, near: Record | None) -> None:
        fields = "; ".join(map(str, differences(key, near.key))) if near else "nothing like it is stored"
        if self.mode.strict:
            raise error("AR511", f"{key.kernel} on {key.device.name}: {fields}")
        log.info("no tuning record for %s on %s: %s", key.kernel, key.device.name, fields)
        if distributed() and self.mode.readonly and "ranks" not in self._warned:
            self._warned.add("ranks")
            log.warning("ranks do not tune; run `attnrewrite tune MODEL` once before, on one of these devices")
        if self.local is not None and not self.mode.readonly:
            misses.note(self.local.root, key)

    def _fit(self, records: Iterable[Record], space: Space) -> Record | None:
        """Return the record that counts among those whose winner can be run."""
        fitting = []
        for record in records:
            if fits(record.winner, space):
                fitting.append(record)
            else:
                self._refuse(record.path, Refusal.SPACE)
        return best(fitting)

    def _local(self, key: Key) -> list[Record]:
        found: list[Record] = []
        if self.local is not None:
            with self._or_warn("AR512"):
                found += self._read(self.local.fetch(key.folder))
        return found

    def _shared(self, key: Key) -> list[Record]:
        if self.shared is None or self.mode.offline:
            return []
        answer = self.shared.fetch(key.folder)
        if self.shared.reason:
            self._warn("AR514", f"{self.shared.address}: {self.shared.reason}")
        return list(self._read(answer))

    def _alike(self, key: Key) -> Iterator[Record]:
        """Yield the records of the key's kind in the local folder, which is listed once for each family."""
        if self.local is not None:
            with self._or_warn("AR512"):
                if key.family not in self._folders:
                    self._folders[key.family] = family_folders(self.local, key.family)
                for folder in self._folders[key.family]:
                    if folder.endswith(key.kind):
                        yield from self._read(self.local.fetch(folder))

    def _came(self, family: str) -> dict[Key, Record]:
        if family not in self._bundled:
            self._bundled[family] = bundled(family, self.packs)
        return self._bundled[family]

    def _read(self, contents: Mapping[str, bytes]) -> Iterator[Record]:
        for path, data in contents.items():
            record = read(data, path, self.secret)
            if isinstance(record, Refusal):
                self._refuse(path, record)
            else:
                yield record

    def _write(self, record: Record) -> None:
        if self.local is not None:
            with self._or_warn("AR512"):
                self.local.write(record.path, record.data)

    def _refuse(self, path: str, refusal: Refusal) -> None:
        self.refused[path] = refusal
        self._warn("AR513", f"the first one: {refusal}: {path}")

    @contextmanager
    def _or_warn(self, code: str) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            self._warn(code, f"{cause.filename or ''}: {cause.strerror or cause}")

    def _warn(self, code: str, detail: str) -> None:
        """Say something once."""
        if code not in self._warned:
            self._warned.add(code)
            warnings.warn(str(error(code, detail)), AttnRewriteWarning, stacklevel=2)
