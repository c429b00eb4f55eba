"""Records in a folder, on this machine or on a network file system."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from attnrewrite.kernels.store.key import VERSION
from attnrewrite.kernels.store.record import LARGEST

PARTIAL = ".partial"


class Folder:
    """Records as files. A file appears under its name when it is whole, so that nobody needs a lock."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fetch(self, folder: str) -> dict[str, bytes]:
        """Return the records of one key's folder by their paths. Raises OSError."""
        found: dict[str, bytes] = {}
        for name in _files(self.root / folder):
            with suppress(FileNotFoundError):  # removed meanwhile
                found[f"{folder}/{name}"] = self.read(f"{folder}/{name}")
        return found

    def paths(self) -> Iterator[str]:
        """Yield the path of every record, sorted. Raises OSError."""
        for folder in self.folders():
            yield from (f"{folder}/{name}" for name in _files(self.root / folder))

    def folders(self) -> Iterator[str]:
        """Yield the folder of every key, sorted. Raises OSError."""
        for family in self.below(f"v{VERSION}"):
            for device in self.below(family):
                yield from self.below(device)

    def below(self, folder: str) -> list[str]:
        """Return the folders in a folder, sorted. Raises OSError."""
        with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            return [f"{folder}/{name}" for name in sorted(entry.name for entry in entries if entry.is_dir())]
        return []

    def read(self, path: str) -> bytes:
        """Return a record's content, of a file that is larger at most one byte more than a record can have."""
        with open(self.root / path, "rb") as file:
            return file.read(LARGEST + 1)

    def write(self, path: str, data: bytes) -> None:
        """Put a record there, whole or not at all. Raises OSError."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        put_file(target, data)

    def delete(self, path: str) -> None:
        """Remove a record, and its key's folder after the last one. Raises OSError."""
        target = self.root / path
        target.unlink(missing_ok=True)
        with suppress(OSError):  # there are others
            target.parent.rmdir()

    def partials(self) -> list[Path]:
        """Return what writers that were killed have left. Raises OSError."""
        return sorted((self.root / f"v{VERSION}").glob(f"*/*/*/*{PARTIAL}"))


def put_file(target: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)  # a colleague reads the folder, too
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _files(folder: Path) -> list[str]:
    """Return the names of records; a folder that is not there has none. Pipes and devices are not opened."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.endswith(".json") and entry.is_file())
    return []
