"""What every home of records can do, and which home an address names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from attnrewrite.kernels.diagnostics import error
from attnrewrite.kernels.places import without_credentials


class Place(Protocol):
    """A home of records, by their paths ``v1/<family>/<device>/<digest of the key>/<digest of the record>.json``."""

    def fetch(self, folder: str) -> dict[str, bytes]:
        """Return the records of one key's folder by their paths."""

    def paths(self) -> Iterator[str]:
        """Yield the path of every record."""

    def read(self, path: str) -> bytes:
        """Return a record's content, of a file that is larger at most one byte more than a record can have."""

    def write(self, path: str, data: bytes) -> None:
        """Put a record there: whole or not at all."""


def open_place(address: str) -> Place:
    """Return the place at an address: a folder, ``redis://``, or any URL that fsspec knows.

    Raises TuningError AR514 for an address that is none, and CaptureError AR106 where its package is missing. The
    store itself is not asked yet.
    """
    scheme, separator, rest = address.partition("://")
    shown = without_credentials(address)
    try:
        if not separator or scheme == "file":
            from attnrewrite.kernels.store.local import Folder

            return Folder(Path(rest if separator else address).expanduser())
        if scheme in ("redis", "rediss", "unix"):
            from attnrewrite.kernels.store.redis import Redis

            return Redis(address)
        from attnrewrite.kernels.store.shared import Remote

        return Remote(address)
    except ImportError as cause:
        extra = "redis" if scheme.startswith("redis") or scheme == "unix" else "s3" if scheme == "s3" else ""
        wanted = f"pip install 'attnrewrite[{extra}]'" if extra else f"install what fsspec needs for {scheme}://"
        raise error("AR106", f"{shown}: {cause}", hint=wanted) from cause
    except Exception as cause:  # whatever a file system's own constructor raises
        said = str(cause).replace(address, shown)
        raise error("AR514", f"{shown}: {type(cause).__name__}: {said}") from cause
